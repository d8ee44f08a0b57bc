"""Interrupts at random moments: none loses a variable, and training comes to the same numbers.

The interrupted cells would not end by themselves in the time of a test, so a cell that ends was stopped by its
interrupt. No moment is too early or too late: some hit the compiler, some the code before or after the long call.

    INTERRUPTS=100 SEED=7 pytest tests/jupyter/test_interrupts.py
"""

import os
import random
import time

import pytest

import driver
from conftest import KERNEL_NAME, REPOSITORY

INTERRUPTS = int(os.environ.get("INTERRUPTS", "100"))
SEED = int(os.environ.get("SEED") or random.randrange(10**6))

pytestmark = pytest.mark.timeout(240 + 20 * INTERRUPTS)

SETUP = [
    "use qlora_nb::prelude::*;",
    """let ds = Dataset::load_from_disk("{repository}/notebooks/data/poems_zh")?;
let tokenizer = AutoTokenizer::from_pretrained("{repository}/notebooks/models/poet-bloom-zh")?;""",
    """fn process(tok: &Tokenizer, ex: &Example) -> Result<Features> {
    let prompt = tok.encode(&format!("Human: {}\\n\\nAssistant: ", ex.text("instruction")?))?;
    let answer = tok.encode(&format!("{}{}", ex.text("output")?, tok.eos_token()))?;
    Ok(Features::supervised(&prompt, &answer, 256))
}""",
    """let rows = ds.map(|ex| process(&tokenizer, ex))?;
let base = AutoModelForCausalLM::from_pretrained("{repository}/notebooks/models/poet-bloom-zh",
    ModelOptions::default())?;
let config = LoraConfig { r: 4, target_modules: ["query_key_value"].into(), ..Default::default() };""",
    # Two runs from the same start: one is interrupted, the other goes as far without a stop.
    """let args = TrainingArguments { output_dir: "out".into(), per_device_train_batch_size: 2, max_steps: 1_000_000,
    save_strategy: qlora_nb::training_args::SaveStrategy::No, logging_steps: 5, learning_rate: 5e-3,
    ..Default::default() };
let model = get_peft_model(&base, &config)?;
let twin = get_peft_model(&base, &config)?;
let mut trainer = Trainer::new(&model, args.clone(), &rows, DataCollatorForSeq2Seq::new(&tokenizer))?;
let mut twin_trainer = Trainer::new(&twin, args, &rows, DataCollatorForSeq2Seq::new(&tokenizer))?;""",
    """let pipe = pipeline("text-generation", &base, &tokenizer)?.streaming(false);
let endless = GenerationConfig { max_new_tokens: Some(100_000_000), min_new_tokens: Some(100_000_000),
    do_sample: true, seed: Some(1), ..Default::default() };""",
    """let mut compiled = 0;
let words = vec![String::from("all"), String::from("here")];
/// A number that changes with any bit of any adapter.
fn fingerprint(model: &PeftModel) -> Result<u64> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    for (name, parameter) in model.named_parameters().into_iter().filter(|(name, _)| name.contains("lora")) {
        name.hash(&mut hasher);
        let values = parameter.tensor().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        values.iter().for_each(|value| value.to_bits().hash(&mut hasher));
    }
    Ok(hasher.finish())
}""",
]

# Every variable, in one line. Those that do not change while the test runs come first.
CENSUS = """println!("{} {} {} {} {words:?} {:?} {:?} {} {} {} {compiled}", ds.len(), rows.len(),
    tokenizer.vocab_size(), config.r, pipe.tokenizer().eos_token(), endless.seed, base.dtype(),
    twin_trainer.state().global_step, trainer.state().global_step);"""

TRAINING = "trainer.train()?"
GENERATION = """for text in pipe.generate("春", &endless)?.iter() {
    println!("{}", text.finish_reason() == FinishReason::Interrupted);
}"""

# A hundred functions take the compiler a while; that the cell ran, and how often, is seen in a variable.
COMPILING = """{
    macro_rules! functions {
        ($($name:ident)*) => {{
            $(fn $name(n: usize) -> String {
                let v: Vec<String> = (0..n).map(|i| format!("{i}-{}", stringify!($name))).collect();
                v.join("+") + &format!("{v:?}{n:x}")
            })*
            [$($name(3).len()),*]
        }}
    }
    let lengths = functions!(NAMES);
    compiled += (lengths[0] > 0) as i32;
}""".replace("NAMES", " ".join(f"f_{n}" for n in range(100)))


def set_up(kernel):
    for code in SETUP:
        kernel.run(code.replace("{repository}", str(REPOSITORY))).ok()


def census(kernel):
    """(what must not change, updates of the trainer, runs of the compiling cell)"""
    text = kernel.run(CENSUS).ok().stdout
    *still, steps, compiled = text.split()
    return still, int(steps), int(compiled)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    with driver.started(KERNEL_NAME, cwd=tmp_path_factory.mktemp("interrupts")) as kernel:
        set_up(kernel)
        yield kernel


