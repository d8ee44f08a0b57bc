"""Latency, speed and memory of the kernel, ours and stock evcxr_jupyter's, in one run. Wants a quiet machine.

    python scripts/bench_kernel.py [--repeats 5] [--cells 500] [--quick] [--stock EVCXR_JUPYTER] [--dep]

The stock kernel gets our dylib, by EVCXR_CONFIG_DIR and LD_LIBRARY_PATH, and so none of the minutes that compiling
the library takes; `--dep` shows those, too. Its rust-analyzer knows nothing of a dylib, so there each `let` names its
type, which ours finds out. Without an evcxr_jupyter on PATH (`cargo install evcxr_jupyter`) ours is
measured alone. Numbers are medians, with the smallest and the largest behind them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests/jupyter"))
import driver  # noqa: E402

FIRST = 'use qlora_nb::prelude::*;\nprintln!("{}", DType::F32.size_in_bytes());'
FIRST_LET = "let ones = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;"
NOTEBOOKS = REPOSITORY / "notebooks"
WARM = [
    f'let ds = Dataset::load_from_disk("{NOTEBOOKS}/data/poems_zh")?;\nds',
    'println!("{}", ds.slice(0..1));',
    f'let tokenizer = AutoTokenizer::from_pretrained("{NOTEBOOKS}/models/poet-bloom-zh")?;\ntokenizer',
    """fn process(tok: &Tokenizer, ex: &Example) -> Result<Features> {
    let prompt = tok.encode(&format!("Human: {}\\n\\nAssistant: ", ex.text("instruction")?))?;
    let answer = tok.encode(&format!("{}{}", ex.text("output")?, tok.eos_token()))?;
    Ok(Features::supervised(&prompt, &answer, 256))
}""",
    "let rows = ds.map(|ex| process(&tokenizer, ex))?;\nrows",
    f'let base = AutoModelForCausalLM::from_pretrained("{NOTEBOOKS}/models/poet-bloom-zh", ModelOptions::default())?;',
    """for (name, parameter) in base.named_parameters() {
    println!("{name} {}", parameter.dtype());
}""",
    """let config = LoraConfig { r: 8, target_modules: ["query_key_value"].into(), ..Default::default() };
println!("{config}");""",
    "let model = get_peft_model(&base, &config)?;",
    "model.print_trainable_parameters();",
]

#: The variables that cells keep.
TYPES = {"ones": "Tensor", "ds": "Dataset", "tokenizer": "Tokenizer", "rows": "Dataset", "base": "Model"}
TYPES |= {"config": "LoraConfig", "model": "PeftModel"}

# The same function in a cell and in a program: floating point in loops that vectorize, integers in ones that do not.
ARITHMETIC = """fn work() -> f64 {
    let n = 192;
    let a: Vec<f64> = (0..n * n).map(|i| (i % 7) as f64 * 0.5).collect();
    let mut c = vec![0.0; n * n];
    let mut state = 1u64;
    for _ in 0..20 {
        for i in 0..n {
            for k in 0..n {
                for j in 0..n {
                    c[i * n + j] += a[i * n + k] * a[k * n + j];
                }
            }
        }
        for _ in 0..2_000_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
    }
    c.iter().sum::<f64>() + (state % 2) as f64
}"""
TIMED = """{
    let begin = std::time::Instant::now();
    let result = std::hint::black_box(work());
    println!("{} {result}", begin.elapsed().as_secs_f64());
}"""


class Subject:
    """A kernel to be measured."""

    def __init__(self, name, kernelspec, first=FIRST, infers=True):
        self.name, self.kernelspec, self.first, self.infers = name, kernelspec, first, infers

    def start(self, cwd):
        return driver.started(self.kernelspec, cwd=cwd)

    def cell(self, code):
        """The cell, with types where the kernel does not find them."""
        if not self.infers:
            for name, of_type in TYPES.items():
                code = code.replace(f"let {name} =", f"let {name}: {of_type} =")
        return code

    @property
    def is_slow(self):
        return self.first != FIRST


def timed(kernel, code, timeout=900):
    """Seconds from sending a cell to its reply and its last output."""
    begin = time.perf_counter()
    kernel.run(code, timeout=timeout).ok()
    return time.perf_counter() - begin


def resident_mb(kernel):
    """Of the kernel's process and all beneath it; pages that they share are counted once for each."""
    return sum(process.memory_info().rss for process in kernel.processes()) / 1e6


def spread(values, unit, digits=2):
    values = sorted(values)
    middle = statistics.median(values)
    return f"{middle:.{digits}f} {unit} ({values[0]:.{digits}f} to {values[-1]:.{digits}f}, n={len(values)})"


def report(subject, what, text):
    print(f"{subject.name:<24} {what:<34} {text}", flush=True)


def latencies(subject, repeats, folder):
    rows = {name: [] for name in ("kernel ready", "first cell", "start to first result", "first let", "warm cell")}
    memory, each = [], {code: [] for code in WARM}
    for _ in range(repeats):
        begin = time.perf_counter()
        with subject.start(folder) as kernel:
            rows["kernel ready"].append(time.perf_counter() - begin)
            rows["first cell"].append(timed(kernel, subject.first))
            # A kernel may say that it is ready and go on starting: the sum of the two is what the user waits.
            rows["start to first result"].append(time.perf_counter() - begin)
            memory.append(resident_mb(kernel))
            rows["first let"].append(timed(kernel, subject.cell(FIRST_LET)))
            for code in WARM:
                each[code].append(timed(kernel, subject.cell(code)))
    rows["warm cell"] = [seconds for values in each.values() for seconds in values]
    for name, values in rows.items():
        report(subject, name, spread(values, "s"))
    slowest = max(each, key=lambda code: statistics.median(each[code]))
    report(subject, "slowest warm cell", f"{spread(each[slowest], 's')}: {slowest.splitlines()[0][:60]}")
    report(subject, "memory after the first cell", spread(memory, "MB", 0))


