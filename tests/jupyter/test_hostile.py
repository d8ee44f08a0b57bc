"""Cells that mean no harm and would do some: what they print, define, start and leave behind."""

import os
import signal
import time

import psutil
import pytest

import driver


def gone(kernel, name):
    return kernel.run(name).status == "error"


# --- what a cell prints


@pytest.mark.parametrize(
    "text",
    ["EVCXR_EXECUTION_COMPLETE", "a line that begins with EVCXR_BEGIN_CONTENT and goes on", "EVCXR_BEGIN_CONTENT "],
)
def test_a_printed_marker_is_text(kernel, text):
    kernel.run("let kept = 7;").ok()
    nap = "std::thread::sleep(std::time::Duration::from_millis(300));"
    cell = kernel.run(f'println!("{text}");\n{nap}\nprintln!("after");').ok()
    assert cell.stdout == f"{text}\nafter\n"
    assert kernel.run('println!("next");').ok().stdout == "next\n"
    assert kernel.run("kept").ok().result == "7"


def test_an_output_that_is_never_closed_costs_no_variable(kernel):
    kernel.run("let kept = 7;").ok()
    kernel.run('println!("EVCXR_BEGIN_CONTENT text/html\\nopen");').ok()
    assert kernel.run("kept").ok().result == "7"


def test_a_question_that_nobody_asked(kernel):
    kernel.run("let kept = 7;").ok()
    kernel.run('println!("EVCXR_INPUT_REQUEST:a word");').ok()
    assert kernel.run("kept").ok().result == "7"


# --- what a cell defines


def test_a_type_with_other_fields_is_another_type(kernel):
    kernel.run("struct Other(u8);\nlet other = Other(1);").ok()
    kernel.run("struct Inner(i32);\nstruct Outer { inner: Inner }").ok()
    kernel.run("let mine = vec![Inner(3)];\nlet outer = Outer { inner: Inner(4) };").ok()
    cell = kernel.run("struct Inner(i64);\nlet mine = vec![Inner(5)];").ok()
    assert "mine" in cell.stderr and "outer" in cell.stderr, cell
    assert kernel.run("mine[0].0").ok().result == "5"
    assert gone(kernel, "outer.inner.0")
    assert kernel.run("other.0").ok().result == "1"


def test_a_type_defined_anew_alike_costs_nothing(kernel):
    kernel.run("struct Same { n: i32 }\nlet same = Same { n: 3 };").ok()
    again = kernel.run("#[derive(Debug)]\nstruct Same {\n    n: i32, // as before\n}").ok()
    assert again.stderr == ""
    assert kernel.run("same").ok().result == "Same { n: 3 }"


def test_a_cell_that_does_not_compile_gives_no_variable_up(kernel):
    kernel.run("struct Firm(i32);\nlet firm = Firm(3);").ok()
    assert kernel.run('struct Firm(i64);\nlet n: i32 = "text";').status == "error"
    assert kernel.run("firm.0").ok().result == "3"


def test_a_late_dependency_costs_no_variable(fresh_kernel, tmp_path):
    (tmp_path / "late/src").mkdir(parents=True)
    (tmp_path / "late/Cargo.toml").write_text('[package]\nname = "late"\nversion = "0.1.0"\nedition = "2021"\n')
    (tmp_path / "late/src/lib.rs").write_text("pub fn late() -> i32 { 5 }\n")
    fresh_kernel.run("struct Mine(i32);\nlet mine = Mine(3);").ok()
    cell = fresh_kernel.run(f':dep late = {{ path = "{tmp_path}/late" }}\nlate::late()').ok()
    assert cell.result == "5" and "lost" not in cell.stderr, cell
    assert fresh_kernel.run("mine.0").ok().result == "3"


def test_a_static_that_changes_is_warned_of(kernel):
    cell = kernel.run("static COUNT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);").ok()
    assert "a static begins anew in each cell" in cell.stderr
    assert kernel.run('static NAME: &str = "x";').ok().stderr == ""


