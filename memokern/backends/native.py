"""The compiled module, and what its kernels are given: pointers, after the checks they need."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memokern import env

ROW_TYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
_F64 = torch.float64


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


def check_rows(rows: Tensor, center: Tensor | None, sq_norms: Tensor | None) -> None:
    """TypeError or ValueError unless kernels can read these rows."""
    if rows.dtype not in ROW_TYPES:
        known = ", ".join(str(t).removeprefix("torch.") for t in ROW_TYPES)
        raise TypeError(
            f"rows must be one of {known}, not {str(rows.dtype).removeprefix('torch.')}"
        )
    n, d = rows.shape
    if (center is None) != (sq_norms is None):
        raise ValueError("center and sq_norms belong together: give both or neither")
    check_stride(rows)
    if center is not None and center.shape != (d,):
        raise ValueError(f"center must have shape [{d}], not {list(center.shape)}")
    if sq_norms is not None and sq_norms.shape != (n,):
        raise ValueError(f"sq_norms must have shape [{n}], not {list(sq_norms.shape)}")


def check_stride(rows: Tensor) -> None:
    """ValueError unless each row is contiguous."""
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(
            f"each row must be contiguous (stride 1), not stride {rows.stride(1)}: call"
            " rows.contiguous() once"
        )


def check_fit(x: Tensor, rows: Tensor) -> None:
    """ValueError unless the queries are as long as the rows, and there are rows."""
    if x.ndim != 2 or rows.ndim != 2 or x.shape[1] != rows.shape[1] or rows.shape[0] < 1:
        raise ValueError(
            f"expected x [B, D] and rows [N >= 1, D], not {list(x.shape)} and {list(rows.shape)}"
        )


def rows_of(
    rows: Tensor, center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float
) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
    """The rows as the module takes them, and the tensors that must outlive the call."""
    check_rows(rows, center, sq_norms)
    n, d = rows.shape
    keep = (wide(center), wide(sq_norms))
    stride = rows.stride(0) if n > 1 else d
    args = described(
        rows.data_ptr(),
        n,
        d,
        stride,
        ROW_TYPES[rows.dtype],
        scale,
        shift,
        pointer(keep[0]),
        pointer(keep[1]),
    )
    return args, keep


def wide(t: Tensor | None) -> Tensor | None:
    if t is None or (t.dtype == _F64 and t.is_contiguous()):
        return t
    return t.to(_F64).contiguous()


def shaped(name: str, t: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """`t`, contiguous; ValueError unless it has the shape and one of the dtypes."""
    if tuple(t.shape) != shape or t.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(t.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {kinds} {list(shape)}, not {got} {list(t.shape)}")
    return t.contiguous()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def queries_of(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Contiguous copies where needed: x in the compute type, the rest in float64."""
    q = queried(x, rows)
    columns = [t.to(_F64).contiguous() for t in (sigma, alpha, temperature)]
    for name, t in zip(("sigma", "alpha", "temperature"), columns, strict=True):
        if t.shape != (x.shape[0],):
            raise ValueError(f"{name} must have shape [{x.shape[0]}], not {list(t.shape)}")
    if bias is not None:
        bias = bias.to(_F64).contiguous()
        if bias.shape != (rows.shape[0],):
            raise ValueError(f"bias must have shape [{rows.shape[0]}], not {list(bias.shape)}")
    return q, columns, bias


def queried(x: Tensor, rows: Tensor) -> Tensor:
    """x, contiguous, in the compute type."""
    check_fit(x, rows)
    return x.to(_F64 if _F64 in (x.dtype, rows.dtype) else torch.float32).contiguous()
