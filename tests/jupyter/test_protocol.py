"""What the conformance suite does not look at: failures, streams, displays, control, and what front ends do at once."""

import json
import os
import signal
import socket
from datetime import datetime

import psutil
import pytest
import zmq

import driver

STRUCTURED = "EVCXR_QLORA_NB "


def display(operation):
    """Rust: a line of the protocol in which the library tells the kernel what to show."""
    return say(STRUCTURED + json.dumps(operation))


def say(line):
    """Rust: prints the line."""
    return f'println!("{{}}", {rust(line)});'


def rust(text):
    """A Rust string literal."""
    return json.dumps(text, ensure_ascii=False)


# Every way in which a cell fails and its process lives on, with what the user must be able to read.
FAILURES = {
    "panic": ('panic!("on purpose {}", 7);', "on purpose 7"),
    "assert": ("assert_eq!(1 + 1, 3);", "left: 2"),
    "question mark": ('let n: i32 = "seven".parse()?;', "invalid digit"),
    "own error": ('Err::<(), _>(std::io::Error::other("the disk is on fire"))?;', "the disk is on fire"),
    "library error": ('qlora_nb::prelude::Dataset::load_from_disk("nowhere")?', "nowhere"),
    "compile error": ('let n: i32 = "text";', "mismatched types"),
    "syntax error": ("let n = = 1;", "expected expression"),
}
DEATHS = {
    "abort": "std::process::abort();",
    "exit": "std::process::exit(3);",
    "exit 0": "std::process::exit(0);",
    "stack overflow": """fn deep(n: u64) -> u64 {
    let frame = std::hint::black_box([n; 64]);
    if n == 0 { 0 } else { deep(n - 1) + std::hint::black_box(&frame)[(n % 64) as usize] }
}
deep(1 << 40)""",
}


# --- requests and replies


def test_kernel_info(kernel):
    info = kernel.ask("kernel_info_request")
    assert info["status"] == "ok"
    assert info["protocol_version"].startswith("5.")
    assert info["implementation"] == "qlora-nb"
    assert info["implementation_version"] and info["banner"]
    language = info["language_info"]
    assert language["name"] == "rust" and language["file_extension"] == ".rs"
    assert language["mimetype"] and language["version"][0].isdigit()
    assert isinstance(info.get("help_links", []), list)


def test_every_request_is_framed_by_busy_and_idle(kernel):
    message = kernel.kc.session.msg("kernel_info_request", {})
    kernel.kc.shell_channel.send(message)
    msg_id = message["header"]["msg_id"]

    def states():
        mine = [m for m in kernel.heard if m["parent_header"].get("msg_id") == msg_id]
        return [m["content"]["execution_state"] for m in mine]

    kernel.pump(lambda: states() == ["busy", "idle"], driver.PATIENCE, lambda: f"busy and idle, not {states()}")
    assert kernel.reply_to(msg_id)["status"] == "ok"


def test_a_cell_is_echoed_counted_and_framed(kernel):
    first = kernel.run("1").ok()
    second = kernel.run("2").ok()
    counts = [cell.reply["content"]["execution_count"] for cell in (first, second)]
    assert counts[1] == counts[0] + 1
    assert second.of_type("execute_input") == [{"code": "2", "execution_count": counts[1]}]
    assert second.of_type("execute_result")[0]["execution_count"] == counts[1]
    assert second.states == ["busy", "idle"]
    assert second.messages[0]["content"] == {"execution_state": "busy"}
    assert second.messages[-1]["content"] == {"execution_state": "idle"}


def test_an_empty_cell_is_fine(kernel):
    for code in ("", "  \n", "// nothing\n"):
        assert kernel.run(code).ok().outputs == []


def test_text_of_every_script(kernel):
    text = '床前明月光 "quoted" \\ back 🦀 é\ttab'
    assert kernel.run(say(text)).ok().stdout == text + "\n"


