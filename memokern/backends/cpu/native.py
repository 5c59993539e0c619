"""The compiled module, and the call objects as it takes them: tuples of addresses and sizes.

Each tuple has the fields of a struct of ``csrc/include/memokern/abi.h``, in their order. Nothing is
checked there: what the kernels need to be true is checked here and in :mod:`memokern.calls.checks`.
The tensors must outlive the call.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memokern.calls import Blocks, LogitBounds, Query, Rows
from memokern.calls.checks import bands_of, check_rows, contiguous64
from memokern.util import env

_F64 = torch.float64
# Which fields of struct LogitBounds are the call's, not the index's or the queries'.
ASKED = slice(11, 14)


@functools.cache
def module() -> ModuleType:
    """The compiled module, set to the instruction set asked for. Raises ImportError without it."""
    from memokern import _C  # type: ignore[attr-defined]  # compiled: mypy cannot see it

    asked = env.isa()
    try:
        _C.select_isa(asked)
    except RuntimeError as error:
        raise RuntimeError(f"{env.ISA}={asked}: {error}") from None
    return _C


@functools.cache
def row_types() -> dict[torch.dtype, int]:
    """The kernels' code for each type of rows."""
    return {getattr(torch, name): code for name, code in module().ROW_TYPES.items()}


@functools.cache
def weightings() -> dict[str, int]:
    """The kernels' code for each weighting."""
    codes: dict[str, int] = module().WEIGHTINGS
    return codes


def threads() -> int:
    """How many threads a kernel may use: as many as PyTorch's operations."""
    return torch.get_num_threads()


def native_rows(rows: Rows) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """struct Rows, and the tensors that must outlive the call beside those of the rows."""
    check_rows(rows)
    keep = tuple(None if t is None else contiguous64(t) for t in (rows.center, rows.sq_norms))
    data, dim = rows.data, rows.dim
    stride = data.stride(0) if rows.n > 1 else dim
    fields = (
        data.data_ptr(), rows.n, dim, stride, row_types()[data.dtype], rows.scale, rows.shift,
        pointer(keep[0]), pointer(keep[1]),
    )  # fmt: skip
    return fields, keep


def native_query(query: Query, rows: Rows) -> tuple[Any, ...]:
    """struct Queries, of a query that :func:`memokern.calls.checks.prepared` returned."""
    x = query.x
    c, h, a = (None, None, None) if query.condition is None else query.condition
    return (
        x.data_ptr(), x.dtype == _F64, x.shape[0], query.sigma.data_ptr(), query.alpha.data_ptr(),
        query.temperature.data_ptr(), pointer(query.bias), weightings()[query.weighting],
        pointer(None if c is None else rows.conditions), pointer(c), pointer(h), pointer(a),
        0 if c is None else c.shape[1], pointer(query.leave_out),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _int64s(numbers: tuple[int, ...]) -> Tensor:
    """The numbers as a kernel takes them."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def native_bounds(bounds: LogitBounds) -> tuple[Any, ...]:
    """struct LogitBounds."""
    dims, first_band = _int64s(tuple(bounds.dims)), _int64s(tuple(bounds.first_band))
    return (
        bounds.coarse.data_ptr(), bounds.fine.data_ptr(), bounds.fine.dtype == torch.float16,
        bounds.z.data_ptr(), bounds.norms.data_ptr(), bounds.margin.data_ptr(),
        bounds.sq.data_ptr(), dims.data_ptr(), first_band.data_ptr(), len(dims), bands_of(bounds),
        bounds.eps, bounds.most_listed, bounds.reading, *_native_blocks(bounds.blocks),
    )  # fmt: skip


def _native_blocks(blocks: Blocks | None) -> tuple[int | float, ...]:
    """The last fields of struct LogitBounds."""
    if blocks is None:
        return 0, 0, 0, 0, 0, 0.0
    return (*addresses(blocks[:-1]), blocks.excess)


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's numbers, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """The address of the numbers of each tensor: a struct that holds nothing else."""
    return tuple([tensor.data_ptr() for tensor in tensors])
