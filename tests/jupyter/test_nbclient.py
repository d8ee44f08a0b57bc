"""What executes notebooks in CI (nbclient, nbmake, `qlora-nb test`) fails where it should, and only there."""

import functools
import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import walkthrough
from conftest import REPOSITORY

TABLE = REPOSITORY / "tests/notebooks/table"
#: Updates in the walkthrough; all 200 of them take a minute more.
STEPS = int(os.environ.get("STEPS", "20"))
METADATA = {"kernelspec": {"name": "qlora-nb", "display_name": "Rust (qlora-nb)", "language": "rust"}}

BAD_CELLS = {
    "panic": 'panic!("on purpose")',
    "failed_assert": "assert_eq!(kept.len(), 4);",
    "question_mark": 'let n: i32 = "seven".parse()?;',
}


def notebook(*cells):
    """A notebook of code cells."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells], metadata=METADATA)


def bad_notebook(name):
    return notebook("let kept = vec![1, 2, 3];", BAD_CELLS[name], 'println!("not reached");')


def execute(nb, folder, timeout=180):
    """By nbclient."""
    return NotebookClient(nb, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()


@functools.cache
def expected():
    file = TABLE / "expected.json"
    return json.loads(file.read_text()) if file.exists() else {}


def nbmake(folder, timeout=180):
    """{notebook: "pass" or "fail"} of all in a folder, in one run of pytest, and what that said."""
    command = [sys.executable, "-m", "pytest", "--nbmake", f"--nbmake-timeout={timeout}", "--junitxml=nbmake.xml"]
    # No settings of this folder: they would be applied to the notebooks.
    command += ["-p", "no:cacheprovider", "-p", "no:timeout", "-c", os.devnull, "--rootdir=.", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    verdicts = {}
    for case in ElementTree.parse(folder / "nbmake.xml").iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        verdicts[case.get("name").removesuffix(".ipynb")] = "fail" if failed else "pass"
    assert (done.returncode != 0) == ("fail" in verdicts.values()), said
    return verdicts, said


@pytest.mark.parametrize("name", BAD_CELLS)
def test_nbclient_fails_at_a_bad_cell(name, tmp_path):
    nb = bad_notebook(name)
    with pytest.raises(CellExecutionError):
        execute(nb, tmp_path)
    assert [output.output_type for output in nb.cells[1].outputs][-1] == "error"
    assert nb.cells[2].execution_count is None and not nb.cells[2].outputs


def test_nbclient_stores_what_cells_show(tmp_path):
    html = 'qlora_nb::display::Html::new("<b>1</b>", "1")'
    nb = execute(notebook('print!("a"); println!("b"); eprintln!("c");', "6 * 7", html), tmp_path)
    nbformat.validate(nb)
    streams = {output.name: output.text for output in nb.cells[0].outputs}
    assert streams == {"stdout": "ab\n", "stderr": "c\n"}
    assert nb.cells[1].outputs[0].data == {"text/plain": "42"}
    assert nb.cells[2].outputs[0].data == {"text/html": "<b>1</b>", "text/plain": "1"}


def test_nbclient_stores_the_last_state_of_a_display(tmp_path):
    def say(op, text):
        operation = {"op": op, "id": "bar", "data": {"text/plain": text}, "metadata": {}}
        return f'println!("{{}}", {json.dumps("EVCXR_QLORA_NB " + json.dumps(operation))});'

    nb = execute(notebook("\n".join([say("display", "10%"), say("update", "50%"), say("update", "100%")])), tmp_path)
    assert [output.data["text/plain"] for output in nb.cells[0].outputs] == ["100%"]


@pytest.mark.timeout(900)
def test_nbclient_runs_the_walkthrough(tmp_path):
    path = walkthrough.copy(REPOSITORY, tmp_path, STEPS)
    nb = execute(nbformat.read(path, as_version=4), path.parent, timeout=600)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any(f"global_step={STEPS}" in str(cell.outputs) for cell in code)
    assert (path.parent / f"out/walkthrough/qlora/checkpoint-{STEPS}").is_dir()


@pytest.fixture(scope="module")
def nbmake_verdicts(tmp_path_factory):
    """nbmake's verdicts on the bad notebooks above and on the table."""
    folder = tmp_path_factory.mktemp("nbmake")
    for name in BAD_CELLS:
        nbformat.write(bad_notebook(name), folder / f"cell_{name}.ipynb")
    for name in expected():
        shutil.copy(TABLE / name, folder / f"table_{name}")
    return nbmake(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BAD_CELLS)
def test_nbmake_fails_at_a_bad_cell(name, nbmake_verdicts):
    verdicts, said = nbmake_verdicts
    assert verdicts[f"cell_{name}"] == "fail", said


@pytest.mark.timeout(900)
def test_nbmake_passes_the_walkthrough(tmp_path):
    path = walkthrough.copy(REPOSITORY, tmp_path, STEPS)
    verdicts, said = nbmake(path.parent, timeout=600)
    assert verdicts == {path.stem: "pass"}, said


def nbclient_verdict(name, folder):
    try:
        execute(nbformat.read(TABLE / name, as_version=4), folder)
    except CellExecutionError:
        return "fail"
    return "pass"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(expected()) or [pytest.param("", marks=pytest.mark.skip(f"no {TABLE}"))])
def test_three_runners_agree(name, nbmake_verdicts, binary, kernelspec, tmp_path):
    shutil.copy(TABLE / name, tmp_path)
    env = os.environ | kernelspec.get("env", {})
    test = subprocess.run([binary, "test", name], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert test.returncode in (0, 1), test.stdout + test.stderr
    verdicts = {
        "qlora-nb test": "fail" if test.returncode else "pass",
        "nbclient": nbclient_verdict(name, tmp_path),
        "nbmake": nbmake_verdicts[0][f"table_{name.removesuffix('.ipynb')}"],
    }
    assert verdicts == dict.fromkeys(verdicts, expected()[name]), test.stdout + test.stderr