def test_silent_leaves_no_trace(kernel):
    before = kernel.run("0").reply["content"]["execution_count"]
    silent = kernel.run("let quiet = 5; quiet + 1", silent=True).ok()
    assert not silent.of_type("execute_input", "execute_result")
    after = kernel.run("quiet").ok()
    assert after.result == "5"
    assert after.reply["content"]["execution_count"] == before + 1
    assert not any("quiet + 1" in entry[2] for entry in tail(kernel))


def test_store_history_off(kernel):
    before = kernel.run("0").reply["content"]["execution_count"]
    assert kernel.run("100 + 11", store_history=False).ok().result == "111"
    assert kernel.run("0").reply["content"]["execution_count"] == before + 1
    assert not any("100 + 11" in entry[2] for entry in tail(kernel))


def tail(kernel, n=20):
    request = {"hist_access_type": "tail", "n": n, "output": False, "raw": True}
    return kernel.ask("history_request", request)["history"]


def test_history(kernel):
    codes = ["let history_a = 1;", "history_a + 1", "history_a + 2"]
    for code in codes:
        kernel.run(code).ok()
    entries = tail(kernel, 3)
    assert [entry[2] for entry in entries] == codes
    session, line, _ = entries[0]
    request = {"hist_access_type": "range", "session": 0, "start": line, "stop": line + 2, "output": False, "raw": True}
    assert [entry[2] for entry in kernel.ask("history_request", request)["history"]] == codes[:2]
    assert kernel.ask("history_request", request | {"session": session})["history"]
    search = {"hist_access_type": "search", "pattern": "history_a + ?", "output": False, "raw": True, "n": 10}
    assert [entry[2] for entry in kernel.ask("history_request", search)["history"]][-2:] == codes[1:]


def test_user_expressions(kernel):
    expressions = {"sum": "before + 1", "bad": "no_such_thing"}
    cell = kernel.run("let before = 41;", user_expressions=expressions).ok()
    values = cell.reply["content"]["user_expressions"]
    assert values["sum"]["status"] == "ok" and values["sum"]["data"]["text/plain"] == "42"
    assert values["bad"]["status"] == "error" and values["bad"]["evalue"]


def test_is_complete_tells_the_indentation(kernel):
    reply = kernel.ask("is_complete_request", {"code": "fn f() {"})
    assert reply["status"] == "incomplete" and reply["indent"].strip() == ""
    assert kernel.ask("is_complete_request", {"code": "1 + 1"})["status"] == "complete"


def complete(kernel, code, cursor=None):
    cursor = len(code) if cursor is None else cursor
    return kernel.ask("complete_request", {"code": code, "cursor_pos": cursor})


def test_completion_replaces_what_was_typed(kernel):
    kernel.run("let completed_variable = 1;").ok()
    code = "let other = completed_va + 1;"
    cursor = code.index(" + 1")
    reply = complete(kernel, code, cursor)
    assert "completed_variable" in reply["matches"]
    start, end = reply["cursor_start"], reply["cursor_end"]
    assert code[:start] + "completed_variable" + code[end:] == "let other = completed_variable + 1;"


def test_completion_counts_in_characters(kernel):
    kernel.run("let completed_variable = 1;").ok()
    code = 'let 诗 = "🦀月"; completed_va'
    reply = complete(kernel, code)
    assert "completed_variable" in reply["matches"]
    assert code[reply["cursor_start"] : reply["cursor_end"]] == "completed_va"


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("qlora_nb::prelude::Data", "Dataset"),
        ("TrainingArguments { output_d", "output_dir"),
        ("AutoTokenizer::from_pre", "from_pretrained"),
    ],
)
def test_completion_knows_the_library(kernel, code, match):
    kernel.run("use qlora_nb::prelude::*;").ok()
    matches = complete(kernel, code)["matches"]
    assert any(m.rstrip("()").startswith(match) for m in matches), matches


