//! What a run has done so far, in the form of transformers' `trainer_state.json`.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::{
    display::{
        self, Forms,
        format::{escape_html, thousands},
        shown_by_forms,
        theme::{CELL, FAINT, NUMBER, TABLE, TEXT},
    },
    json_file::read_fields,
    names::debug_as_display,
    py_repr::{py_dict, py_float},
};

/// What the trainer does next. A callback may set these; the trainer clears the last three
/// once it has done them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainerControl {
    /// Stop after this update; `train` again goes on.
    pub should_training_stop: bool,
    /// Log after this update.
    pub should_log: bool,
    /// Evaluate after this update.
    pub should_evaluate: bool,
    /// Save a checkpoint after this update.
    pub should_save: bool,
}

/// Where a training run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainerState {
    /// Epochs done, the current one as a fraction.
    pub epoch: f64,
    /// Updates done.
    pub global_step: usize,
    /// Updates in the whole run.
    pub max_steps: usize,
    /// Epochs begun in the whole run.
    pub num_train_epochs: usize,
    pub logging_steps: usize,
    pub eval_steps: usize,
    pub save_steps: usize,
    pub train_batch_size: usize,
    /// Input tokens that were trained on, padding included.
    pub num_input_tokens_seen: usize,
    /// All entries logged since the run began.
    pub log_history: Vec<LogEntry>,
    /// The lowest evaluation loss; kept when arguments ask for the best checkpoint.
    pub best_metric: Option<f64>,
    pub best_global_step: Option<usize>,
    /// The folder of the checkpoint with the lowest evaluation loss.
    pub best_model_checkpoint: Option<String>,
}

impl TrainerState {
    /// The file's content: transformers' keys in its order, which its own loader reads.
    pub(super) fn to_json(&self, control: &TrainerControl) -> Value {
        let mut sorted: BTreeMap<String, Value> = serde_json::from_value(json!(self)).unwrap_or_default();
        let control = json!({
            "should_epoch_stop": false,
            "should_evaluate": control.should_evaluate,
            "should_log": control.should_log,
            "should_save": control.should_save,
            "should_training_stop": control.should_training_stop,
        });
        let constants = [
            ("is_hyper_param_search", json!(false)),
            ("is_local_process_zero", json!(true)),
            ("is_world_process_zero", json!(true)),
            ("stateful_callbacks", json!({ "TrainerControl": { "args": control, "attributes": {} } })),
            // transformers' word for "not known".
            ("total_flos", json!(0.0)),
            ("trial_name", Value::Null),
            ("trial_params", Value::Null),
        ];
        sorted.extend(constants.map(|(key, value)| (key.to_owned(), value)));
        json!(sorted)
    }

    /// Reads back what [`to_json`](Self::to_json) wrote; the error names the key.
    pub(super) fn from_json(value: &Value) -> Result<Self, String> {
        read_fields(value)
    }

    /// `(step, value)` of every entry that has `key`: `curve("loss")`, `curve("eval_loss")`.
    pub fn curve(&self, key: &str) -> Vec<(f64, f64)> {
        self.log_history.iter().filter_map(|entry| Some((entry.get("step")?, entry.get(key)?))).collect()
    }

    /// Training and evaluation loss over the updates, as a picture.
    pub fn loss_curve(&self) -> display::Svg {
        self.loss_curve_with("Loss")
    }

    pub(super) fn loss_curve_with(&self, title: &str) -> display::Svg {
        let series = [("training", "loss"), ("evaluation", "eval_loss")]
            .map(|(name, key)| display::Series { name: name.into(), points: self.curve(key) });
        display::line_chart(title, "optimizer step", "loss (nats per token)", &series)
    }

    /// Whether the curve would have a point.
    pub(super) fn has_losses(&self) -> bool {
        self.log_history.iter().any(|entry| entry.get("loss").or(entry.get("eval_loss")).is_some())
    }
}

/// One entry of the log: names and numbers in the order in which they were logged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogEntry(Vec<(String, f64)>);