# --- what a cell starts


def sleeping(mark):
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", mark]]


def wait_until(condition, seconds=driver.PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_an_interrupt_reaches_what_a_cell_started(kernel):
    kernel.run("let kept = 7;").ok()
    cell = kernel.submit('let _ = std::process::Command::new("sleep").arg("7801").status()?;')
    wait_until(lambda: sleeping("7801"))
    kernel.ask("interrupt_request", channel="control")
    cell.wait()
    assert not sleeping("7801")
    assert kernel.run("kept").ok().result == "7"


def test_a_killed_cell_leaves_no_orphan(kernel):
    stubborn = 'trap "" INT; sleep 7802'
    cell = kernel.submit(f"let _ = std::process::Command::new(\"sh\").args([\"-c\", {driver_rust(stubborn)}]).status()?;")
    wait_until(lambda: sleeping("7802"))
    kernel.ask("interrupt_request", channel="control")
    time.sleep(1.1)
    kernel.ask("interrupt_request", channel="control")
    assert cell.wait().status == "error"
    wait_until(lambda: not sleeping("7802"))


def driver_rust(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def test_what_a_cell_starts_has_no_input(kernel):
    kernel.run("let kept = 7;").ok()
    kernel.run('let _ = std::process::Command::new("cat").output()?;').ok()
    kernel.run('let _ = std::process::Command::new("cat").status()?;').ok()
    assert kernel.run("kept").ok().result == "7"


def test_a_death_is_noticed_though_a_child_lives_on(kernel):
    cell = kernel.run('std::process::Command::new("sleep").arg("7803").spawn()?;\nstd::process::abort();')
    assert "SIGABRT" in cell.complaint
    for process in sleeping("7803"):
        process.kill()


# --- what becomes of a cell


def test_a_process_that_died_between_two_cells(kernel):
    kernel.run("let buried = 1;").ok()
    worker = kernel.run("std::process::id()").ok().result
    os.kill(int(worker), signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(int(worker)))
    cell = kernel.run("1 + 1")
    assert "SIGKILL" in cell.complaint and "all variables are gone" in cell.complaint, cell
    assert '"died"' not in cell.complaint
    assert kernel.run("1 + 1").ok().result == "2"


def test_quitting_is_for_the_front_end(kernel):
    kernel.run("let kept = 7;").ok()
    cell = kernel.run(":quit")
    assert cell.status == "error" and "restart" in cell.complaint
    assert kernel.run("kept").ok().result == "7"


def test_a_panic_names_its_own_line(kernel):
    cell = kernel.run("let none: Option<i32> = None;\nif false {\n    none.unwrap();\n}\nif true {\n    none.unwrap();\n}")
    assert "line 6" in cell.complaint, cell.complaint
    kernel.run("fn fails(n: Option<i32>) -> i32 {\n    n.unwrap()\n}").ok()
    cell = kernel.run("fails(None)")
    assert "earlier cell: n.unwrap()" in cell.complaint and "src/lib.rs" not in cell.complaint, cell.complaint


def test_a_stack_overflow_is_called_so(kernel):
    cell = kernel.run(
        "fn deep(n: u64) -> u64 {\n    let frame = std::hint::black_box([n; 64]);\n"
        "    if n == 0 { 0 } else { deep(n - 1) + std::hint::black_box(&frame)[(n % 64) as usize] }\n}\ndeep(1 << 40)"
    )
    assert "overflowed its stack" in cell.complaint, cell.complaint
    assert "backtrace" not in cell.complaint.lower() and "not its own" not in cell.complaint


def test_a_segfault_shows_no_backtrace(kernel):
    cell = kernel.run("let zero = std::hint::black_box(8usize) as *const u8;\nunsafe { println!(\"{}\", *zero); }")
    assert "SIGSEGV" in cell.complaint and "evcxr" not in cell.complaint, cell.complaint


@pytest.mark.parametrize("code", ["1 +", "let y =", "foo(", "let x = 1;\nx."])
def test_an_unfinished_cell_is_told_in_its_own_lines(kernel, code):
    cell = kernel.run(code)
    assert cell.status == "error"
    assert code.splitlines()[-1] in cell.complaint and "evcxr" not in cell.complaint, cell.complaint
    assert "catch_unwind" not in cell.complaint and "Ok(())" not in cell.complaint, cell.complaint


@pytest.mark.parametrize("code", ["[" * 5000, "-" * 5000 + "1", "let x: " + "Box<" * 5000])
def test_a_cell_that_nests_without_end(kernel, code):
    """Parsing it used up the stack, and with it the kernel."""
    kernel.run("let kept = 7;").ok()
    assert "nests too deep" in kernel.run(code).complaint
    assert kernel.run("kept").ok().result == "7"


def test_a_byte_order_mark_is_no_code(kernel):
    assert kernel.run("\ufeff1 + 1").ok().result == "2"


def test_a_malformed_cell_is_framed_by_busy_and_idle(kernel):
    message = kernel.kc.session.msg("execute_request", {})
    kernel.kc.shell_channel.send(message)
    msg_id = message["header"]["msg_id"]
    assert kernel.reply_to(msg_id)["status"] == "error"

    def states():
        mine = [m for m in kernel.heard if m["parent_header"].get("msg_id") == msg_id]
        return [m["content"]["execution_state"] for m in mine]

    kernel.pump(lambda: states() == ["busy", "idle"], driver.PATIENCE, lambda: f"busy and idle, not {states()}")


def test_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    with driver.started("qlora-nb", cwd=folder, env={"TMPDIR": str(folder)}) as kernel:
        assert kernel.run("let n = 1;\nn + 1").ok().result == "2"


# --- what a cell sees


def test_what_a_thread_prints_between_two_cells_is_called_so(kernel, tmp_path):
    gate = tmp_path / "gate"
    nap = "std::thread::sleep(std::time::Duration::from_millis(5));"
    wait = f'while !std::path::Path::new("{gate}").exists() {{ {nap} }}'
    kernel.run(f'let _ = std::thread::spawn(|| {{ {wait} println!("late"); std::fs::remove_file("{gate}") }});').ok()
    gate.touch()
    wait_until(lambda: not gate.exists())
    time.sleep(0.3)
    cell = kernel.run('println!("next");').ok()
    assert cell.stdout.endswith("\nlate\nnext\n") and "earlier cell" in cell.stdout


def test_completion_and_inspection_know_the_cells_own_types(kernel):
    kernel.run("/// Mine alone.\nstruct Own { size: u8 }\nimpl Own { fn grown(&self) -> Own { Own { size: 2 } } }").ok()
    kernel.run("use std::collections::BTreeSet as Sorted;\nlet own = Own { size: 1 };").ok()
    samples = {"own.si": "size", "own.grown().gr": "grown", "Own { si": "size", "Own::gr": "grown", "Sort": "Sorted"}
    samples |= {"use std::coll": "collections", "std::fs::read_to": "read_to_string", ":tim": ":timing"}
    for code, match in samples.items():
        reply = kernel.ask("complete_request", {"code": code, "cursor_pos": len(code)})
        assert match in reply["matches"], (code, reply["matches"])
    for name, shown in {"own": "Mine alone.", "Own": "size: u8", "String": "from_utf8", "println": "stdout"}.items():
        reply = kernel.ask("inspect_request", {"code": name, "cursor_pos": len(name), "detail_level": 0})
        assert shown in reply["data"].get("text/plain", ""), (name, reply)


@pytest.mark.parametrize("code", ["%%time\n1 + 1", "?x"])
def test_who_types_what_ipython_knows_is_told_of_the_commands(kernel, code):
    assert ":timing" in kernel.run(code).complaint


def test_help_is_one_line(kernel):
    assert "`push` with a similar name: `push`" in kernel.run("let v = vec![1];\nv.psh(2);").complaint
