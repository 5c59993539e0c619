"""NVRTC, NVIDIA's compiler as a library: a variant to machine code, without nvcc, without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import io
import threading
from types import ModuleType
from typing import NamedTuple

from memokern.backends.cuda.core import sources
from memokern.backends.cuda.core.variant import Variant

_IMPORTING = threading.Lock()
STANDARD = "c++17"
PARTS = ("cuda.core", "cuda.bindings")  # what the extra installs, besides NVRTC itself


class Compiled(NamedTuple):
    """code: the cubin. log: what the assembler says of registers, spills and shared memory."""

    code: bytes
    log: str


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled here, in one line, or None."""
    for part in PARTS:
        try:
            found = importlib.util.find_spec(part)
        except ModuleNotFoundError:  # of "cuda", which both are in
            found = None
        if found is None:
            name = part.replace(".", "-")
            return f"{name} is not installed: pip install 'memokern[cuda]'"
    try:
        version()
    except Exception as error:  # the loader of shared libraries has exceptions of its own
        first = str(error).strip().partition("\n")[0]
        return f"NVRTC cannot be loaded ({first}): pip install 'memokern[cuda]'"
    return None


@functools.cache
def version() -> str:
    """NVRTC's, "13.0"; raises where it cannot be loaded."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return f"{major}.{minor}"


@functools.cache
def architectures() -> frozenset[int]:
    """Those that NVRTC compiles for: 90 for sm_90 and sm_90a."""
    from cuda.bindings import nvrtc

    status, count = nvrtc.nvrtcGetNumSupportedArchs()
    status, found = nvrtc.nvrtcGetSupportedArchs() if count else (status, [])
    if int(status) != 0:
        raise RuntimeError(f"nvrtcGetSupportedArchs returned {status}")
    return frozenset(int(arch) for arch in found)


def _core() -> ModuleType:
    """cuda.core, which one thread must have imported before another one asks for it: else what it
    finds may lack names."""
    with _IMPORTING:
        import cuda.core

        return cuda.core


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """The machine code of a variant for "sm_90a" or another architecture.

    Raises RuntimeError with what NVRTC says. Takes about a second.
    """
    core = _core()
    root = sources.folder()
    text = (root / variant.program).read_text(encoding="utf-8")
    options = core.ProgramOptions(
        name=variant.program,
        arch=arch,
        std=STANDARD,
        # An empty list is an error.
        define_macro=[(name, str(value)) for name, value in variant.macros] or None,
        include_path=[str(root)],
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        code = core.Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:
        raise RuntimeError(
            f"NVRTC {version()} does not compile {variant.name} for {arch}:\n{error}\n"
            "MEMOKERN_BACKEND=triton does without it"
        ) from error
    return Compiled(bytes(code), log.getvalue())
