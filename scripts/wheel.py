"""Packs what `qlora-nb install --prefix STAGE` made into a wheel: see scripts/wheel.

    python3 scripts/wheel.py STAGE [--version VERSION] [--out DIR] [--level 9]

Nothing but Python and binutils is needed, and no network. The same files give the same wheel, byte by byte.
"""

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
#: What a manylinux wheel may expect of any system, and std, which lies where rustc does: cells need both.
SYSTEM = re.compile(r"(lib(c|m|dl|rt|pthread|gcc_s)|ld-linux-x86-64)\.so\.\d|libstd-[0-9a-f]+\.so")
METADATA = """\
Metadata-Version: 2.4
Name: qlora-nb
Version: {version}
Summary: QLoRA fine-tuning in Rust, cell by cell in Jupyter: the kernel, its library and the notebooks
Keywords: qlora,lora,fine-tuning,llm,jupyter,rust
License-Expression: MIT OR Apache-2.0
License-File: LICENSE-MIT
License-File: LICENSE-APACHE
Classifier: Framework :: Jupyter
Classifier: Operating System :: POSIX :: Linux
Classifier: Programming Language :: Rust
Requires-Python: >=3.8
Description-Content-Type: text/markdown

"""
WHEEL = "Wheel-Version: 1.0\nGenerator: qlora-nb scripts/wheel\nRoot-Is-Purelib: false\nTag: {tag}\n"


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def glibc(program):
    """The minor version of the newest glibc 2 of which a program or a library needs a symbol."""
    needed = set(re.findall(r"Shared library: \[(.*?)\]", said("readelf", "-dW", program)))
    foreign = sorted(name for name in needed if not SYSTEM.fullmatch(name))
    if foreign:
        sys.exit(f"{program} needs {', '.join(foreign)}, which not every Linux has\nremedy: link it statically")
    return max((int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", said("objdump", "-T", program))), default=0)


def stripped(program):
    """A program without its symbols."""
    with tempfile.NamedTemporaryFile() as copy:
        subprocess.run(["strip", "-o", copy.name, program], check=True)
        return Path(copy.name).read_bytes()


def kernelspec(installed):
    """kernel.json for a place that nobody knows yet: the kernel is where the environment has its programs.

    Jupyter puts the kernelspec's folder in place of `{resource_dir}`. VS Code leaves out kernels whose first word is no
    program: hence `env`. No prefix: the kernel takes the library that came with it, whatever the user has set.
    """
    spec = json.loads(installed)
    spec["argv"] = ["env", "{resource_dir}/../../../../bin/qlora-nb", *spec["argv"][1:]]
    spec["env"] = {"QLORA_NB_PREFIX": ""}
    return as_json(spec)


def as_json(value):
    return f"{json.dumps(value, indent=2)}\n".encode()


def content(stage, version):
    """{path in the wheel: bytes} but for the metadata, and the minor version of glibc that it needs."""
    layout, share = stage / "share/qlora-nb", f"qlora_nb-{version}.data/data/share"
    binary, libraries = layout / "bin/qlora-nb", sorted([*layout.glob("lib/*.so"), *layout.glob("deps/*")])
    files = {f"qlora_nb-{version}.data/scripts/qlora-nb": stripped(binary)}
    for path in [*libraries, layout / "rustc"]:
        files[f"{share}/qlora-nb/{path.relative_to(layout)}"] = path.read_bytes()
    # Which build was indexed matters to `install` alone.
    index = json.loads((layout / "api.json").read_text()) | {"built": version}
    files[f"{share}/qlora-nb/api.json"] = json.dumps(index, ensure_ascii=False).encode()
    stamp = {"kernelspec": "../jupyter/kernels/qlora-nb", "version": version}
    files[f"{share}/qlora-nb/qlora-nb.json"] = as_json(stamp)
    for name in said("git", "-C", REPOSITORY, "ls-files", "-z", "notebooks").split("\0")[:-1]:
        files[f"{share}/qlora-nb/{name}"] = (REPOSITORY / name).read_bytes()
    for path in sorted((stage / "share/jupyter/kernels/qlora-nb").iterdir()):
        data = path.read_bytes()
        files[f"{share}/jupyter/kernels/qlora-nb/{path.name}"] = kernelspec(data) if path.suffix == ".json" else data
    programs = [binary, *(path for path in libraries if path.suffix == ".so")]
    return files, max(map(glibc, programs))


def record(files, own):
    """RECORD: the digest and the size of every file but of itself."""
    digest = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()  # noqa: E731
    lines = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    return "\n".join([*lines, f"{own},,", ""]).encode()


def write(path, files, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # of 1980, as are all that do not say
            is_program = ".data/scripts/" in name or name.endswith(".so")
            entry.external_attr = (0o100755 if is_program else 0o100644) << 16
            wheel.writestr(entry, data, zipfile.ZIP_DEFLATED)


def main():
    of_workspace = re.search(r'^version = "(.*)"', (REPOSITORY / "Cargo.toml").read_text(), re.M)[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="the prefix of an installation")
    parser.add_argument("--version", default=of_workspace)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--level", type=int, default=9, help="of compression, 1 to 9")
    options = parser.parse_args()
    files, minor = content(options.stage.resolve(), options.version)
    tag = f"py3-none-manylinux_2_{minor}_x86_64"
    info = f"qlora_nb-{options.version}.dist-info"
    readme = (REPOSITORY / "README.md").read_text()
    files[f"{info}/METADATA"] = (METADATA.format(version=options.version) + readme).encode()
    files[f"{info}/WHEEL"] = WHEEL.format(tag=tag).encode()
    for name in ["LICENSE-MIT", "LICENSE-APACHE"]:
        files[f"{info}/licenses/{name}"] = (REPOSITORY / name).read_bytes()
    files[f"{info}/RECORD"] = record(files, f"{info}/RECORD")
    wheel = options.out / f"qlora_nb-{options.version}-{tag}.whl"
    write(wheel, files, options.level)
    installed = sum(map(len, files.values()))
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.0f} MB, {installed / 1e6:.0f} MB when installed")


if __name__ == "__main__":
    main()
