//! A page with every HTML form on a light and on a dark background, to be looked at:
//! `GALLERY=/tmp/gallery.html cargo test -p qlora-nb --lib gallery -- --ignored`

use std::time::Duration;

use super::{
    bar::{Bar, Stage},
    line_chart,
};
use crate::{
    dataset::Dataset, features::Features, model::AutoModelForCausalLM, models::memory::MemoryReport,
    models::options::ModelOptions, peft::get_peft_model, prelude::*,
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../notebooks/models/poet-bloom-zh");

fn forms() -> Result<Vec<(&'static str, String)>> {
    let bar = |stage, done| Bar {
        what: "Training".into(),
        unit: "steps",
        first: 0,
        done,
        total: 200,
        elapsed: Duration::from_secs(21),
        message: "loss 2.1034, 1,234 tokens/s".into(),
        stage,
    };
    let ds = Dataset::from_columns([("instruction", vec!["以《江上秋夜》为题，写一首七言绝句。"; 12])])?;
    let tokenizer = AutoTokenizer::from_pretrained(MODEL)?;
    let (prompt, answer) = (tokenizer.encode("Human: 写一首诗\n\nAssistant: ")?, tokenizer.encode("江上秋夜月\n</s>")?);
    let mut features = Features::supervised(&prompt, &answer, 64);
    features.input_ids.push(3);
    features.attention_mask.push(0);
    features.labels.push(-100);
    let model = AutoModelForCausalLM::from_pretrained(MODEL, ModelOptions::default())?;
    let config = LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() };
    let adapted = get_peft_model(&model, &config)?;
    let mut memory: MemoryReport = adapted.memory_report();
    memory.add("the widest moment: one block again, or the logits", 9 << 20);
    let loss = super::Series { name: "training".into(), points: (1..40).map(|i| (i as f64, 6.0 / i as f64)).collect() };
    Ok(vec![
        ("running", bar(Stage::Running, 57).html()),
        ("finished", bar(Stage::Finished, 200).html()),
        ("interrupted", bar(Stage::Interrupted, 57).html()),
        ("stopped", bar(Stage::Stopped, 57).html()),
        ("dataset", ds.to_html()),
        ("features", features.show(&tokenizer).to_html()),
        ("memory", memory.to_html()),
        ("model", model.module_tree().to_html(3)),
        ("adapted", adapted.module_tree().to_html(12)),
        ("train output", TrainOutput::example().to_html()),
        ("curve", line_chart("Loss, interrupted at 57 of 200 steps", "step", "loss", &[loss]).source().into()),
        ("text", GeneratedText::example().forms()[0].1.clone()),
    ])
}

#[test]
#[ignore = "writes a page to look at: GALLERY=/tmp/gallery.html"]
fn write_a_page() {
    let forms = forms().unwrap();
    let column = |style: &str| {
        let all: String = forms.iter().map(|(name, html)| format!("<p><small>{name}</small></p>{html}")).collect();
        format!("<div style=\"flex:1;padding:1em;min-width:0;{style}\">{all}</div>")
    };
    let (light, dark) = (column("background:#fff;color:#212121"), column("background:#111;color:#e0e0e0"));
    let page = format!(
        "<!doctype html><meta charset=\"utf-8\"><body style=\"margin:0;display:flex;font-family:sans-serif\">{light}{dark}"
    );
    std::fs::write(std::env::var("GALLERY").unwrap(), page).unwrap();
}
