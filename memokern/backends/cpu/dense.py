"""The dense sweep, its gradients and the nearest rows, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cpu.native import (
    addresses,
    module,
    native_query,
    native_rows,
    row_types,
    threads,
)
from memokern.calls import BasicSums, Gradients, Query, Rows, Segments, State, Sums
from memokern.calls.checks import check_neighbours, prepared, prepared_x

_F64 = torch.float64


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep; see :mod:`memokern.ops` for the formulas."""
    q = prepared(query, rows)
    native, keep = native_rows(rows)
    sums = empty_sums(q)
    module().posterior(native, native_query(q, rows), addresses(sums), threads())
    del keep
    return sums if q.x.dtype == query.x.dtype else in_type(sums, query.x.dtype)


def posterior_segments(query: Query, rows: Rows, of: Segments) -> Sums:
    """The dense sweep of queries that each see a segment of the rows. Neighbouring queries of the
    same segment share a sweep."""
    q = prepared(query, rows)
    native, keep = native_rows(rows)
    sums, (first, end) = empty_sums(q), (v.contiguous() for v in of)
    module().posterior_segments(
        native, native_query(q, rows), first.data_ptr(), end.data_ptr(), addresses(sums), threads()
    )
    del keep
    return sums if q.x.dtype == query.x.dtype else in_type(sums, query.x.dtype)


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, not normalised; acc is in the type that the sweep accumulates in."""
    q = prepared(query, rows)
    native, keep = native_rows(rows)
    columns = [torch.empty_like(q.sigma) for _ in range(6)]
    center = torch.empty(rows.dim, dtype=_F64)
    state = State._make([*columns, torch.empty_like(q.x), torch.empty_like(q.x), center])
    module().posterior_state(native, native_query(q, rows), addresses(state), threads())
    del keep
    return state


def small_posterior(
    x: Tensor,
    rows: Rows,
    numbers: tuple[float, float, float],
    bias: Tensor | None,
    mean: Tensor | None,
    residual: Tensor | None,
    columns: Tensor | None,
) -> None:
    """The sums of a few queries [*batch, *shape], contiguous in the compute type, that share sigma,
    alpha and temperature, into what is given of mean, residual (like x) and columns: no tensor is
    made, nothing is checked.

    columns: [7, *batch] float64, for the three numbers of each query and the sums of one number.
    """
    data, scale, shift, center, sq_norms = rows[:5]
    n, d = data.shape
    # Written out where a call of Python would cost as much as what it does.
    native = (
        data.data_ptr(), n, d, d if data.is_contiguous() else data.stride(0),
        row_types()[data.dtype], scale, shift, 0 if center is None else center.data_ptr(),
        0 if sq_norms is None else sq_norms.data_ptr(),
    )  # fmt: skip
    module().small_posterior(
        native, x.data_ptr(), x.dtype is _F64, x.numel() // d, numbers,
        0 if bias is None else bias.data_ptr(), 0 if mean is None else mean.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if columns is None else columns.data_ptr(), threads(),
    )  # fmt: skip


def posterior_backward(query: Query, rows: Rows, sums: BasicSums, grads: BasicSums) -> Gradients:
    """The gradients for the query; see :mod:`memokern.ops`."""
    q = prepared(query, rows)
    native, keep = native_rows(rows)
    if q.x.dtype != query.x.dtype:
        # x's type rounded the mean: what is left of <g, y - mean> would be noise.
        sums = BasicSums(*posterior(q, rows)[:5])
    known, given, out = in_float64(sums), in_float64(grads), empty_gradients(q)
    module().posterior_backward(
        native, native_query(q, rows), addresses(known), addresses(given), native_gradients(out, q),
        threads(),
    )  # fmt: skip
    del keep
    return out._replace(x=out.x.to(query.x.dtype))


def empty_sums(query: Query) -> Sums:
    """Room for the sums of a query, mean and residual in the type of x."""
    columns = (torch.empty_like(query.sigma) for _ in range(4))
    return Sums._make([torch.empty_like(query.x), *columns, torch.empty_like(query.x)])


def in_type(sums: Sums, dtype: torch.dtype) -> Sums:
    """The sums, with mean and residual in this type."""
    mean, *columns, residual = sums
    return Sums._make([mean.to(dtype), *columns, residual.to(dtype)])


def in_float64(sums: BasicSums) -> BasicSums:
    """The sums, or their gradients, contiguous in float64: struct SumsIn."""
    return BasicSums(*(v.to(_F64).contiguous() for v in sums[:5]))


def empty_gradients(query: Query) -> Gradients:
    """Room for the gradients of a query, that of x in its type."""
    each = (
        query.sigma.new_empty(0) if v is None else torch.empty_like(v) for v in query.tensors[1:]
    )
    return Gradients(torch.empty_like(query.x), *each)


def native_gradients(out: Gradients, query: Query) -> tuple[int, ...]:
    """struct Gradients, null for what the query has not."""
    return tuple(0 if v is None else g.data_ptr() for g, v in zip(out, query.tensors, strict=True))


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    q = prepared_x(x, rows)
    check_neighbours(k, rows)
    native, keep = native_rows(rows)
    sq_dist = torch.empty(q.shape[0], k, dtype=_F64)
    index = torch.empty(q.shape[0], k, dtype=torch.int64)
    module().nearest(
        native, q.data_ptr(), q.dtype == _F64, q.shape[0], k, sq_dist.data_ptr(),
        index.data_ptr(), threads(),
    )  # fmt: skip
    del keep
    return sq_dist, index
