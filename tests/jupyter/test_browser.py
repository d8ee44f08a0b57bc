"""A reader in JupyterLab: the walkthrough's cells, live output, Stop, and a failing cell. Screenshots are kept.

    ARTIFACTS=out/browser pytest tests/jupyter/test_browser.py
"""

import contextlib
import os
import re
import shutil

import nbformat
import pytest

import walkthrough
from conftest import REPOSITORY

playwright = pytest.importorskip("playwright", reason="scripts/setup jupyter installs it")
import lab  # noqa: E402

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: scripts/setup jupyter installs it"),
]

FAILURE = re.compile(r"error(\[E\d+\])?:|panicked")
PROGRESS = re.compile(r"(\d+) of 200 steps")
STREAM = """pipe.generate("Human: 以《江上秋夜》为题，写一首七言绝句。\\n\\nAssistant: ", &GenerationConfig {
    min_new_tokens: Some(3000), max_new_tokens: Some(3000), do_sample: true, seed: Some(7), ..Default::default() })?"""
EXTRA = [
    STREAM,
    'assert_eq!(requests.len(), 61, "the requests were counted");',
    'println!("{} still here", requests.len());',
]


@pytest.fixture(scope="session")
def artifacts():
    folder = REPOSITORY / os.environ.get("ARTIFACTS", "out/browser")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    return folder


@contextlib.contextmanager
def opened(path, root, home, artifacts):
    """The notebook, open in a JupyterLab that serves `root`."""
    home.mkdir()
    try:
        with lab.server(root, home) as url, lab.page(artifacts) as page:
            yield lab.Notebook(page, url, path.relative_to(root), artifacts)
    finally:
        shutil.copy(home / "jupyterlab.log", artifacts)


def test_a_reader_works_through_the_walkthrough(tmp_path, artifacts):
    root = tmp_path / "root"
    path = walkthrough.copy(REPOSITORY, root, extra=EXTRA)
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    with opened(path, root, tmp_path / "home", artifacts) as notebook:
        work_through(notebook, sources)


def work_through(notebook, sources):
    training = next(n for n, source in enumerate(sources) if source.startswith("trainer.train()"))
    stream, failing, after = range(len(sources) - len(EXTRA), len(sources))

    for n in range(training):
        notebook.run(n)
        assert not FAILURE.search(notebook.output(n).inner_text()), notebook.output(n).inner_text()
    notebook.show(1, "dataset")
    notebook.show(training - 1, "before_training")

    # The progress moves and the curve is drawn anew, both while the cell is busy.
    def steps():
        return {match for text in notebook.texts(training) for match in PROGRESS.findall(text)}

    notebook.start(training)
    notebook.wait_while_busy(training, lambda: len(steps()) >= 2, "the progress moved")
    notebook.show(training, "progress")
    notebook.wait_while_busy(training, lambda: len(set(notebook.pictures(training))) >= 2, "the curve was redrawn")
    notebook.show(training, "curve")

    # Stop, and go on from there.
    notebook.stop()
    notebook.wait(training)
    stopped = notebook.output(training).inner_text()
    assert "interrupted" in stopped and "200 of 200 steps" not in stopped, stopped
    notebook.show(training, "stopped")
    notebook.run(training, timeout=600_000)
    assert "200 of 200 steps" in notebook.output(training).inner_text()
    notebook.show(training, "trained")

    for n in range(training + 1, stream):
        notebook.run(n)
    notebook.show(stream - 2, "poems")

    # Text appears as it is made.
    notebook.start(stream)
    grown = lambda: len({len(text) for text in notebook.texts(stream)}) >= 3  # noqa: E731
    notebook.wait_while_busy(stream, grown, "the text grew")
    notebook.show(stream, "stream")
    notebook.wait(stream)

    notebook.run(failing)
    assert notebook.is_red(failing, "the requests were counted"), "a failing cell is not in red"
    assert "left: 60" in notebook.output(failing).inner_text()
    notebook.show(failing, "failed")
    notebook.run(after)
    assert "60 still here" in notebook.output(after).inner_text()


def test_run_all_stops_at_the_failing_cell(tmp_path, artifacts):
    cells = ["let kept = 1;", "assert!(kept == 2);", "kept + 1"]
    path = tmp_path / "root/failing.ipynb"
    path.parent.mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"name": "qlora-nb", "display_name": "Rust (qlora-nb)", "language": "rust"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    with opened(path, path.parent, tmp_path / "home", artifacts) as notebook:
        notebook.page.get_by_role("menuitem", name="Run", exact=True).click()
        notebook.page.locator("[data-command='runmenu:run-all']").click()
        notebook.wait(1)
        assert notebook.is_red(1, "kept == 2")
        notebook.run(0)  # whatever was queued is through by now
        assert notebook.prompt(2).inner_text().strip() in ("[ ]:", ""), "a cell after the failing one was run"