def test_interrupts_at_random_moments(laboratory):
    kernel = laboratory
    print(f"\nSEED={SEED} INTERRUPTS={INTERRUPTS}")
    draw = random.Random(SEED)
    still, steps, compiled = census(kernel)
    begin = time.monotonic()
    kernel.run(COMPILING).ok()
    # Where a moment may lie: somewhat beyond what a cell takes to be compiled and to have begun.
    window = 1.2 * (time.monotonic() - begin)
    compiled += 1
    seen = {}
    for n in range(INTERRUPTS):
        kind = ("training", "generation", "compiling")[n % 3]
        moment = draw.uniform(0, window)
        how = draw.choice(["message", "signal"])
        cell = kernel.submit({"training": TRAINING, "generation": GENERATION, "compiling": COMPILING}[kind])
        time.sleep(moment)
        interrupt(kernel, how)
        where = f"interrupt {n} (SEED={SEED}), of a {kind} cell by {how} after {moment:.3f} s"
        try:
            cell.wait()
        except TimeoutError as late:
            pytest.fail(f"{where}: the cell goes on\n{late}")
        seen[kind, cell.status] = seen.get((kind, cell.status), 0) + 1
        now, steps_now, compiled_now = census(kernel)
        assert now == still, where
        assert steps_now >= steps, where
        assert kind == "training" or steps_now == steps, where
        ran = kind == "compiling" and cell.status == "ok"
        assert compiled_now == compiled + ran, f"{where}: status {cell.status}, {compiled_now - compiled} runs"
        if kind == "generation" and cell.status == "ok":
            assert cell.stdout.endswith("true\n"), where
        steps, compiled = steps_now, compiled_now
    print(f"{steps} updates; ended as {seen}")
    assert steps > 0, "no interrupt came after training had begun: INTERRUPTS is too small or the moments too early"

    # The twin goes as far in one piece, then both do a little more.
    kernel.run(f"twin_trainer.train_steps({steps})?;", timeout=600).ok()
    kernel.run("trainer.train_steps(5)?;\ntwin_trainer.train_steps(5)?;").ok()
    compare = """println!("{} {} {:?}", trainer.state().global_step, fingerprint(&model)?, losses(&trainer));
println!("{} {} {:?}", twin_trainer.state().global_step, fingerprint(&twin)?, losses(&twin_trainer));"""
    kernel.run(
        "fn losses(trainer: &Trainer) -> Vec<f64> { "
        'trainer.log_history().iter().filter_map(|entry| entry.get("loss")).collect() }'
    ).ok()
    interrupted, in_one_piece = kernel.run(compare).ok().stdout.splitlines()
    assert interrupted == in_one_piece
    assert interrupted.split()[0] == str(steps + 5)


def interrupt(kernel, how):
    if how == "message":
        kernel.ask("interrupt_request", channel="control")
    else:
        kernel.process.send_signal(2)


def test_the_fingerprint_sees_an_update(laboratory):
    """Else the comparison above could not fail."""
    code = 'println!("{}", fingerprint(&model)?);'
    before = laboratory.run(code).ok().stdout
    laboratory.run("trainer.train_steps(1)?;").ok()
    assert laboratory.run(code).ok().stdout != before


def test_a_double_click_is_one_interrupt(kernel):
    kernel.run("let kept = 1;").ok()
    cell = kernel.submit(
        "{ let _guard = qlora_nb::interrupt::Guard::new()?;\n"
        'println!("running");\n'
        "let nap = std::time::Duration::from_millis(200);\n"
        "while !qlora_nb::interrupt::requested() { std::thread::sleep(nap); }\n"
        # Still at work, as training is until the end of its step.
        "std::thread::sleep(nap); }"
    )
    cell.wait_for(lambda cell: "running" in cell.stdout, "its first line")
    interrupt(kernel, "message")
    interrupt(kernel, "message")
    cell.wait().ok()
    assert kernel.run("kept").ok().result == "1"


@pytest.mark.parametrize("how", ["message", "signal"])
def test_a_runaway_loop_dies_at_the_second_interrupt(kernel, how):
    kernel.run("let buried = 1;").ok()
    cell = kernel.submit('println!("running"); loop { std::hint::spin_loop(); }')
    cell.wait_for(lambda cell: "running" in cell.stdout, "its first line")
    interrupt(kernel, how)
    # The first kills nothing. A second that comes at once is a double click, so this one takes its time.
    time.sleep(2)
    assert kernel.ask("kernel_info_request", channel="control")["status"] == "ok"
    assert not cell.done
    interrupt(kernel, how)
    assert cell.wait().status == "error"
    assert "variables" in cell.complaint, "nobody said that they are gone"
    assert kernel.run("1 + 1").ok().result == "2"
    gone = kernel.run("buried")
    assert gone.status == "error" and "buried" in gone.complaint
