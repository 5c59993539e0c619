"""What compiled kernels, which see only pointers, need to be true of a call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.calls.arguments import (
    WEIGHTINGS,
    Blocks,
    Condition,
    LogitBounds,
    Query,
    RowLists,
    Rows,
)

F64 = torch.float64
ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# The rounding that the bounds of a scan allow for is that of so many levels.
MOST_LEVELS = 16
# Of the blocks of an index, as csrc/include/memokern/constants.h has them: rows of a block, blocks
# of a panel, leading coordinates that a box bounds one by one.
BLOCK_ROWS, PANEL_BLOCKS, BOX_COORDINATES = 24, 16, 16


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_rows(rows: Rows) -> None:
    """TypeError or ValueError unless kernels can read these rows."""
    if rows.data.dtype not in ROW_DTYPES:
        known = ", ".join(name_of(t) for t in ROW_DTYPES)
        raise TypeError(f"rows must be one of {known}, not {name_of(rows.data.dtype)}")
    if (rows.center is None) != (rows.sq_norms is None):
        raise ValueError("center and sq_norms belong together: give both or neither")
    check_stride(rows.data)
    if rows.center is not None and rows.center.shape != (rows.dim,):
        raise ValueError(f"center must have shape [{rows.dim}], not {list(rows.center.shape)}")
    if rows.sq_norms is not None and rows.sq_norms.shape != (rows.n,):
        raise ValueError(f"sq_norms must have shape [{rows.n}], not {list(rows.sq_norms.shape)}")


def check_stride(data: Tensor) -> None:
    """ValueError unless each row is contiguous."""
    if data.shape[1] > 1 and data.stride(1) != 1:
        raise ValueError(
            f"each row must be contiguous (stride 1), not stride {data.stride(1)}: call"
            " rows.contiguous() once"
        )


def check_fit(x: Tensor, data: Tensor) -> None:
    """ValueError unless the queries are as long as the rows, and there are rows."""
    if x.ndim != 2 or data.ndim != 2 or x.shape[1] != data.shape[1] or data.shape[0] < 1:
        raise ValueError(
            f"expected x [B, D] and rows [N >= 1, D], not {list(x.shape)} and {list(data.shape)}"
        )
    if x.device != data.device:
        raise ValueError(f"x and rows must be on one device, not {x.device} and {data.device}")


def check_neighbours(k: int, rows: Rows) -> None:
    """ValueError unless there are k rows."""
    if not 1 <= k <= rows.n:
        raise ValueError(f"k must lie between 1 and the number of rows, {rows.n}; got {k}")


def check_weighting(weighting: str) -> None:
    """ValueError for a weighting that does not exist."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be {' or '.join(WEIGHTINGS)}, not {weighting!r}")


def check_selectable(query: Query, operation: str) -> None:
    """ValueError for what an operation on selected rows does not have."""
    if query.weighting != "gaussian":
        raise ValueError(f'{operation} has the weighting "gaussian" only, not {query.weighting!r}')
    if query.own_bias:
        raise ValueError(
            f"{operation} has no condition and no leave_out: sweep over all rows (posterior), or"
            " give them as a bias"
        )


def contiguous64(tensor: Tensor) -> Tensor:
    """The tensor as contiguous float64, the same one where it is that."""
    if tensor.dtype == F64 and tensor.is_contiguous():
        return tensor
    return tensor.to(F64).contiguous()


