"""Where the kernel under test is, and the fixtures that the files here share."""

import json
import os
from pathlib import Path

import pytest

import driver

REPOSITORY = Path(__file__).resolve().parents[2]
#: Another kernel can be tested with the same files, as far as it goes.
KERNEL_NAME = os.environ.get("KERNEL_NAME", "qlora-nb")


def layout():
    """The folder that `qlora-nb install` made."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(os.environ.get("QLORA_NB_PREFIX") or Path(data) / "qlora-nb").resolve()


def pytest_configure(config):
    prefix = layout()
    share = prefix / "share/jupyter"
    kernelspec = share / "kernels" / KERNEL_NAME / "kernel.json"
    if KERNEL_NAME == "qlora-nb":
        if not kernelspec.exists():
            pytest.exit(f"no kernelspec at {kernelspec}\nremedy: qlora-nb install --prefix {prefix}", returncode=2)
        os.environ["QLORA_NB_PREFIX"] = str(prefix)
    paths = [str(share), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(paths)


@pytest.fixture(scope="session")
def prefix():
    return layout()


@pytest.fixture(scope="session")
def kernelspec(prefix):
    """What kernel.json says."""
    return json.loads((prefix / "share/jupyter/kernels/qlora-nb/kernel.json").read_text())


@pytest.fixture(scope="session")
def binary(kernelspec):
    """The path of `qlora-nb`."""
    return kernelspec["argv"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the module's kernel works."""
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="module")
def shared_kernels(folder):
    """The module's kernel is the last of these: a test that failed may have left one that hangs or is dead."""
    kernels = []
    yield kernels
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def kernel(shared_kernels, folder):
    """The module's kernel, for tests that leave it usable."""
    if not shared_kernels or not shared_kernels[-1].manager.is_alive():
        shared_kernels.append(driver.Kernel(KERNEL_NAME, cwd=folder))
        shared_kernels[-1].wait_for_ready()
    kernel = shared_kernels[-1]
    yield kernel
    if not all(cell.done for cell in kernel.cells.values()):
        kernel.close()
    kernel.cells.clear()
    kernel.heard.clear()


@pytest.fixture
def fresh_kernel(tmp_path):
    """A kernel of the test's own."""
    with driver.started(KERNEL_NAME, cwd=tmp_path) as kernel:
        yield kernel


@pytest.fixture
def gate(tmp_path):
    """Holds a cell until the test lets it go on."""
    return Gate(tmp_path / "gate")


class Gate:
    """A file for which a cell waits. What a test sees before it opens the gate came while the cell was busy."""

    def __init__(self, path):
        self.path = path

    @property
    def wait(self):
        """Rust: waits for the gate."""
        nap = "std::thread::sleep(std::time::Duration::from_millis(5))"
        return f"while !std::path::Path::new({json.dumps(str(self.path))}).exists() {{ {nap}; }}"

    def open(self):
        self.path.touch()
