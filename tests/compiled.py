"""Parts of the compiled kernels, for their tests: their merge, their exponential, and a product.

They are in `memokern._testing`, which is built where MEMOKERN_BUILD_TESTING=1 (`make test` sets it)
and is in no wheel.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from memokern.backends.cpu import native
from memokern.calls import Query, Rows
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


def pairs(isa: str, query: Query, rows: Rows) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first product of a sweep in integers: dots [N, B], the same refined, and i0, i1, r1 and
    a1 of each query's error [B, 4]; None where the instruction set or the rows have none."""
    numbers, kept = native.native_rows(rows)
    b = len(query.x)
    sizes = ((rows.n, b), (rows.n, b), (b, 4))
    dots, refined, errors = (torch.full(size, torch.nan, dtype=torch.float64) for size in sizes)
    parts, asked = _parts(), native.native_query(query, rows)
    assert parts is not None
    there = parts.pairs(isa, numbers, asked, dots.data_ptr(), refined.data_ptr(), errors.data_ptr())
    del kept  # until here
    return (dots, refined, errors) if there else None
