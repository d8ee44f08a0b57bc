//! The walkthrough's training, its score and its reproducibility.

use qlora_nb::prelude::*;
use qlora_nb_tests::*;

/// The form that was asked for: characters a line, lines.
fn form(name: &str) -> (usize, usize) {
    let width = if name.starts_with('五') { 5 } else { 7 };
    (width, if name.ends_with("绝句") { 4 } else { 8 })
}

/// Exactly the asked number of lines, each of exactly the asked number of characters and a mark.
fn follows(text: &str, (width, lines): (usize, usize)) -> bool {
    let han = |c: char| ('\u{3400}'..='\u{9fff}').contains(&c);
    let found: Vec<Vec<char>> = text.trim().split('\n').map(|l| l.chars().collect()).collect();
    let good =
        |l: &Vec<char>| l.len() == width + 1 && l[..width].iter().all(|c| han(*c)) && "，。？！；".contains(l[width]);
    found.len() == lines && found.iter().all(good)
}

fn prompt(instruction: &str, input: &str) -> String {
    format!("{}\n\nAssistant: ", format!("Human: {instruction}\n{input}").trim())
}

pub fn process(tokenizer: &Tokenizer, row: &Example) -> Result<Features> {
    let prompt = tokenizer.encode(&prompt(row.text("instruction")?, row.text("input")?))?;
    let answer = tokenizer.encode(&format!("{}{}", row.text("output")?, tokenizer.eos_token()))?;
    Ok(Features::supervised(&prompt, &answer, 256))
}

pub fn model_folder() -> String {
    root().join("notebooks/models/poet-bloom-zh").display().to_string()
}

pub fn load() -> Result<(Tokenizer, Dataset, PeftModel)> {
    let tokenizer = AutoTokenizer::from_pretrained(model_folder())?;
    let tokenized =
        Dataset::load_from_disk(root().join("notebooks/data/poems_zh"))?.map(|row| process(&tokenizer, row))?;
    let quantization = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    let options =
        ModelOptions { torch_dtype: DType::F16, quantization_config: Some(quantization), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(model_folder(), options)?;
    let config = LoraConfig { r: 8, lora_alpha: 16, target_modules: "all-linear".into(), ..Default::default() };
    Ok((tokenizer, tokenized, get_peft_model(&base, &config)?))
}

pub fn arguments(folder: &std::path::Path, max_steps: isize) -> TrainingArguments {
    TrainingArguments {
        output_dir: folder.into(),
        per_device_train_batch_size: 4,
        learning_rate: 5e-3,
        max_steps,
        warmup_steps: 10,
        logging_steps: 20,
        gradient_checkpointing: true,
        optim: Optim::PagedAdamW32bit,
        disable_tqdm: true,
        ..Default::default()
    }
}

/// How many of the held-out requests get a poem of the form asked for, ended in time.
fn score(model: &PeftModel, tokenizer: &Tokenizer) -> Result<(usize, usize)> {
    let rows = std::fs::read_to_string(root().join("notebooks/data/heldout_titles.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = rows.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let prompts: Vec<String> = rows.iter().map(|r| prompt(&text(r, "instruction"), &text(r, "input"))).collect();
    let config = GenerationConfig {
        do_sample: true,
        temperature: Some(0.8),
        top_p: Some(0.9),
        top_k: Some(0),
        max_new_tokens: Some(120),
        seed: Some(1),
        ..Default::default()
    };
    let pipe = pipeline("text-generation", model, tokenizer)?.streaming(false);
    let answers = pipe.generate_batch(&prompts, &config)?;
    let good = answers.iter().zip(&rows).filter(|(a, r)| follows(a.new_text(), form(&text(r, "form")))).count();
    Ok((good, rows.len()))
}

#[test]
fn it_learns_to_follow_the_form() -> Result<()> {
    let (tokenizer, tokenized, model) = load()?;
    let (before, of) = score(&model, &tokenizer)?;
    let folder = tempfile::tempdir().unwrap();
    let collator = DataCollatorForSeq2Seq::new(&tokenizer);
    let mut trainer = Trainer::new(&model, arguments(folder.path(), 200), &tokenized, collator)?;
    let start = std::time::Instant::now();
    let output = trainer.train()?;
    let seconds = start.elapsed().as_secs_f64();
    let (after, _) = score(&model, &tokenizer)?;
    let losses: Vec<f64> = trainer.log_history().iter().filter_map(|l| l.get("loss")).collect();
    println!("form obeyed: {before} of {of} before, {after} of {of} after; loss {losses:.3?}; {seconds:.1} s");
    println!("{output}");
    assert!(before <= 3, "{before} of {of} before tuning");
    assert!(after >= 55, "{after} of {of} after tuning");
    assert!(losses[0] > 3.0 && losses[losses.len() - 1] < 2.4, "{losses:?}");
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_numbers() -> Result<()> {
    let run = || {
        let (tokenizer, tokenized, model) = load()?;
        let folder = tempfile::tempdir().unwrap();
        let collator = DataCollatorForSeq2Seq::new(&tokenizer);
        let args = TrainingArguments { logging_steps: 1, ..arguments(folder.path(), 4) };
        let mut trainer = Trainer::new(&model, args, &tokenized, collator)?;
        trainer.train()?;
        let losses: Vec<f64> = trainer.log_history().iter().filter_map(|l| l.get("loss")).collect();
        let weights: Vec<Vec<f64>> = model.trainable_parameters().iter().map(|p| values(p.value())).collect();
        Ok::<_, Error>((losses, weights))
    };
    assert_eq!(run()?, run()?);
    Ok(())
}