@pytest.mark.parametrize("code", ["", "fn f( {", '"', "}}}}", "诗"])
def test_completion_of_nonsense_is_an_answer(kernel, code):
    assert complete(kernel, code)["status"] == "ok"


def test_inspection(kernel):
    kernel.run("let inspected: Vec<u16> = vec![1, 2];").ok()
    code = "inspected.len()"
    reply = kernel.ask("inspect_request", {"code": code, "cursor_pos": 3, "detail_level": 0})
    assert reply["found"] and "Vec<u16>" in reply["data"]["text/plain"]
    unknown = kernel.ask("inspect_request", {"code": "nobody_knows", "cursor_pos": 4, "detail_level": 0})
    assert unknown["status"] == "ok" and not unknown["found"]


def test_comms(kernel):
    assert kernel.ask("comm_info_request") == {"status": "ok", "comms": {}}
    assert kernel.ask("comm_info_request", {"target_name": "jupyter.widget"})["comms"] == {}
    # Nobody here is called so; the front end learns it by a close, or the message is ignored.
    opened = {"comm_id": "c1", "target_name": "nobody", "data": {}}
    kernel.kc.shell_channel.send(kernel.kc.session.msg("comm_open", opened))
    kernel.kc.shell_channel.send(kernel.kc.session.msg("comm_msg", {"comm_id": "c1", "data": {}}))
    kernel.kc.shell_channel.send(kernel.kc.session.msg("comm_close", {"comm_id": "c1", "data": {}}))
    assert kernel.run("1").ok().result == "1"


# --- failures


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_an_error_and_costs_no_variable(kernel, name):
    code, message = FAILURES[name]
    kernel.run("let kept = vec![1, 2, 3];").ok()
    cell = kernel.run(code)
    assert cell.status == "error"
    assert cell.reply["content"]["ename"]
    assert message in cell.complaint
    errors = cell.of_type("error")
    assert len(errors) == 1, cell
    assert [errors[0][key] for key in ("ename", "evalue", "traceback")] == [
        cell.reply["content"][key] for key in ("ename", "evalue", "traceback")
    ]
    assert kernel.run("kept").ok().result == "[1, 2, 3]"


def test_compile_errors_are_the_compilers_own(kernel):
    cell = kernel.run('let good = 1;\nlet n: i32 = "text";')
    assert "E0308" in cell.traceback and "^^^" in cell.traceback
    assert 'let n: i32 = "text";' in driver.plain(cell.traceback)
    assert "\x1b[" in cell.traceback, "no colours"


def test_what_a_failed_cell_printed_is_kept(kernel):
    cell = kernel.run('println!("so far");\nprint!("half a line");\npanic!("on purpose");')
    assert cell.stdout == "so far\nhalf a line"
    types = [m["msg_type"] for m in cell.outputs]
    assert types[-1] == "error" and "stream" in types


def test_a_consumed_variable_is_named(kernel):
    kernel.run('let consumed = String::from("a");\nlet stays = String::from("b");').ok()
    cell = kernel.run('drop(consumed);\npanic!("on purpose");')
    assert cell.status == "error"
    assert "consumed" in cell.complaint.replace("drop(consumed)", "")
    assert kernel.run("stays").ok().result == '"b"'


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_aborts_what_is_queued(kernel, name):
    cells = [kernel.submit(code) for code in (FAILURES[name][0], 'println!("second");', 'println!("third");')]
    for cell in cells:
        cell.wait()
    assert [cell.status for cell in cells] == ["error", "aborted", "aborted"]
    assert [cell.stdout for cell in cells[1:]] == ["", ""]
    assert kernel.run('println!("later");').ok().stdout == "later\n"


def test_stop_on_error_off(kernel):
    cells = [kernel.submit("assert!(false);", stop_on_error=False), kernel.submit('println!("second");')]
    assert [cell.wait().status for cell in cells] == ["error", "ok"]
    assert cells[1].stdout == "second\n"


