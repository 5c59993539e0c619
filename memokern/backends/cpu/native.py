"""The compiled module, and rows as it takes them: pointers, after the checks they need."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memokern.calls import Rows
from memokern.calls.checks import check_rows, contiguous64
from memokern.util import env

ROW_TYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}


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


@functools.lru_cache(maxsize=256)
def described(*values: Any) -> Any:
    """The rows as the module takes them: of the same numbers the same object, which is quicker."""
    return module().Rows(*values)


def native_rows(rows: Rows) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The rows as the module takes them, and the tensors that must outlive the call."""
    check_rows(rows)
    keep = tuple(None if t is None else contiguous64(t) for t in (rows.center, rows.sq_norms))
    data, dim = rows.data, rows.dim
    stride = data.stride(0) if rows.n > 1 else dim
    args = described(
        data.data_ptr(), rows.n, dim, stride, ROW_TYPES[data.dtype], rows.scale, rows.shift,
        pointer(keep[0]), pointer(keep[1]),
    )  # fmt: skip
    return args, keep


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's numbers, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
