"""The wheel: a kernel from `pip install`, which compiles nothing but cells, by a rustc that it finds itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import driver
from conftest import REPOSITORY

pytestmark = pytest.mark.timeout(300)


def run(*command, env=None):
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def wheel(prefix, tmp_path_factory):
    """Of the installation under test. Barely compressed, which takes a fraction of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    share = folder / "stage/share"
    share.mkdir(parents=True)
    (share / "qlora-nb").symlink_to(prefix)
    (share / "jupyter").symlink_to(prefix / "share/jupyter")
    run(sys.executable, REPOSITORY / "scripts/wheel.py", folder / "stage", "--out", folder / "dist", "--level", "1")
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel; afterwards nothing of it may be left."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "--disable-pip-version-check"]
    before = files_in(folder)
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    run(*pip, "check")
    yield folder
    run(*pip, "uninstall", "--yes", "qlora-nb")
    # pip leaves folders that others may share, such as share/jupyter.
    assert files_in(folder) == before and not (folder / "share/qlora-nb").exists()


@pytest.fixture
def toolchains(tmp_path):
    """Makes a rustup with one toolchain, of another release than the library's, and nothing of Rust on PATH."""
    other = tmp_path / "rustup/toolchains/1.0.0/bin/rustc"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\necho 'rustc 1.0.0 (2015)'\necho 'release: 1.0.0'\n")
    other.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ["cc", "ld", "as"]:
        (tools / name).symlink_to(shutil.which(name))
    (tools / "env").symlink_to(shutil.which("env"))
    return {"RUSTUP_HOME": str(tmp_path / "rustup"), "PATH": str(tools)}


def started(environment, tmp_path, **env):
    kernels = environment / "share/jupyter/kernels"
    # The front end runs elsewhere, and has a library of its own in view.
    return driver.started("qlora-nb", cwd=tmp_path, env=env, kernel_dirs=[kernels])


def test_cells_run_with_the_library_of_the_wheel(environment, tmp_path):
    with started(environment, tmp_path) as kernel:
        cell = kernel.run("use qlora_nb::prelude::*;\nTensor::ones(2, DType::F32, &Device::Cpu)?.sum_all()?").ok()
        assert "2" in cell.result
        mapped = 'std::fs::read_to_string("/proc/self/maps")?.lines().find(|l| l.ends_with("libqlora_nb.so")).unwrap()'
        assert str(environment / "share/qlora-nb/lib") in kernel.run(f"println!(\"{{}}\", {mapped});").ok().stdout


def test_the_toolchain_is_found_where_rustup_has_it(environment, toolchains, tmp_path):
    sysroot = run("rustc", "--print", "sysroot").strip()
    (Path(toolchains["RUSTUP_HOME"]) / "toolchains/right").symlink_to(sysroot)
    with started(environment, tmp_path, **toolchains) as kernel:
        assert kernel.run("6 * 7").ok().result == "42"


def test_the_first_cell_says_how_to_get_the_toolchain(environment, prefix, toolchains, tmp_path):
    release = next(line for line in (prefix / "rustc").read_text().splitlines() if line.startswith("release: "))
    remedy = f"remedy: rustup toolchain install {release.removeprefix('release: ')} --profile minimal"
    with started(environment, tmp_path, **toolchains) as kernel:
        assert remedy in kernel.run("6 * 7").complaint
        # Once it is there, the next cell runs.
        sysroot = run("rustc", "--print", "sysroot").strip()
        (Path(toolchains["RUSTUP_HOME"]) / "toolchains/right").symlink_to(sysroot)
        assert kernel.run("6 * 7").ok().result == "42"
    env = {**os.environ, **toolchains, "QLORA_NB_PREFIX": ""}
    (Path(toolchains["RUSTUP_HOME"]) / "toolchains/right").unlink()
    doctor = subprocess.run([environment / "bin/qlora-nb", "doctor"], env=env, capture_output=True, text=True)
    assert doctor.returncode == 1 and remedy in doctor.stdout, doctor.stdout


def test_a_missing_linker_is_said(environment, toolchains, tmp_path):
    sysroot = run("rustc", "--print", "sysroot").strip()
    (Path(toolchains["RUSTUP_HOME"]) / "toolchains/right").symlink_to(sysroot)
    (Path(toolchains["PATH"]) / "cc").unlink()
    with started(environment, tmp_path, **toolchains) as kernel:
        assert "remedy: install a C compiler" in kernel.run("6 * 7").complaint


def test_the_notebooks_come_along(environment, tmp_path):
    env = {"QLORA_NB_PREFIX": ""}
    run(environment / "bin/qlora-nb", "notebooks", tmp_path / "book", env=env)
    assert (tmp_path / "book/en/qlora_walkthrough.ipynb").is_file()
    assert (tmp_path / "book/models/poet-bloom-zh/model.safetensors").is_file()


def test_pip_alone_removes_it(environment):
    command = [environment / "bin/qlora-nb", "uninstall", "--prefix", environment]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "remedy: pip uninstall qlora-nb" in done.stderr, done.stdout + done.stderr


def test_the_wheel_is_whole_and_the_same_again(wheel, prefix, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert any(name.endswith(".dist-info/licenses/LICENSE-MIT") for name in names)
    again = wheel.parents[1] / "stage"
    run(sys.executable, REPOSITORY / "scripts/wheel.py", again, "--out", tmp_path, "--level", "1")
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()