impl LogEntry {
    pub(super) fn new<'a>(values: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        Self(values.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    pub(super) fn push(&mut self, name: &str, value: f64) {
        self.0.push((name.to_owned(), value));
    }

    /// The number under `name`, e.g. `"loss"`, `"grad_norm"`, `"learning_rate"`, `"epoch"`, `"step"`.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| *value)
    }

    /// Names and numbers in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// Like the whole entry with four significant digits a number: a line for the screen.
    pub(super) fn brief(&self) -> String {
        let short = |x: f64| format!("{x:.3e}").parse().unwrap_or(x);
        Self(self.iter().map(|(name, value)| (name.to_owned(), short(value))).collect()).to_string()
    }
}

/// In `trainer_state.json` the names are sorted.
impl Serialize for LogEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let number = |name: &str, value: f64| if name == "step" { json!(value as u64) } else { json!(value) };
        let sorted: BTreeMap<_, _> = self.iter().map(|(name, value)| (name, number(name, value))).collect();
        sorted.serialize(serializer)
    }
}

/// In memory they are in the order of logging again.
impl<'de> Deserialize<'de> for LogEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const FIRST: [&str; 3] = ["loss", "grad_norm", "learning_rate"];
        let rank = |name: &str| match name {
            "epoch" => 8,
            "step" => 9,
            "train_loss" => 7,
            _ => FIRST.iter().position(|first| *first == name).unwrap_or(3),
        };
        let mut entry: Vec<(String, f64)> = BTreeMap::deserialize(deserializer)?.into_iter().collect();
        entry.sort_by_key(|(name, _)| rank(name));
        Ok(Self(entry))
    }
}

impl fmt::Display for LogEntry {
    /// As Python prints a dict.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |name: &str, x: f64| if name == "step" { x.to_string() } else { py_float(x) };
        f.write_str(&py_dict(self.iter().map(|(name, x)| (name, value(name, x)))))
    }
}

/// What a call of `train` gives back.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainOutput {
    /// Updates done since the run began.
    pub global_step: usize,
    /// Mean loss (nats a token): of the whole run after `train`, however often it was cut and
    /// resumed; of this call's updates after `train_steps`.
    pub training_loss: f64,
    /// `train_runtime` in seconds and throughput, of this call; `train_loss`; `epoch`.
    pub metrics: LogEntry,
    /// Whether an interrupt ended it early; `train` again goes on from here.
    pub interrupted: bool,
    /// Whether the run is complete.
    pub finished: bool,
    pub(super) curve: display::Svg,
    /// The call's own output has the curve: at the end of the same cell one click away is enough.
    pub(super) curve_is_above: bool,
}

impl TrainOutput {
    /// Training and evaluation loss over the updates, as a picture.
    pub fn loss_curve(&self) -> &display::Svg {
        &self.curve
    }

    /// The numbers as an HTML table, and the loss curve.
    pub fn to_html(&self) -> String {
        let row = |name: &str, value: String| {
            format!(
                "<tr style=\"background:transparent\"><td style=\"{CELL}\">{}</td><td style=\"{NUMBER}\">{}</td></tr>",
                escape_html(name),
                escape_html(&value)
            )
        };
        let heading = match (self.interrupted, self.finished) {
            (true, _) => INTERRUPTED,
            (_, true) => "trained to the end",
            _ => "the run goes on with trainer.train()",
        };
        let metrics: String = self.metrics.iter().map(|(name, value)| row(name, py_float(value))).collect();
        let curve = if self.curve_is_above {
            format!("<details><summary>loss curve</summary>{}</details>", self.curve.source())
        } else {
            self.curve.source().to_owned()
        };
        format!(
            "<div style=\"{TEXT}\"><div><b>TrainOutput</b>&ensp;<span style=\"{FAINT}\">{heading}</span></div>\
             <table style=\"{TABLE};margin:.3em 0\">{}{}{metrics}</table>{curve}</div>",
            row("global_step", thousands(self.global_step)),
            row("training_loss", py_float(self.training_loss)),
        )
    }

    /// What a notebook shows: numbers and loss curve.
    pub fn forms(&self) -> Forms {
        vec![("text/html", self.to_html()), ("text/plain", self.to_string())]
    }
}

shown_by_forms!(TrainOutput);

const INTERRUPTED: &str = "interrupted; nothing was lost: trainer.train() goes on from here";

