"""Which rows can matter, and sums over lists of rows, by the compiled kernels."""

from __future__ import annotations

import torch

from memokern.backends.cpu.dense import empty_gradients, stacked
from memokern.backends.cpu.native import module, native_rows, pointer
from memokern.calls import Gradients, LogitBounds, Query, RowLists, Rows, Scan, Sums
from memokern.calls.checks import bands_of, prepared, prepared_bounds, prepared_lists

_F64 = torch.float64


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """The rows that can matter to each query; see :mod:`memokern.ops` for what is proven."""
    q, m = prepared(query, rows), query.x.shape[0]
    args, keep = native_rows(rows)
    held = prepared_bounds(bounds, m, rows)
    dims = torch.tensor(held.dims, dtype=torch.int64)
    first_band = torch.tensor(held.first_band, dtype=torch.int64)
    start = torch.empty(m + 1, dtype=torch.int64)
    threshold, level = torch.empty(m, dtype=_F64), torch.empty(m, dtype=torch.int64)
    found = module().bound_scan(
        args, q.x.dtype == _F64, q.x.data_ptr(), m, q.sigma.data_ptr(), q.alpha.data_ptr(),
        q.temperature.data_ptr(), pointer(q.bias), held.coarse.data_ptr(), held.fine.data_ptr(),
        held.fine.dtype == torch.float16, held.z.data_ptr(), held.norms.data_ptr(),
        held.margin.data_ptr(), held.sq.data_ptr(), dims.data_ptr(), first_band.data_ptr(),
        len(dims), bands_of(held), held.eps, held.most_listed, torch.get_num_threads(),
        start.data_ptr(), threshold.data_ptr(), level.data_ptr(),
    )  # fmt: skip
    index = torch.empty(found.count, dtype=torch.int64)
    found.copy(index.data_ptr())
    del keep
    return Scan(RowLists(start, index), threshold, level)


def posterior_listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums over the rows listed, each logit by direct differences."""
    q = prepared(query, rows)
    args, keep = native_rows(rows._replace(center=None, sq_norms=None))
    start, index = prepared_lists(lists, q.x.shape[0])
    sums = Sums(torch.empty_like(q.x), *(torch.empty_like(q.sigma) for _ in range(4)))
    module().support(
        args, q.x.dtype == _F64, q.x.data_ptr(), q.x.shape[0], q.sigma.data_ptr(),
        q.alpha.data_ptr(), q.temperature.data_ptr(), pointer(q.bias), start.data_ptr(),
        index.data_ptr(), len(index), torch.get_num_threads(), *(v.data_ptr() for v in sums),
    )  # fmt: skip
    del keep
    return sums._replace(mean=sums.mean.to(query.x.dtype))


def posterior_listed_backward(query: Query, rows: Rows, lists: RowLists, grads: Sums) -> Gradients:
    """The gradients for the query.

    The weights are taken anew in float64: the forward results are not needed, and what their type
    rounded away does not enter.
    """
    q = prepared(query, rows)
    args, keep = native_rows(rows._replace(center=None, sq_norms=None))
    start, index = prepared_lists(lists, q.x.shape[0])
    grad_mean, grad_stats = grads.mean.to(_F64).contiguous(), stacked(grads)
    out = empty_gradients(q)
    module().support_backward(
        args, q.x.dtype == _F64, q.x.data_ptr(), q.x.shape[0], q.sigma.data_ptr(),
        q.alpha.data_ptr(), q.temperature.data_ptr(), pointer(q.bias), start.data_ptr(),
        index.data_ptr(), len(index), torch.get_num_threads(), grad_mean.data_ptr(),
        grad_stats.data_ptr(), *(v.data_ptr() for v in out[:4]),
        0 if q.bias is None else out.bias.data_ptr(),
    )  # fmt: skip
    del keep
    return out._replace(x=out.x.to(query.x.dtype))
