"""Parts of the compiled kernels, for their tests: their merge and their exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cpu import native
from tests import isas as sets


def isas() -> list[str]:
    """The instruction sets that have these parts."""
    return sets.usable()


def merge(isa: str, a: Tensor, b: Tensor) -> Tensor:
    """Joins the state b [6] into a, in place; -> what their accumulators are multiplied by [2]."""
    factors = torch.empty(2, dtype=torch.float64)
    with sets.selected(isa):
        native.module().merge(a.data_ptr(), b.data_ptr(), factors.data_ptr())
    return factors


def exponential(isa: str, x: Tensor, base_two: bool) -> Tensor:
    """e^x or 2^x of float32 or float64 numbers."""
    y = torch.full_like(x, torch.nan)
    double = x.dtype == torch.float64
    with sets.selected(isa):
        native.module().exp(double, x.data_ptr(), y.data_ptr(), x.numel(), base_two)
    return y