def in_cell(subject, repeats, folder):
    """Seconds of the arithmetic, measured within the cell."""
    with subject.start(folder) as kernel:
        kernel.run(ARITHMETIC).ok()
        return [float(kernel.run(TIMED).ok().stdout.split()[0]) for _ in range(repeats)]


def in_program(repeats, folder):
    """The same by `cargo run --release`."""
    project = Path(folder) / "arithmetic"
    (project / "src").mkdir(parents=True)
    (project / "Cargo.toml").write_text('[package]\nname = "arithmetic"\nedition = "2024"\n[workspace]\n')
    (project / "src/main.rs").write_text(f"{ARITHMETIC}\nfn main() {TIMED}\n")
    env = {name: value for name, value in os.environ.items() if name not in ("CARGO_TARGET_DIR", "RUSTFLAGS")}
    run = ["cargo", "run", "--release", "--quiet", "--offline"]
    outputs = [
        subprocess.run(run, cwd=project, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
        for _ in range(repeats)
    ]
    return [float(output.split()[0]) for output in outputs]


def long_session(subject, cells, folder):
    """One session of many cells: does a cell take longer, does memory grow?"""
    edge = max(1, min(50, cells // 2))
    with subject.start(folder) as kernel:
        kernel.run(subject.first).ok()
        kernel.run("let mut sum = 0u64;").ok()
        seconds, before = [], None
        for n in range(cells):
            seconds.append(timed(kernel, f"let step_{n % 10} = {n}u64;\nsum += step_{n % 10};\nsum"))
            if n == edge - 1:
                before = resident_mb(kernel)
        after = resident_mb(kernel)
    first, last = statistics.median(seconds[:edge]), statistics.median(seconds[-edge:])
    report(subject, f"first {edge} of {cells} cells", spread(seconds[:edge], "s"))
    report(subject, f"last {edge} of {cells} cells", spread(seconds[-edge:], "s"))
    report(subject, "growth over the session", f"{last / first - 1:+.0%} time, {after - before:+.0f} MB")


def ours(prefix, share):
    source = prefix / "share/jupyter/kernels/qlora-nb"
    if not source.exists():
        sys.exit(f"no kernelspec at {source}\nremedy: qlora-nb install --prefix {prefix}")
    shutil.copytree(source, share / "kernels/qlora-nb")
    return Subject("qlora-nb", "qlora-nb")


def stock(executable, share, name, kernelspec, env, **options):
    folder = share / "kernels" / kernelspec
    folder.mkdir(parents=True)
    argv = [executable, "--control_file", "{connection_file}"]
    spec = {"argv": argv, "display_name": name, "language": "rust", "env": env}
    (folder / "kernel.json").write_text(json.dumps(spec))
    return Subject(name, kernelspec, **options)


def subjects(options, share):
    prefix = Path(options.prefix).resolve()
    found = [ours(prefix, share)]
    executable = shutil.which(options.stock or "evcxr_jupyter")
    if not executable:
        print("no evcxr_jupyter: nothing to compare with (cargo install evcxr_jupyter; or --stock PATH)")
        return found
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True).stdout.strip()
    libraries = os.pathsep.join(filter(None, [f"{prefix}/lib", f"{sysroot}/lib", os.environ.get("LD_LIBRARY_PATH")]))
    env = {"EVCXR_CONFIG_DIR": f"{prefix}/evcxr", "LD_LIBRARY_PATH": libraries}
    found.append(stock(executable, share, "evcxr with our dylib", "stock-dylib", env, infers=False))
    if options.dep:
        empty = share / "no-config"
        empty.mkdir()
        first = f':dep qlora-nb = {{ path = "{REPOSITORY}/crate" }}\n{FIRST}'
        env = {"EVCXR_CONFIG_DIR": str(empty)}
        found.append(stock(executable, share, "evcxr with :dep", "stock-dep", env, first=first))
    return found


def main():
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default=os.environ.get("QLORA_NB_PREFIX") or data / "qlora-nb")
    parser.add_argument("--repeats", type=int, default=5, help="kernels that are started, and runs of the arithmetic")
    parser.add_argument("--cells", type=int, default=500, help="cells of the long session; 0 leaves it out")
    parser.add_argument("--stock", help="an evcxr_jupyter that is not on PATH")
    parser.add_argument("--dep", action="store_true", help="also stock evcxr with `:dep`, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="2 repeats, 40 cells")
    options = parser.parse_args()
    repeats, cells = (2, 40) if options.quick else (options.repeats, options.cells)
    with tempfile.TemporaryDirectory() as folder:
        share = Path(folder) / "share"
        os.environ["JUPYTER_PATH"] = str(share)
        os.environ["QLORA_NB_PREFIX"] = str(Path(options.prefix).resolve())
        found = subjects(options, share)
        for subject in found:
            latencies(subject, 1 if subject.is_slow else repeats, folder)
        program = in_program(repeats, folder)
        print(f"{'cargo run --release':<24} {'arithmetic':<34} {spread(program, 's', 3)}")
        for subject in found:
            cell = in_cell(subject, repeats, folder)
            ratio = statistics.median(cell) / statistics.median(program)
            report(subject, "arithmetic", f"{spread(cell, 's', 3)}, {ratio:.2f} times the program's")
        for subject in found:
            if cells:
                long_session(subject, cells, folder)


if __name__ == "__main__":
    main()