@pytest.mark.parametrize("name", DEATHS)
def test_the_death_of_the_process_is_an_error(kernel, name):
    kernel.run("let buried = 1;").ok()
    cells = [kernel.submit(DEATHS[name]), kernel.submit('println!("second");')]
    assert [cell.wait().status for cell in cells] == ["error", "aborted"]
    assert "variables" in cells[0].complaint, "nobody said that they are gone"
    assert kernel.run("1 + 1").ok().result == "2"
    gone = kernel.run("buried")
    assert gone.status == "error" and "buried" in gone.complaint


# --- streams


@pytest.mark.parametrize(
    "code",
    [
        'println!("before");',
        'eprintln!("before");',
        'print!("before");',
        'eprint!("before");',
        'print!("before"); std::io::Write::flush(&mut std::io::stdout())?;',
    ],
)
def test_streams_are_live(kernel, gate, code):
    cell = kernel.submit(f'{code}\n{gate.wait}\nprintln!(" after");')
    cell.wait_for(lambda cell: "before" in cell.stdout + cell.stderr, "text, while it is busy,")
    assert not cell.idle and cell.reply is None
    gate.open()
    cell.wait().ok()
    assert "after" in cell.stdout and (cell.stdout + cell.stderr).count("before") == 1


def test_a_last_line_without_a_newline(kernel):
    assert kernel.run('print!("no newline");').ok().stdout == "no newline"
    assert kernel.run('print!("a"); 1 + 1').ok().result == "2"


def test_much_text(kernel):
    cell = kernel.run('for n in 0..20000 { println!("line {n} {}", "x".repeat(40)); }').ok()
    assert cell.stdout.splitlines() == [f"line {n} {'x' * 40}" for n in range(20000)]


def test_one_long_line(kernel):
    assert kernel.run('println!("{}", "y".repeat(3_000_000));').ok().stdout == "y" * 3_000_000 + "\n"


def test_bytes_that_are_no_text(kernel):
    code = 'use std::io::Write;\nstd::io::stdout().write_all(b"a\\xff\\xfeb\\n")?;'
    assert kernel.run(code).ok().stdout.startswith("a")
    assert kernel.run("1").ok().result == "1"


def test_streams_keep_their_order(kernel):
    code = 'for n in 0..3 { println!("out {n}"); eprintln!("err {n}"); }'
    cell = kernel.run(code).ok()
    assert cell.stdout == "out 0\nout 1\nout 2\n" and cell.stderr == "err 0\nerr 1\nerr 2\n"


# --- displays


def test_several_forms_are_one_output(kernel):
    cell = kernel.run('qlora_nb::display::Html::new("<b>1</b>", "1").evcxr_display();').ok()
    assert [c["data"] for c in cell.of_type("display_data")] == [{"text/html": "<b>1</b>", "text/plain": "1"}]


def test_a_display_is_updated_while_the_cell_is_busy(kernel, gate):
    def show(op, text):
        return display({"op": op, "id": "bar-1", "data": {"text/plain": text}, "metadata": {"k": {"v": 1}}})

    code = "\n".join([show("display", "10%"), show("update", "20%"), gate.wait, show("update", "100%")])
    cell = kernel.submit(code)
    cell.wait_for(lambda cell: len(cell.of_type("update_display_data")) == 1, "an update, while it is busy,")
    assert not cell.idle
    gate.open()
    cell.wait().ok()
    shown = cell.of_type("display_data", "update_display_data")
    assert [c["data"]["text/plain"] for c in shown] == ["10%", "20%", "100%"]
    assert len({c["transient"]["display_id"] for c in shown}) == 1
    assert all(c["metadata"] == {"k": {"v": 1}} for c in shown)
    assert STRUCTURED.strip() not in cell.stdout


