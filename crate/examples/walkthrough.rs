//! The notebook `qlora_walkthrough` as a program, for a machine without Jupyter, with or without a GPU:
//!
//! ```sh
//! cargo run --release -p qlora-nb --example walkthrough                      # the bundled model
//! cargo run --release -p qlora-nb --example walkthrough -- smollm2           # after scripts/setup smollm2
//! cargo run --release -p qlora-nb --features cuda --example walkthrough -- bloom-1b4 MODEL DATA
//! ```
//!
//! MODEL is a folder, a GGUF file or an id on the hub, DATA a folder that `save_to_disk` wrote; without them they are
//! those of the named run. Results go to `notebooks/en/out/walkthrough`, as the notebook's do.
//!
//! The cells below are the notebook's, in its order (`// %%` opens one); of each, an expression that the notebook would
//! display is printed. A test holds the two together.

use std::{error::Error, path::Path, process::ExitCode};

const USAGE: &str = "usage: walkthrough [poet|smollm2|bloom-1b4] [MODEL [DATA]]";

/// What the command line says.
struct Arguments {
    run: String,
    model: Option<&'static str>,
    data: Option<&'static str>,
}

/// Reads the command line, and goes to the folder of the notebook, from which the paths in its cells count.
fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let mut given = std::env::args().skip(1);
    let run = given.next().unwrap_or_else(|| "poet".into());
    // What lies here is named from here. What does not may be an id on the hub.
    let named = |name: String| -> std::io::Result<&'static str> {
        let path = Path::new(&name);
        let name = if path.exists() { path.canonicalize()?.display().to_string() } else { name };
        Ok(name.leak())
    };
    let (model, data) = (given.next().map(named).transpose()?, given.next().map(named).transpose()?);
    if let Some(more) = given.next() {
        return Err(format!("{more:?} is one argument too many\n{USAGE}").into());
    }
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../notebooks/en"))?;
    Ok(Arguments { run, model, data })
}

