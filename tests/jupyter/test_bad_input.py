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
HANG = 60


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
        refused(command(kernelspec, connection_file), kernelspec, "in use")


@pytest.fixture
def told(tmp_path, kernelspec, connection_file):
    """A kernel whose first cell cannot run says why in the cell, where the user looks; or it ends with the message."""

    def check(*words, env=None, argv=None):
        """The cell's result, or None if it was refused with all of the words."""
        argv, env = argv or kernelspec["argv"], {**kernelspec.get("env", {}), **(env or {})}
        spec = tmp_path / "kernels/told/kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({**kernelspec, "argv": argv, "env": env}))
        try:
            with driver.started("told", cwd=tmp_path, env=env, kernel_dirs=[spec.parent.parent]) as kernel:
                cell = kernel.run("6 * 7", timeout=HANG)
        except driver.KernelDied:
            refused(command({"argv": argv}, connection_file), kernelspec, *words, env=env)
            return None
        if cell.status == "ok":
            return cell.result
        for word in words:
            assert word in cell.complaint, f"{word!r} is not in\n{cell.complaint}"
        return None

    return check


def test_no_rustc(told):
    assert told("rustc", "remedy", env={"PATH": "/nowhere", "RUSTUP_HOME": "/nowhere"}) is None


@pytest.fixture
def broken_layout(prefix, tmp_path, kernelspec):
    """A layout of links to the good one, which a test then breaks; and how a kernel is started on it."""
    copy = tmp_path / "layout"
    shutil.copytree(prefix, copy, copy_function=os.symlink)
    moved = lambda text: text.replace(str(prefix), str(copy))  # noqa: E731
    binary, *words = kernelspec["argv"]
    env = {name: moved(value) for name, value in kernelspec.get("env", {}).items()}
    return copy, {"argv": [binary, *map(moved, words)], "env": env | {"QLORA_NB_PREFIX": str(copy)}}


def test_no_dylib(told, broken_layout):
    copy, start = broken_layout
    (copy / "lib/libqlora_nb.so").unlink()
    assert told("libqlora_nb.so", "remedy: qlora-nb install", **start) is None


def test_a_dylib_of_another_rustc(told, broken_layout):
    copy, start = broken_layout
    (copy / "rustc").unlink()
    (copy / "rustc").write_text("rustc 1.0.0 (2015)\n")
    assert told("rustc 1.0.0", "remedy: qlora-nb install", **start) is None


def test_no_layout(told, broken_layout):
    copy, start = broken_layout
    shutil.rmtree(copy)
    assert told("remedy: qlora-nb install", **start) is None


def test_a_home_that_is_read_only(told):
    """Nothing in it is needed: cells run."""
    # root may write wherever permissions forbid it; in /proc nobody can.
    toolchains = os.environ.get("RUSTUP_HOME") or str(Path.home() / ".rustup")
    nowhere = dict.fromkeys(["XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "CARGO_HOME"], "")
    result = told("remedy", "/proc/self", env={"HOME": "/proc/self", "RUSTUP_HOME": toolchains, **nowhere})
    assert result in ("42", None)


def test_a_full_disk(told, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"), (full / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert told("No space left", env={"TMPDIR": str(full)}) is None
    finally:
        subprocess.run(["umount", "--lazy", full], check=False)
