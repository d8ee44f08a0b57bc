"""`qlora-nb kernel` where something is missing or wrong: it says what, with the remedy, and ends. It never hangs."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from jupyter_client.connect import write_connection_file

import driver

#: A hang is what takes longer than any start.
HANG = 120


@pytest.fixture
def connection_file(tmp_path):
    """One that is good."""
    return Path(write_connection_file(str(tmp_path / "connection.json"), key=b"secret")[0])


def command(kernelspec, connection_file):
    return [word.replace("{connection_file}", str(connection_file)) for word in kernelspec["argv"]]


def refused(argv, kernelspec, *words, env=None):
    """Runs the kernel, which must end by itself with a failure and a message that has the words."""
    env = {**os.environ, **kernelspec.get("env", {}), **(env or {})}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=HANG, stdin=subprocess.DEVNULL)
    said = done.stdout + done.stderr
    assert done.returncode > 0, f"status {done.returncode}\n{said}"
    assert "panicked" not in said and "RUST_BACKTRACE" not in said, said
    for word in words:
        assert word in said, f"{word!r} is not in\n{said}"


def test_no_connection_file(kernelspec, tmp_path):
    refused(command(kernelspec, tmp_path / "nowhere.json"), kernelspec, "nowhere.json")


def test_a_folder_for_a_connection_file(kernelspec, tmp_path):
    refused(command(kernelspec, tmp_path), kernelspec, str(tmp_path))


def test_no_argument(kernelspec):
    refused(kernelspec["argv"][:2], kernelspec)


@pytest.mark.parametrize("text", ["", "hello", "[]", "{}", '{"shell_port": "many"}', "\x00\x01"])
def test_a_malformed_connection_file(kernelspec, tmp_path, text):
    path = tmp_path / "malformed.json"
    path.write_text(text)
    refused(command(kernelspec, path), kernelspec, "malformed.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("shell_port", 99999), ("ip", "300.1.2.3"), ("transport", "pigeon"), ("signature_scheme", "hmac-nonsense")],
)
def test_a_wrong_value_in_the_connection_file(kernelspec, connection_file, key, value):
    info = json.loads(connection_file.read_text())
    connection_file.write_text(json.dumps(info | {key: value}))
    refused(command(kernelspec, connection_file), kernelspec)


def test_a_port_that_is_taken(kernelspec, connection_file):
    port = json.loads(connection_file.read_text())["shell_port"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        refused(command(kernelspec, connection_file), kernelspec, str(port))


def test_no_rustc(kernelspec, connection_file):
    refused(command(kernelspec, connection_file), kernelspec, "rustc", "remedy", env={"PATH": "/nowhere"})


@pytest.fixture
def broken_layout(prefix, tmp_path, kernelspec, connection_file):
    """A layout of links to the good one, which a test then breaks; and how a kernel is started on it."""
    copy = tmp_path / "layout"
    shutil.copytree(prefix, copy, copy_function=os.symlink)

    def argv_and_env():
        binary, *words = command(kernelspec, connection_file)
        env = {name: value.replace(str(prefix), str(copy)) for name, value in kernelspec.get("env", {}).items()}
        return [binary, *(word.replace(str(prefix), str(copy)) for word in words)], env | {"QLORA_NB_PREFIX": str(copy)}

    return copy, argv_and_env


def test_no_dylib(kernelspec, broken_layout):
    copy, argv_and_env = broken_layout
    (copy / "lib/libqlora_nb.so").unlink()
    argv, env = argv_and_env()
    refused(argv, kernelspec, "libqlora_nb.so", "remedy: qlora-nb install", env=env)


def test_a_dylib_of_another_rustc(kernelspec, broken_layout):
    copy, argv_and_env = broken_layout
    (copy / "rustc").unlink()
    (copy / "rustc").write_text("rustc 1.0.0 (2015)\n")
    argv, env = argv_and_env()
    refused(argv, kernelspec, "rustc 1.0.0", "remedy: qlora-nb install", env=env)


def test_no_layout(kernelspec, broken_layout):
    copy, argv_and_env = broken_layout
    shutil.rmtree(copy)
    argv, env = argv_and_env()
    refused(argv, kernelspec, "remedy: qlora-nb install", env=env)


@pytest.fixture
def works_or_says_why(kernelspec, connection_file, tmp_path):
    """A kernel in a poor place serves a cell, or refuses it, or ends at once; the latter two with a message."""

    def check(env, *words):
        try:
            with driver.started("qlora-nb", cwd=tmp_path, env=env) as kernel:
                cell = kernel.run("6 * 7")
                assert cell.result == "42" or any(word in cell.complaint for word in words), cell
        except driver.KernelDied:
            refused(command(kernelspec, connection_file), kernelspec, "remedy", env=env)

    return check


def test_a_home_that_is_read_only(works_or_says_why):
    # root may write wherever permissions forbid it; in /proc nobody can.
    toolchains = os.environ.get("RUSTUP_HOME") or str(Path.home() / ".rustup")
    nowhere = dict.fromkeys(["XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "CARGO_HOME"], "")
    works_or_says_why({"HOME": "/proc/self", "RUSTUP_HOME": toolchains, **nowhere}, "HOME", "/proc/self")


def test_a_full_disk(works_or_says_why, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"), (full / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        works_or_says_why({"TMPDIR": str(full)}, "No space left")
    finally:
        subprocess.run(["umount", "--lazy", full], check=False)