def shaped(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """The tensor, contiguous; ValueError unless it has the shape and one of the dtypes."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        kinds = " or ".join(name_of(d) for d in dtypes)
        raise ValueError(
            f"{name} must be {kinds} {list(shape)}, not {name_of(tensor.dtype)}"
            f" {list(tensor.shape)}"
        )
    return tensor.contiguous()


def prepared(query: Query, rows: Rows) -> Query:
    """The query as kernels take it: x contiguous in the type that the sweep accumulates in, the
    rest contiguous float64. Errors name what does not fit."""
    x = prepared_x(query.x, rows)
    check_weighting(query.weighting)
    sigma, alpha = contiguous64(query.sigma), contiguous64(query.alpha)
    temperature, bias = contiguous64(query.temperature), query.bias
    each = (x.shape[0],)
    if not (sigma.shape == alpha.shape == temperature.shape == each):
        for name, t in (("sigma", sigma), ("alpha", alpha), ("temperature", temperature)):
            if t.shape != each:
                raise ValueError(f"{name} must have shape {list(each)}, not {list(t.shape)}")
    if bias is not None:
        bias = contiguous64(bias)
        if bias.shape != (rows.n,):
            raise ValueError(f"bias must have shape [{rows.n}], not {list(bias.shape)}")
    condition, leave_out = query.condition, query.leave_out
    if condition is not None:
        condition = _prepared_condition(condition, rows, len(x))
    if leave_out is not None:
        leave_out = shaped("leave_out", leave_out, each, torch.int64)
    return query._replace(
        x=x, sigma=sigma, alpha=alpha, temperature=temperature, bias=bias, condition=condition,
        leave_out=leave_out,
    )  # fmt: skip


def _prepared_condition(condition: Condition, rows: Rows, b: int) -> Condition:
    """The condition, contiguous; ValueError unless it fits b queries and the rows."""
    k = condition.c.shape[-1]
    if rows.conditions is None:
        raise ValueError("a condition needs the rows' conditions [N, K]")
    if rows.conditions.shape != (rows.n, k) or not rows.conditions.is_contiguous():
        raise ValueError(
            f"the rows' conditions must be contiguous [{rows.n}, {k}], not"
            f" {list(rows.conditions.shape)}"
        )
    shaped("conditions", rows.conditions, (rows.n, k), F64)
    return Condition(
        shaped("condition", condition.c, (b, k), F64),
        shaped("bandwidth", condition.h, (b,), F64),
        shaped("anchor", condition.a, (b, k), F64),
    )


def prepared_x(x: Tensor, rows: Rows) -> Tensor:
    """x, contiguous, in the type that a sweep over these rows accumulates in."""
    check_fit(x, rows.data)
    compute = F64 if rows.data.dtype == F64 or x.dtype == F64 else torch.float32
    return x if x.dtype == compute and x.is_contiguous() else x.to(compute).contiguous()


def prepared_lists(lists: RowLists, b: int) -> RowLists:
    """The lists, contiguous; ValueError unless they are of b queries."""
    start = shaped("start", lists.start, (b + 1,), torch.int64)
    return RowLists(start, shaped("index", lists.index, (lists.index.numel(),), torch.int64))


def check_lists(lists: RowLists, n: int) -> None:
    """ValueError unless the lists are lists of n rows. Waits for the device that they are on."""
    start, index = lists
    m = len(index)
    good = (start[0] == 0) & (start[-1] == m) & (start.diff() >= 0).all()
    good &= ((index >= 0) & (index < n)).all()
    if not bool(good):
        raise ValueError(f"start must go from 0 to {m} without falling, and index lie in [0, {n})")


def prepared_bounds(bounds: LogitBounds, b: int, rows: Rows) -> LogitBounds:
    """The bounds, contiguous; ValueError unless they fit b queries and the rows, and each other."""
    dims, bands = bounds.dims, bands_of(bounds)
    check_eps(rows.n, bounds.eps, bounds.most_listed)
    if not bounds.reading >= 0:
        raise ValueError(f"reading must be at least 0, not {bounds.reading}")
    f32, kept = torch.float32, dims[-1]
    return bounds._replace(
        coarse=shaped("coarse", bounds.coarse, (rows.n, dims[0] + bands + 1), f32),
        fine=shaped("fine", bounds.fine, (rows.n, kept - dims[0]), torch.float16, f32),
        z=shaped("z", bounds.z, (b, kept), f32),
        norms=shaped("norms", bounds.norms, (b, bands + 1), f32),
        margin=shaped("margin", bounds.margin, (b,), F64),
        sq=shaped("sq", bounds.sq, (b,), F64),
        most_listed=min(bounds.most_listed, rows.n),
        blocks=prepared_blocks(bounds.blocks, rows.n, dims[0], bands),
    )


def box_numbers(k0: int, bands: int) -> int:
    """The numbers of a box: leading coordinates, the norm of the others, and norms of bands."""
    return min(k0, BOX_COORDINATES) + (k0 > BOX_COORDINATES) + bands


def prepared_blocks(blocks: Blocks | None, n: int, k0: int, bands: int) -> Blocks | None:
    """The blocks, contiguous; ValueError unless they fit n rows with such a level 0."""
    if blocks is None:
        return None
    order, coarse, half, boxes, hulls, excess = blocks
    return Blocks(
        shaped("order", order, (n,), torch.int32),
        shaped("coarse", coarse, (n, k0 + bands + 1), torch.float32),
        shaped("half", half, (n,), torch.float32),
        *prepared_boxes(boxes, hulls, n, k0, bands),
        float(excess),
    )


def prepared_boxes(
    boxes: Tensor, hulls: Tensor, n: int, k0: int, bands: int
) -> tuple[Tensor, Tensor]:
    """The boxes of the blocks of n rows, and those of their panels."""
    box = box_numbers(k0, bands)
    panels = -(-n // (BLOCK_ROWS * PANEL_BLOCKS))
    groups = -(-panels // PANEL_BLOCKS)
    return (
        shaped("boxes", boxes, (panels, box, 2, PANEL_BLOCKS), torch.float32),
        shaped("hulls", hulls, (groups, box, 2, PANEL_BLOCKS), torch.float32),
    )


def bands_of(bounds: LogitBounds) -> int:
    """The number of bands; ValueError unless dims and first_band are those of an index."""
    dims, first_band = bounds.dims, bounds.first_band
    if not 1 <= len(dims) <= MOST_LEVELS or len(first_band) != len(dims):
        raise ValueError(
            f"dims must have 1 to {MOST_LEVELS} levels and first_band as many,"
            f" not {len(dims)} and {len(first_band)}"
        )
    bands = bounds.coarse.shape[-1] - dims[0] - 1
    ups = all(a < b for a, b in zip([0, *dims], dims, strict=False))
    in_order = all(a <= b for a, b in zip([0, *first_band], first_band, strict=False))
    if not ups or not in_order or first_band[0] != 0 or first_band[-1] > bands:
        raise ValueError(
            f"dims must increase from 1 and first_band from 0 to at most the {bands} bands of"
            f" coarse; got dims={list(dims)}, first_band={list(first_band)}"
        )
    return bands


def check_eps(n: int, eps: float, most_listed: int) -> None:
    """ValueError unless eps is a share of the weight and lists may hold something."""
    if not 0 < eps < 1 or not math.isfinite(n / eps):
        raise ValueError(f"eps must lie between 0 and 1, both excluded; got {eps}")
    if most_listed < 1 or n >= 2**32:
        raise ValueError(
            f"most_listed must be at least 1 and rows below 2^32, not {most_listed} and {n}"
        )
