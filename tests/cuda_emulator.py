"""The CUDA sources compiled for the CPU, with the emulator of ``csrc/testing/cuda``: one library
for each variant, kept between processes by a digest of all that it is made of."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "csrc"
RUNTIME = ("runtime.cpp", "numbers.cpp")
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-g1", "-ffp-contract=off", "-fvisibility=hidden", "-Wall",
    "-Wno-unknown-pragmas", "-Wno-unused-function",
)  # fmt: skip
INCLUDES = ("-I", str(ROOT / "cuda"), "-I", str(ROOT / "testing" / "cuda"))
# What each sanitizer's builds are compiled with: kernels, and the runtime, which tells
# ThreadSanitizer of its fibres and is not watched itself.
SANITIZERS = {
    "": ((), ()),
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),) * 2,
    "thread": (("-fsanitize=thread",), ("-DMK_TSAN",)),
}


def folder() -> Path:
    """Where the libraries are kept."""
    kept = os.environ.get("MEMOKERN_TEST_CACHE")
    path = Path(kept) if kept else Path(tempfile.gettempdir()) / f"memokern-emulator-{os.getuid()}"
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def _digest() -> str:
    """Of all sources."""
    files = sorted([*(ROOT / "cuda").rglob("*.*"), *(ROOT / "testing" / "cuda").rglob("*.*")])
    mixed = hashlib.sha256()
    for path in files:
        mixed.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return mixed.hexdigest()


def _compile(command: list[str], out: Path) -> None:
    """Compile to a file of its own first, so that no other process sees half of it."""
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        part = Path(temporary) / out.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(part, out)


def build(
    source: str, macros: dict[str, int], sanitizer: str = "", linked: str = "-shared"
) -> Path:
    """The library of one variant: `source` is that of csrc/cuda, or of csrc/testing/cuda."""
    kernel, runtime = SANITIZERS[sanitizer]
    stem = Path(source).stem
    named = (f"-DMK_IS_{stem.upper()}", f'-DMK_SOURCE="{source}"')
    given = [*named, *(f"-D{name}={value}" for name, value in sorted(macros.items()))]
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256(repr((_digest(), compiler, FLAGS, given, sanitizer)).encode()).hexdigest()
    out = folder() / f"{stem}-{key[:24]}.so"
    if out.exists():
        return out
    objects = []
    for name in RUNTIME:
        run = hashlib.sha256(repr((_digest(), compiler, FLAGS, name, sanitizer)).encode())
        made = folder() / f"{name}-{run.hexdigest()[:24]}.o"
        if not made.exists():
            path = str(ROOT / "testing" / "cuda" / name)
            _compile([compiler, *FLAGS, *runtime, *INCLUDES, "-c", path], made)
        objects.append(str(made))
    entry = str(ROOT / "testing" / "cuda" / "entry.cpp")
    _compile(
        [compiler, *FLAGS, *kernel, *INCLUDES, *given, "-shared", entry, *objects,
         "-Wl,-Bsymbolic"], out
    )  # fmt: skip
    return out


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    return None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler"


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.memokern_shared_bytes.restype = ctypes.c_longlong
    library.memokern_emulate.argtypes = (
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint,
    )  # fmt: skip
    return library


def library(source: str, macros: dict[str, int]) -> ctypes.CDLL:
    """The loaded library of one variant. ``memokern_emulate(entry, address of the parameters,
    grid_x, grid_y, seed)`` runs it; seed 0 runs warps in order, others in a random one."""
    return _load(build(source, dict(macros)))