fn main() -> ExitCode {
    match walkthrough() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[rustfmt::skip] // the notebook's own lines
fn walkthrough() -> Result<(), Box<dyn Error>> {
    // %% Step 1: import, and choose
    use qlora_nb::prelude::*;

    // %%
    struct Run { model: &'static str, data: &'static str, modules: &'static str, lora_alpha: usize,
        learning_rate: f64, accumulation: usize, max_steps: isize, warmup_steps: usize, logging_steps: usize,
        checkpoint: &'static str }
    const POET: Run = Run { model: "../models/poet-bloom-zh", data: "../data/poems_zh",
        modules: "all-linear", lora_alpha: 16, learning_rate: 5e-3, accumulation: 1,
        max_steps: 200, warmup_steps: 10, logging_steps: 20, checkpoint: "checkpoint-200" };
    const SMOLLM2: Run = Run { model: "../models/SmolLM2-135M-Instruct", learning_rate: 1e-3, ..POET };
    const BLOOM_1B4: Run = Run { model: "Langboat/bloom-1b4-zh", data: "../data/alpaca_data_zh",
        modules: ".*query_key_value", lora_alpha: 8, learning_rate: 5e-5, accumulation: 8,
        max_steps: -1, warmup_steps: 0, logging_steps: 20, checkpoint: "checkpoint-500" };

    let run = POET;

    // Not in the notebook: there the cell above is edited, here the command line chooses.
    let arguments = arguments()?;
    let run = match arguments.run.as_str() {
        "poet" => run,
        "smollm2" => SMOLLM2,
        "bloom-1b4" => BLOOM_1B4,
        other => return Err(format!("run: expected poet, smollm2 or bloom-1b4, got {other:?}\n{USAGE}").into()),
    };
    let run = Run { model: arguments.model.unwrap_or(run.model), data: arguments.data.unwrap_or(run.data), ..run };

    // %% Step 2: load the dataset
    let ds = Dataset::load_from_disk(run.data)?;
    println!("{}", ds);

    // %%
    println!("{}", ds.slice(0..1));

    // %% Step 3: prepare the data
    let tokenizer = AutoTokenizer::from_pretrained(run.model)?;
    println!("{}", tokenizer);

    // %%
    fn question(ex: &Example) -> Result<String> {
        let question = format!("Human: {}\n{}", ex.text("instruction")?, ex.text("input")?);
        Ok(format!("{}\n\nAssistant: ", question.trim()))
    }
    fn process(tok: &Tokenizer, ex: &Example) -> Result<Features> {
        const MAX_LENGTH: usize = 256;
        let prompt = tok.encode(&question(ex)?)?;
        let answer = tok.encode(&format!("{}{}", ex.text("output")?, tok.eos_token()))?;
        Ok(Features::supervised(&prompt, &answer, MAX_LENGTH))
    }

    // %%
    let tokenized_ds = ds.map(|ex| process(&tokenizer, ex))?;
    println!("{}", tokenized_ds);

    // %% Step 4: create the model
    let model = AutoModelForCausalLM::from_pretrained(run.model, ModelOptions {
        torch_dtype: DType::F16,
        low_cpu_mem_usage: true,
        device_map: DeviceMap::Auto,
        quantization_config: Some(BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_quant_type: QuantType::Nf4,
            bnb_4bit_use_double_quant: true,
            bnb_4bit_compute_dtype: DType::F16,
        }),
    })?;
    println!("{}", model.dtype());

    // %%
    for (name, parameter) in model.named_parameters() {
        println!("{name} {}", parameter.dtype());
    }

    // %%
    let config = LoraConfig {
        task_type: TaskType::CausalLm,
        r: 8,
        lora_alpha: run.lora_alpha,
        target_modules: run.modules.into(),
        ..Default::default()
    };
    println!("{config}");

    // %%
    let model = get_peft_model(&model, &config)?;
    println!("{}", model);

    // %%
    model.print_trainable_parameters();
    println!("\n{}", model.memory_report());

    // %%
    fn is_han(c: char) -> bool {
        ('\u{3400}'..='\u{9fff}').contains(&c)
    }
    fn in_form(poem: &str, form: &str) -> bool {
        let lines = if form.ends_with("绝句") { 4 } else { 8 };
        let characters = if form.starts_with("五言") { 5 } else { 7 };
        let is_verse = |line: &str| match line.strip_suffix(['，', '。', '？', '！', '；']) {
            Some(verse) => verse.chars().count() == characters && verse.chars().all(is_han),
            None => false,
        };
        poem.trim().lines().count() == lines && poem.trim().lines().all(is_verse)
    }

    // %%
    fn write(pipe: &TextGenerationPipeline, requests: &Dataset) -> Result<Vec<GeneratedText>> {
        let sampling = GenerationConfig { do_sample: true, temperature: Some(0.8), top_p: Some(0.9),
            top_k: Some(0), max_new_tokens: Some(120), seed: Some(1), ..Default::default() };
        let prompts = requests.iter().map(|ex| question(&ex)).collect::<Result<Vec<_>>>()?;
        Ok(pipe.generate_batch(&prompts, &sampling)?.into_iter().flatten().collect())
    }
    fn score(poems: &[GeneratedText], requests: &Dataset) -> Result<usize> {
        let mut good = 0;
        for (poem, ex) in poems.iter().zip(requests.iter()) {
            let ended = poem.finish_reason() == FinishReason::Eos;
            good += usize::from(ended && in_form(poem.new_text(), ex.text("form")?));
        }
        Ok(good)
    }

    // %%
    let requests = Dataset::from_json("../data/heldout_titles.jsonl")?;
    let pipe = pipeline("text-generation", &model, &tokenizer)?;
    let before = write(&pipe, &requests)?;
    println!("{} of {} in form\n", score(&before, &requests)?, requests.len());
    for poem in &before[..3] {
        println!("{}\n", poem.text());
    }

    // %% Step 5: set the training arguments
    let args = TrainingArguments {
        output_dir: "out/walkthrough/qlora".into(),
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: run.accumulation,
        logging_steps: run.logging_steps,
        max_steps: run.max_steps,
        learning_rate: run.learning_rate,
        warmup_steps: run.warmup_steps,
        gradient_checkpointing: true,
        optim: Optim::PagedAdamW32bit,
        ..Default::default()
    };

    // %% Step 6: create the trainer
    let mut trainer = Trainer::new(&model, args, &tokenized_ds, DataCollatorForSeq2Seq::new(&tokenizer))?;
    println!("{}", trainer.memory_plan()?);
    reset_peak(); // what was written before training does not count

    // %% Step 7: train
    println!("{}", trainer.train()?);

    // %%
    trainer.loss_curve().save("out/walkthrough/loss.svg")?;
    let peak = peak_resident_bytes();
    println!("peak {:.0} MiB", peak as f64 / (1 << 20) as f64);

    // %% Step 8: use the model
    let base = AutoModelForCausalLM::from_pretrained(run.model, ModelOptions::default())?;
    let p_model = PeftModel::from_pretrained(&base, format!("out/walkthrough/qlora/{}", run.checkpoint))?;
    let pipe = pipeline("text-generation", &p_model, &tokenizer)?;

    // %%
    let prompt = format!("Human: {}\n{}", "以《江上秋夜》为题，写一首七言绝句。", "");
    let prompt = prompt.trim().to_string() + "\n\nAssistant: ";
    let options = GenerationConfig { max_length: Some(500), do_sample: true, seed: Some(7), ..Default::default() };
    println!("{}", pipe.generate(&prompt, &options)?);

    // %%
    let after = write(&pipe, &requests)?;
    let (good, better) = (score(&before, &requests)?, score(&after, &requests)?);
    println!("{good} of {} in form before, {better} after\n", requests.len());
    for poem in &after[..3] {
        println!("{}\n", poem.text());
    }

    // %%
    let mut table = String::new();
    for (old, new) in before.iter().zip(&after) {
        table += &format!("{}\n  before: {}\n  after:  {}\n\n", old.prompt().trim(),
            old.new_text().trim().replace('\n', " / "), new.new_text().trim().replace('\n', " / "));
    }
    std::fs::write("out/walkthrough/before_after.txt", table)?;

    // Not in the notebook either.
    println!("adapter, loss curve and poems: {}", std::env::current_dir()?.join("out/walkthrough").display());
    Ok(())
}