def test_a_later_cell_updates_a_display(kernel):
    kernel.run(display({"op": "display", "id": "across", "data": {"text/plain": "old"}, "metadata": {}})).ok()
    later = kernel.run(display({"op": "update", "id": "across", "data": {"text/plain": "new"}, "metadata": {}})).ok()
    assert later.of_type("update_display_data")[0]["data"] == {"text/plain": "new"}


def test_a_display_without_an_id(kernel):
    cell = kernel.run(display({"op": "display", "data": {"text/plain": "plain"}, "metadata": {}})).ok()
    assert cell.of_type("display_data")[0]["data"] == {"text/plain": "plain"}


@pytest.mark.parametrize("wait", [True, False])
def test_clear(kernel, wait):
    cell = kernel.run('println!("old");\n' + display({"op": "clear", "wait": wait}) + '\nprintln!("new");').ok()
    assert cell.of_type("clear_output") == [{"wait": wait}]
    assert [m["msg_type"] for m in cell.outputs] == ["stream", "clear_output", "stream"]


@pytest.mark.parametrize("line", [STRUCTURED + "{", STRUCTURED + "[]", STRUCTURED + '{"op":"dance"}', STRUCTURED])
def test_a_damaged_display_line_harms_nobody(kernel, line):
    kernel.run(say(line)).ok()
    assert kernel.run("1").ok().result == "1"


# --- input


ASK = """let mut typed = String::new();
println!("EVCXR_INPUT_REQUEST:your name? ");
std::io::stdin().read_line(&mut typed)?;
println!("hello {}", typed.trim_end_matches('\\n'));"""


@pytest.mark.parametrize("name", ["Li Bai", "李白", ""])
def test_input(kernel, name):
    cell = kernel.submit(ASK, allow_stdin=True)
    cell.wait_for(lambda cell: cell.input_requests, "a request for input")
    assert cell.input_requests[0]["content"] == {"prompt": "your name? ", "password": False}
    kernel.answer(cell, name)
    assert cell.wait().ok().stdout == f"hello {name}\n"


def test_a_password_is_asked_for_as_one(kernel):
    cell = kernel.submit(ASK.replace("REQUEST:your name", "REQUEST_PASSWORD:the word"), allow_stdin=True)
    cell.wait_for(lambda cell: cell.input_requests, "a request for input")
    assert cell.input_requests[0]["content"] == {"prompt": "the word? ", "password": True}
    kernel.answer(cell, "sesame")
    assert cell.wait().ok().stdout == "hello sesame\n"


def test_input_through_the_library(kernel):
    cell = kernel.submit('let name = qlora_nb::display::input("name? ")?;\nname', allow_stdin=True)
    cell.wait_for(lambda cell: cell.input_requests, "a request for input")
    assert cell.input_requests[0]["content"]["prompt"] == "name? "
    kernel.answer(cell, "Du Fu")
    assert cell.wait().ok().result == '"Du Fu"'


def test_reading_as_any_program_does_asks(kernel):
    """A cell that never heard of input requests: the kernel sees it wait."""
    read = "let mut line = String::new();\nlet _ = std::io::stdin().read_line(&mut line);\nline"
    cell = kernel.submit(read, allow_stdin=True)
    cell.wait_for(lambda cell: cell.input_requests, "a request for input")
    kernel.answer(cell, "Li Bai")
    assert cell.wait().ok().result == '"Li Bai\\n"'
    assert kernel.run(read, allow_stdin=False).ok().result == '"\\n"'


def test_input_where_nobody_can_type(kernel):
    """A front end without stdin: the cell ends, well or badly, and does not wait for ever."""
    cell = kernel.run(ASK, allow_stdin=False)
    assert not cell.input_requests
    assert kernel.run("1 + 1").ok().result == "2"


# --- interrupts; the random ones have a file of their own


