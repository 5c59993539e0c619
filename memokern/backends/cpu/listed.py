"""Which rows can matter, and sums over lists of rows, by the compiled kernels."""

from __future__ import annotations

import torch

from memokern.backends.cpu.dense import (
    empty_gradients,
    empty_sums,
    in_float64,
    in_type,
    native_gradients,
)
from memokern.backends.cpu.native import (
    addresses,
    module,
    native_bounds,
    native_query,
    native_rows,
    threads,
)
from memokern.backends.cpu.projection import CosineProjection
from memokern.calls import (
    BasicSums,
    Gradients,
    Kept,
    LogitBounds,
    Query,
    RowLists,
    Rows,
    Scan,
    Sums,
)
from memokern.calls.checks import (
    check_selectable,
    name_of,
    prepared,
    prepared_bounds,
    prepared_lists,
)

_F64 = torch.float64


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """The rows that can matter to each query; see :mod:`memokern.ops` for what is proven."""
    check_selectable(query, "bound_scan")
    q, b = prepared(query, rows), query.x.shape[0]
    native, keep = native_rows(rows)
    held = prepared_bounds(bounds, b, rows)
    start = torch.empty(b + 1, dtype=torch.int64)
    threshold, level = torch.empty(b, dtype=_F64), torch.empty(b, dtype=torch.int64)
    found = module().bound_scan(
        native, native_query(q, rows), native_bounds(held), start.data_ptr(), threshold.data_ptr(),
        level.data_ptr(), threads(),
    )  # fmt: skip
    index = torch.empty(found.count, dtype=torch.int64)
    found.copy(index.data_ptr())
    del keep
    return Scan(RowLists(start, index), threshold, level)


def pruned_posterior(
    query: Query,
    rows: Rows,
    bounds: LogitBounds,
    projection: CosineProjection | None,
    costs: tuple[float, float, float] | None,
) -> tuple[Sums, Kept, int]:
    """The sums over the rows that :func:`bound_scan` would list, in one call.

    projection: of the queries to the index's coordinates; the bounds' own z, norms, margin and sq
    are then not looked at. None where they have them. costs: of a row listed, of a sweep, and of
    each query in it: those queries are given up, too, whose lists cost more than a sweep would.

    Returns the sums, which are those of no row (log_z -inf) for queries given up; what the scan
    found, level 0 and no row for these; and how many they are.
    """
    check_selectable(query, "pruned_posterior")
    q, b = prepared(query, rows), query.x.shape[0]
    native, keep = native_rows(rows)
    if projection is None:
        transform, known = None, prepared_bounds(bounds, b, rows)
        given = native_bounds(known)
    elif q.x.dtype == torch.float32:
        transform, given = projection.native, projection.native_bounds(bounds)
    else:
        raise TypeError(f"the projection takes float32 queries, not {name_of(q.x.dtype)}")
    sums = empty_sums(q)
    threshold = torch.empty(b, dtype=_F64)
    level, count = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int64)
    found = Kept(threshold, level, count)
    given_up: int = module().posterior_pruned(
        native, native_query(q, rows), transform, given, costs, addresses(sums),
        addresses(found), threads(),
    )  # fmt: skip
    del keep
    return sums if q.x.dtype == query.x.dtype else in_type(sums, query.x.dtype), found, given_up


def posterior_listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums over the rows listed, each logit by direct differences."""
    check_selectable(query, "posterior_listed")
    q = prepared(query, rows)
    native, keep = native_rows(rows._replace(center=None, sq_norms=None))
    held, sums = prepared_lists(lists, q.x.shape[0]), empty_sums(q)
    module().posterior_listed(
        native, native_query(q, rows), _native_lists(held), addresses(sums), threads()
    )
    del keep
    return in_type(sums, query.x.dtype)


def posterior_listed_backward(
    query: Query, rows: Rows, lists: RowLists, grads: BasicSums
) -> Gradients:
    """The gradients for the query.

    The weights are taken anew in float64: the forward results are not needed, and what their type
    rounded away does not enter.
    """
    q = prepared(query, rows)
    native, keep = native_rows(rows._replace(center=None, sq_norms=None))
    held, given = prepared_lists(lists, q.x.shape[0]), in_float64(grads)
    out = empty_gradients(q)
    module().posterior_listed_backward(
        native, native_query(q, rows), _native_lists(held), addresses(given),
        native_gradients(out, q),
        threads(),
    )  # fmt: skip
    del keep
    return out._replace(x=out.x.to(query.x.dtype))


def _native_lists(lists: RowLists) -> tuple[int, ...]:
    """struct RowLists."""
    return (*addresses(lists), lists.index.numel())