impl fmt::Display for TrainOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, loss, metrics) = (self.global_step, py_float(self.training_loss), &self.metrics);
        write!(f, "TrainOutput(global_step={step}, training_loss={loss}, metrics={metrics})")?;
        if self.interrupted { write!(f, "\n{INTERRUPTED}") } else { Ok(()) }
    }
}

debug_as_display!(TrainOutput);

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TrainerState {
        TrainerState {
            epoch: 0.30000000000000004,
            global_step: 3,
            max_steps: 10,
            num_train_epochs: 1,
            logging_steps: 2,
            eval_steps: 500,
            save_steps: 3,
            train_batch_size: 4,
            num_input_tokens_seen: 1234,
            log_history: vec![
                LogEntry::new([
                    ("loss", 2.125),
                    ("grad_norm", 0.1),
                    ("learning_rate", 4.5e-7),
                    ("epoch", 0.2),
                    ("step", 2.0),
                ]),
                LogEntry::new([
                    ("eval_loss", 2.0 / 3.0),
                    ("eval_runtime", 1.5),
                    ("eval_samples_per_second", 3.0),
                    ("eval_steps_per_second", 1.0),
                    ("epoch", 0.2),
                    ("step", 2.0),
                ]),
                LogEntry::new([
                    ("train_runtime", 1.5),
                    ("train_samples_per_second", 3.0),
                    ("train_steps_per_second", 1.0),
                    ("train_loss", 1.0),
                    ("epoch", 0.2),
                    ("step", 2.0),
                ]),
            ],
            best_metric: None,
            best_global_step: Some(2),
            best_model_checkpoint: None,
        }
    }

    impl TrainOutput {
        pub(crate) fn example() -> Self {
            TrainOutput {
                global_step: 1200,
                training_loss: 2.19154,
                metrics: state().log_history[2].clone(),
                interrupted: true,
                finished: false,
                curve: state().loss_curve(),
                curve_is_above: true,
            }
        }
    }

    #[test]
    fn the_state_reads_back_bit_for_bit() {
        let text = serde_json::to_string_pretty(&state().to_json(&TrainerControl::default())).unwrap();
        assert_eq!(TrainerState::from_json(&serde_json::from_str(&text).unwrap()).unwrap(), state());
        // Every float, not these only: reading JSON is exact.
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..10_000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = (x >> 11) as f64 / 3e15;
            let read: f64 = serde_json::from_str(&serde_json::to_string(&value).unwrap()).unwrap();
            assert_eq!(read.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn the_keys_are_those_of_the_reference_sorted() {
        let json = state().to_json(&TrainerControl::default());
        let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        let mut sorted = keys.clone();
        sorted.sort();
        assert_eq!(keys, sorted);
        let text = serde_json::to_string(&json["log_history"][0]).unwrap();
        assert_eq!(text, r#"{"epoch":0.2,"grad_norm":0.1,"learning_rate":4.5e-7,"loss":2.125,"step":2}"#);
    }

    #[test]
    fn a_damaged_state_names_the_key() {
        let mut json = state().to_json(&TrainerControl::default());
        json["global_step"] = json!("three");
        assert_eq!(TrainerState::from_json(&json).unwrap_err(), "global_step is not a count");
    }

    #[test]
    fn entries_print_as_python_dicts() {
        let entry = &state().log_history[0];
        assert_eq!(
            entry.to_string(),
            "{'loss': 2.125, 'grad_norm': 0.1, 'learning_rate': 4.5e-07, 'epoch': 0.2, 'step': 2}"
        );
        assert_eq!(
            LogEntry::new([("loss", 2.19154), ("learning_rate", 4.53333e-5), ("epoch", 0.66666)]).brief(),
            "{'loss': 2.192, 'learning_rate': 4.533e-05, 'epoch': 0.6667}"
        );
        assert_eq!((entry.get("loss"), entry.get("eval_loss")), (Some(2.125), None));
    }

    #[test]
    fn the_loss_curve_has_both_losses() {
        let svg = state().loss_curve();
        assert!(svg.source().contains("training") && svg.source().contains("evaluation"));
        assert_eq!(state().curve("loss"), [(2.0, 2.125)]);
    }
}