# What the library's long calls do, without a model.
COOPERATIVE = """let _guard = qlora_nb::interrupt::Guard::new()?;
println!("busy");
while !qlora_nb::interrupt::requested() { std::thread::sleep(std::time::Duration::from_millis(5)); }
println!("stopped");"""


def interrupt(kernel, how):
    if how == "message":
        assert kernel.ask("interrupt_request", channel="control")["status"] == "ok"
    elif how == "signal":
        os.kill(kernel.manager.provisioner.pid, signal.SIGINT)
    elif how == "signal to the group":
        os.killpg(os.getpgid(kernel.manager.provisioner.pid), signal.SIGINT)
    else:
        kernel.manager.interrupt_kernel()


@pytest.mark.parametrize("how", ["message", "signal", "signal to the group", "as the kernelspec says"])
def test_one_interrupt_stops_a_long_call_and_costs_nothing(kernel, how):
    kernel.run("let before = vec![1];").ok()
    cell = kernel.submit("{\n" + COOPERATIVE + "\n}")
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    interrupt(kernel, how)
    assert cell.wait().ok().stdout == "busy\nstopped\n"
    assert kernel.run("before").ok().result == "[1]"


@pytest.mark.parametrize("how", ["message", "signal"])
def test_an_interrupt_of_nothing_is_forgotten(kernel, how, gate):
    kernel.run("let before = vec![1];").ok()
    interrupt(kernel, how)
    kernel.ask("kernel_info_request")
    cell = kernel.submit(
        "{ let _guard = qlora_nb::interrupt::Guard::new()?;\n"
        f'println!("busy"); {gate.wait}\nprintln!("{{}}", qlora_nb::interrupt::requested()); }}'
    )
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    gate.open()
    assert cell.wait().ok().stdout == "busy\nfalse\n"
    assert kernel.run("before").ok().result == "[1]"


def test_an_interrupt_aborts_what_is_queued(kernel):
    """Who stops one cell of "run all" does not want the rest, though the cell itself ended well."""
    cells = [kernel.submit("{" + COOPERATIVE + "}"), kernel.submit('println!("second");')]
    cells[0].wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    interrupt(kernel, "message")
    assert [cell.wait().status for cell in cells] == ["ok", "aborted"]


def test_a_request_for_input_can_be_interrupted(kernel):
    cell = kernel.submit(ASK, allow_stdin=True)
    cell.wait_for(lambda cell: cell.input_requests, "a request for input")
    interrupt(kernel, "message")
    # The first is a request, which code that waits for a line cannot see; the second ends it.
    if not ended(kernel, cell):
        interrupt(kernel, "message")
    cell.wait()
    assert kernel.run("1 + 1").ok().result == "2"


def ended(kernel, cell, seconds=3):
    try:
        cell.wait(seconds)
    except TimeoutError:
        return False
    return True


# --- control, several clients, transport


def test_control_answers_while_a_cell_is_busy(kernel, gate):
    cell = kernel.submit(f'println!("busy");\n{gate.wait}')
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    assert kernel.ask("kernel_info_request", channel="control")["status"] == "ok"
    assert not cell.done
    gate.open()
    cell.wait().ok()


def test_cells_sent_at_once_run_in_order(kernel):
    kernel.run("let mut order = Vec::<i32>::new();").ok()
    cells = [kernel.submit(f"order.push({n});") for n in range(5)]
    for cell in cells:
        cell.wait().ok()
    counts = [cell.reply["content"]["execution_count"] for cell in cells]
    assert counts == list(range(counts[0], counts[0] + 5))
    assert kernel.run("order").ok().result == "[0, 1, 2, 3, 4]"


