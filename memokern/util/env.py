"""Every environment variable that memokern reads. Values are read when they are first needed."""

from __future__ import annotations

import os
from collections.abc import Callable

BACKEND = "MEMOKERN_BACKEND"  # auto | reference | cpu | cuda | triton: who runs the operations
ISA = "MEMOKERN_ISA"  # auto | baseline | avx2 | avx512: which compiled CPU kernels are used
PRECISION = "MEMOKERN_PRECISION"  # tf32x3 | ieee: how the Triton kernels multiply float32 rows
AUTOTUNE = "MEMOKERN_AUTOTUNE"  # 0 | 1: whether Triton configurations are chosen by measuring
CUDA_CACHE = "MEMOKERN_CUDA_CACHE"  # a folder: where compiled CUDA kernels are kept

_BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
PRECISIONS = ("tf32x3", "ieee")


def _look_up(name: str) -> Callable[[], object]:
    """os.environ encodes the name and decodes the value, which takes 1 us: much of a small call.
    Its table, where there is one as in CPython, has both encoded."""
    table = getattr(os.environ, "_data", None)
    encode = getattr(os.environ, "encodekey", None)
    if not isinstance(table, dict) or encode is None:
        return lambda: os.environ.get(name)
    key = encode(name)
    return lambda: table.get(key)


raw_backend = _look_up(BACKEND)  # changes when what backend() returns may have changed


def backend() -> str:
    """The backend asked for: ``auto`` unless ``MEMOKERN_BACKEND`` says otherwise."""
    value = os.environ.get(BACKEND, "").strip().lower() or "auto"
    if value not in _BACKENDS:
        raise RuntimeError(
            f"{BACKEND} must be one of {', '.join(_BACKENDS)}, not {value!r}; unset it to"
            " let memokern choose"
        )
    return value


def isa() -> str:
    """The instruction set asked for: ``auto`` unless ``MEMOKERN_ISA`` says otherwise.

    The compiled module knows which names it has, so it is the one that refuses an unknown one.
    """
    return os.environ.get(ISA, "").strip().lower() or "auto"


def precision() -> str:
    """How products with float32 rows are formed on a GPU: ``tf32x3`` unless told otherwise.

    tf32x3: three products on the tensor cores, right to about 2^-20. ieee: float32 multiply-adds,
    right to 2^-24 and several times slower. The results keep the same contract with either: what
    the products leave uncertain is evaluated exactly, of which ieee leaves less.
    """
    value = os.environ.get(PRECISION, "").strip().lower() or "tf32x3"
    if value not in PRECISIONS:
        raise RuntimeError(f"{PRECISION} must be one of {', '.join(PRECISIONS)}, not {value!r}")
    return value


def autotune() -> bool:
    """Whether the Triton kernels measure which configuration is fastest, on their first call."""
    value = os.environ.get(AUTOTUNE, "").strip() or "0"
    if value not in ("0", "1"):
        raise RuntimeError(f"{AUTOTUNE} must be 0 or 1, not {value!r}")
    return value == "1"


def cuda_cache() -> str | None:
    """The folder for compiled CUDA kernels, or None for the one in the user's cache folder."""
    return os.environ.get(CUDA_CACHE, "").strip() or None
