"""`qlora-nb install` that is killed, or has no room: what was there works, the next install mends the rest.

KILLS (default 3) says how often it is killed."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("KILLS", "3"))
#: A whole install takes seconds, and up to a minute on a busy machine.
HANG = 300


@pytest.fixture(scope="module")
def place(tmp_path_factory, prefix, binary):
    """A prefix with an installation of its own, and files of somebody else."""
    if Path(binary).resolve().parent.parent != prefix or not (prefix / "built").exists():
        pytest.skip("the installation is not one that this clone built")
    own = tmp_path_factory.mktemp("place")
    (own / "share/jupyter/kernels/other").mkdir(parents=True)
    (own / "share/jupyter/kernels/other/kernel.json").write_text("{}")
    (own / "share/notes.txt").write_text("mine")
    whole(binary, own)
    return own


def install(binary, place, **options):
    words = [binary, "install", "--prefix", place]
    environment = {name: value for name, value in os.environ.items() if name != "QLORA_NB_PREFIX"}
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
    )


def whole(binary, place):
    """Installs, and says how long it took."""
    begin = time.monotonic()
    process = install(binary, place)
    text, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, text
    return time.monotonic() - begin


def six_times_seven(binary, place, folder):
    """What a cell gives there; None if it says what to do."""
    notebook = folder / "cell.ipynb"
    notebook.write_text(
        '{"cells": [{"cell_type": "code", "source": "6 * 7", "metadata": {}, "outputs": [], "execution_count": null}],'
        ' "metadata": {}, "nbformat": 4, "nbformat_minor": 4}'
    )
    words = [binary, "run", "--prefix", place, notebook]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG)
    if done.returncode == 0:
        assert '"42"' in notebook.read_text()
        return 42
    assert "remedy: qlora-nb install" in done.stdout + done.stderr, done
    return None


def others(place):
    share = place / "share"
    return sorted(str(p.relative_to(share)) for p in share.rglob("*") if "qlora-nb" not in str(p.relative_to(share)))


def test_an_install_that_is_killed(binary, place, tmp_path):
    theirs = others(place)
    layout = place / "share/qlora-nb"
    (layout / "rustc").write_text("another\n")
    took = whole(binary, place)
    for _ in range(KILLS):
        # It has everything to do, as for a new compiler.
        (layout / "rustc").write_text("another\n")
        process = install(binary, place)
        time.sleep(random.uniform(0, took))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        six_times_seven(binary, place, tmp_path)
    whole(binary, place)
    assert six_times_seven(binary, place, tmp_path) == 42
    assert not [entry.name for entry in layout.iterdir() if entry.name.startswith(".new-")]
    assert others(place) == theirs
    assert (place / "share/notes.txt").read_text() == "mine"


def test_an_install_without_room(binary, place, tmp_path):
    layout = place / "share/qlora-nb"
    (layout / "rustc").write_text("another\n")

    def little_room():
        # As on a full disk, a write fails: without the signal, which would end the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    process = install(binary, place, preexec_fn=little_room)
    text, _ = process.communicate(timeout=HANG)
    assert process.returncode != 0 and "remedy: " in text, text
    assert not [entry.name for entry in layout.iterdir() if entry.name.startswith(".new-")]
    assert (layout / "lib/libqlora_nb.so").exists(), "the old library was taken away"
    whole(binary, place)
    assert six_times_seven(binary, place, tmp_path) == 42


def test_an_install_without_memory(binary, place, tmp_path):
    layout = place / "share/qlora-nb"
    (layout / "rustc").write_text("another\n")

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))

    process = install(binary, place, preexec_fn=little_memory)
    text, _ = process.communicate(timeout=HANG)
    assert process.returncode != 0, text
    assert "panicked" not in text and (layout / "lib/libqlora_nb.so").exists(), text
    whole(binary, place)
    assert six_times_seven(binary, place, tmp_path) == 42
