"""Parts of the compiled kernels, for their tests: their merge and their exponential.

They are in `memokern._testing`, which is built where MEMOKERN_BUILD_TESTING=1 (`make test` sets it)
and is in no wheel.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from tests import isas as sets


def _parts() -> ModuleType | None:
    try:
        return importlib.import_module("memokern._testing")
    except ImportError:
        return None


def isas() -> list[str]:
    """The instruction sets that run here and have these parts; none without the module."""
    return [] if _parts() is None else sets.usable()


def merge(isa: str, a: Tensor, b: Tensor) -> Tensor:
    """Joins the state b [6] into a, in place; -> what their accumulators are multiplied by [2]."""
    factors, parts = torch.empty(2, dtype=torch.float64), _parts()
    assert parts is not None
    parts.merge(isa, a.data_ptr(), b.data_ptr(), factors.data_ptr())
    return factors


def exponential(isa: str, x: Tensor, base_two: bool) -> Tensor:
    """e^x or 2^x of float32 or float64 numbers."""
    y, parts = torch.full_like(x, torch.nan), _parts()
    assert parts is not None
    double = x.dtype == torch.float64
    parts.exp(isa, double, x.data_ptr(), y.data_ptr(), x.numel(), base_two)
    return y
