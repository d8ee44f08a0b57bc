"""The walkthrough on stock evcxr_jupyter, which cannot find out the types of variables: `run --write-types` names them.

Skipped where there is no evcxr_jupyter (on PATH, or named by EVCXR_JUPYTER).
"""

import json
import os
import shutil
import subprocess

import nbformat
import pytest
from nbclient import NotebookClient

import walkthrough
from conftest import REPOSITORY

STOCK = shutil.which(os.environ.get("EVCXR_JUPYTER", "evcxr_jupyter"))

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(not STOCK, reason="no evcxr_jupyter")]


@pytest.fixture
def stock_kernel(prefix, tmp_path, monkeypatch):
    """The name of a kernelspec as the README describes it."""
    rustc = ["rustc", "--print", "sysroot"]
    sysroot = subprocess.run(rustc, capture_output=True, text=True, check=True).stdout.strip()
    libraries = os.pathsep.join([f"{prefix}/lib", f"{sysroot}/lib"])
    spec = {
        "argv": [STOCK, "--control_file", "{connection_file}"],
        "display_name": "Rust (evcxr)",
        "language": "rust",
        "env": {"EVCXR_CONFIG_DIR": f"{prefix}/evcxr", "LD_LIBRARY_PATH": libraries},
    }
    folder = tmp_path / "share/kernels/stock"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"), prepend=os.pathsep)
    return "stock"


def test_the_walkthrough_runs(binary, stock_kernel, tmp_path):
    path = walkthrough.copy(REPOSITORY, tmp_path, 20)
    typed = path.with_name("typed.ipynb")
    subprocess.run([binary, "run", path, "-o", typed, "--write-types"], check=True, timeout=300)
    notebook = nbformat.read(typed, as_version=4)
    assert any("let mut trainer: qlora_nb::trainer::Trainer = " in cell.source for cell in notebook.cells)
    resources = {"metadata": {"path": str(path.parent)}}
    executed = NotebookClient(notebook, kernel_name=stock_kernel, timeout=300, resources=resources).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in executed.cells], ensure_ascii=False)
    assert "in form before, " in shown, "it came to the end"
    assert "EVCXR_" not in shown, "stock evcxr was sent what it does not understand"
