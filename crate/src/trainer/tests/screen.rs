//! What a cell shows of a run while it trains.

use serde_json::Value;

use super::*;
use crate::{display::capture, py_repr::py_float};

fn seen_args(dir: &Path) -> TrainingArguments {
    TrainingArguments { disable_tqdm: false, logging_steps: 1, ..args(dir) }
}

/// The last state of each output, in the order of their appearance.
fn outputs(sent: &[Value]) -> Vec<&Value> {
    let shown = sent.iter().filter(|m| m["op"] == "display");
    shown.map(|first| sent.iter().rfind(|m| m["id"] == first["id"]).unwrap()).collect()
}

fn text(message: &Value) -> &str {
    message["data"]["text/plain"].as_str().unwrap()
}

fn svg(message: &Value) -> &str {
    message["data"]["image/svg+xml"].as_str().unwrap()
}

#[test]
fn a_run_shows_a_bar_and_beneath_it_the_curve_of_its_losses() {
    let run = || {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = trainer(&Double::with(true), seen_args(dir.path()));
        let (output, sent) = capture::messages(|| trainer.train().unwrap());
        (output, trainer.loss_curve(), sent)
    };
    let (output, curve, sent) = run();
    let shown = outputs(&sent);
    assert_eq!(shown.len(), 2, "{sent:?}");
    assert_eq!(shown[0]["metadata"]["qlora_nb"]["volatile"], true);
    assert!(text(shown[0]).starts_with("Training: 6 of 6 steps in "), "{}", text(shown[0]));
    assert_eq!(shown[1]["metadata"], serde_json::json!({}));
    assert_eq!(svg(shown[1]), curve.source(), "the last state has every point");
    let (_, _, again) = run();
    assert_eq!(outputs(&again)[1]["data"], shown[1]["data"], "another run shows the same picture");

    // The picture is above: the value that ends the cell folds its own.
    assert!(output.to_html().contains("<details>"));
    let (quiet, _) = whole_output();
    assert!(quiet.to_html().contains("<svg") && !quiet.to_html().contains("<details>"));
}

fn whole_output() -> (TrainOutput, Vec<Value>) {
    let dir = tempfile::tempdir().unwrap();
    let quiet = TrainingArguments { disable_tqdm: true, ..seen_args(dir.path()) };
    capture::messages(|| trainer(&Double::new(), quiet).train().unwrap())
}

#[test]
fn disable_tqdm_shows_nothing() {
    assert_eq!(whole_output().1, [] as [Value; 0]);
}

#[test]
fn a_run_that_was_stopped_says_where() {
    for (interrupted, bar, curve) in [
        (true, "Training: interrupted at 3 of 6 steps after ", "Loss, interrupted at 3 of 6 steps"),
        (false, "Training: stopped at 3 of 6 steps after ", "Loss, stopped by an error at 3 of 6 steps"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let model = Double::new();
        // Two passes an update: the seventh belongs to the fourth.
        model.before_pass(move |n| match n {
            6 if interrupted => {
                interrupt::request();
                0.0
            }
            6 => f64::NAN,
            _ => 0.0,
        });
        let mut trainer = trainer(&model, seen_args(dir.path()));
        let (result, sent) = capture::messages(|| trainer.train());
        assert_eq!(result.is_ok(), interrupted);
        let shown = outputs(&sent);
        assert!(text(shown[0]).starts_with(bar), "{}", text(shown[0]));
        assert!(svg(shown[1]).contains(curve), "{}", svg(shown[1]));
    }
}

#[test]
fn the_output_is_a_table_of_its_numbers() {
    let (output, _) = whole_output();
    let html = output.to_html();
    for (name, value) in output.metrics.iter() {
        let row = format!("{name}</td><td style=\"{}\">{}</td>", display::theme::NUMBER, py_float(value));
        assert!(html.contains(&row), "{row} is missing from {html}");
    }
    assert!(html.contains("global_step") && html.contains("trained to the end"));
    assert_eq!(output.forms()[1], ("text/plain", output.to_string()));
}