def test_two_clients(kernel, gate):
    other = driver.Client(kernel.manager.connection_file)
    try:
        other.wait_for_ready()
        mine = kernel.submit(f'println!("mine");\nlet shared = 7;\n{gate.wait}')
        mine.wait_for(lambda cell: "mine" in cell.stdout, "its first line")
        theirs = other.submit("shared * 6")
        gate.open()
        assert theirs.wait().ok().result == "42"
        mine.wait().ok()
        # Each hears what the other's cell shows, under the other's name; replies go to who asked.
        kernel.pump(lambda: heard(kernel, theirs), driver.PATIENCE, lambda: "the other's output")
        other.pump(lambda: heard(other, mine), driver.PATIENCE, lambda: "my output")
        assert mine.msg_id not in other.replies and theirs.msg_id not in kernel.replies
    finally:
        other.close()


def heard(client, cell):
    mine = [m for m in client.heard if m["parent_header"].get("msg_id") == cell.msg_id]
    return any(m["msg_type"] in ("stream", "execute_result") for m in mine)


def test_heartbeat(kernel, gate):
    cell = kernel.submit(f'println!("busy");\n{gate.wait}')
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    info = kernel.manager.get_connection_info()
    with zmq.Context() as context, context.socket(zmq.REQ) as heart:
        heart.linger = 0
        heart.connect(f"{info['transport']}://{info['ip']}:{info['hb_port']}")
        for beat in (b"ping", b"", b"\x00\xff"):
            heart.send(beat)
            assert heart.poll(driver.PATIENCE * 1000), "no heartbeat while a cell is busy"
            assert heart.recv() == beat
    gate.open()
    cell.wait().ok()


def malformed(session):
    """Messages that a kernel must not act on, by what is wrong with them."""
    message = session.msg("execute_request", {"code": 'println!("must not run");', "silent": False})
    good = session.serialize(message)  # delimiter, signature, header, parent, metadata, content
    yield "wrong signature", [good[0], b"0" * 64, *good[2:]]
    yield "no signature", [good[0], b"", *good[2:]]
    yield "changed content", [*good[:5], good[5].replace(b"must", b"does")]
    yield "too few frames", good[:3]
    yield "no delimiter", [b"hello"]
    yield "nothing", [b""]
    for what, frames in {"no JSON": [b"{"] * 4, "another type": [b"[]"] * 4, "empty": [b"{}"] * 4}.items():
        yield what, [good[0], session.sign(frames), *frames]
    unknown = session.msg("dance_request", {"style": "waltz"})
    yield "unknown request", session.serialize(unknown)
    empty = session.msg("execute_request", {})
    yield "no code", session.serialize(empty)


@pytest.mark.parametrize("channel", ["shell", "control"])
def test_malformed_messages_are_ignored(kernel, channel):
    socket = getattr(kernel.kc, f"{channel}_channel").socket
    for _what, frames in malformed(kernel.kc.session):
        socket.send_multipart(frames)
    assert kernel.run('println!("still here");').ok().stdout == "still here\n"
    assert kernel.ask("kernel_info_request", channel="control")["status"] == "ok"
    texts = [m["content"]["text"] for m in kernel.heard if m["msg_type"] == "stream"]
    assert not any("must not run" in text for text in texts)


def test_bytes_that_are_no_zmq(kernel):
    """A port scanner."""
    info = kernel.manager.get_connection_info()
    for name in ("shell_port", "iopub_port", "control_port", "stdin_port", "hb_port"):
        with socket.create_connection((info["ip"], info[name])) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert kernel.run("1").ok().result == "1"
    assert kernel.ask("kernel_info_request", channel="control")["status"] == "ok"


# --- the end


def all_gone(processes, seconds=30):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("busy", [False, True])
def test_shutdown_leaves_no_process(fresh_kernel, busy):
    fresh_kernel.run("let a = 1;").ok()
    if busy:
        cell = fresh_kernel.submit('println!("busy"); loop { std::hint::spin_loop(); }')
        cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    processes = fresh_kernel.processes()
    assert len(processes) >= 2, "the cells should have a process of their own"
    reply = fresh_kernel.ask("shutdown_request", {"restart": False}, channel="control")
    assert reply == {"status": "ok", "restart": False}
    fresh_kernel.manager.provisioner.process.wait(60)
    assert not all_gone(processes)


def test_a_killed_kernel_leaves_no_process(fresh_kernel):
    cell = fresh_kernel.submit('println!("busy"); loop { std::hint::spin_loop(); }')
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    processes = fresh_kernel.processes()
    fresh_kernel.process.kill()
    assert not all_gone(processes)


@pytest.mark.parametrize("busy", [False, True])
def test_a_session_leaves_no_files(tmp_path, busy):
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    with driver.started("qlora-nb", cwd=tmp_path / "work", env={"TMPDIR": str(tmp_path / "tmp")}) as kernel:
        kernel.run("let a = 1;").ok()
        assert os.listdir(tmp_path / "tmp"), "it works elsewhere: this test would see nothing"
        if busy:
            cell = kernel.submit('println!("busy"); loop { std::hint::spin_loop(); }')
            cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
        kernel.ask("shutdown_request", {"restart": False}, channel="control")
        kernel.manager.provisioner.process.wait(60)
        assert not os.listdir(tmp_path / "tmp") and not os.listdir(tmp_path / "work")


def test_restart_is_a_fresh_start(fresh_kernel):
    fresh_kernel.run("let old = 1;").ok()
    old = fresh_kernel.process.pid
    fresh_kernel.manager.restart_kernel()
    fresh_kernel.wait_for_ready()
    assert fresh_kernel.process.pid != old
    gone = fresh_kernel.run("old")
    assert gone.status == "error" and "old" in gone.complaint
    again = fresh_kernel.run("let new = 2; new").ok()
    assert again.result == "2"


def test_restart_of_a_busy_kernel(fresh_kernel):
    cell = fresh_kernel.submit('println!("busy"); loop { std::hint::spin_loop(); }')
    cell.wait_for(lambda cell: "busy" in cell.stdout, "its first line")
    processes = fresh_kernel.processes()
    fresh_kernel.manager.restart_kernel(now=True)
    fresh_kernel.wait_for_ready()
    assert fresh_kernel.run("1 + 1").ok().result == "2"
    assert not all_gone([p for p in processes if p.pid != fresh_kernel.process.pid])


def test_two_kernels_do_not_meet(fresh_kernel, kernel):
    fresh_kernel.run("let whose = 1;").ok()
    kernel.run("let whose = 2;").ok()
    assert fresh_kernel.run("whose").ok().result == "1"
    assert kernel.run("whose").ok().result == "2"


def test_cells_work_in_the_notebooks_folder(kernel, folder):
    (folder / "beside.txt").write_text("found")
    assert kernel.run('std::fs::read_to_string("beside.txt")?').ok().result == '"found"'


def test_tensors_of_two_cells_differ(kernel):
    """Statics are shared between cells: were each to count tensor ids anew, gradients would be wrong."""
    kernel.run("use qlora_nb::prelude::*;\nlet a = Tensor::ones(1, DType::F32, &Device::Cpu)?;").ok()
    kernel.run("let b = Tensor::ones(1, DType::F32, &Device::Cpu)?;").ok()
    assert kernel.run("a.id() == b.id()").ok().result == "false"


def test_variables_may_change_their_type(kernel):
    kernel.run("let x = 1;").ok()
    kernel.run('let x = format!("{x} and more");').ok()
    assert kernel.run("x").ok().result == '"1 and more"'
    assert kernel.run("x.len()").ok().result == "10"


def test_messages_are_dated(kernel):
    """The kernel's messages carry dates that front ends show as the time a cell took."""
    cell = kernel.run('println!("a");\n1').ok()
    dates = [m["header"]["date"] for m in cell.messages]
    assert all(isinstance(d, datetime) and d.tzinfo for d in dates), f"jupyter_client cannot read {dates}"
    assert dates == sorted(dates)
