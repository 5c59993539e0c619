"""The dense sweep, its gradients and the nearest rows, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cpu.native import ROW_TYPES, described, module, native_rows, pointer
from memokern.calls import Gradients, Query, Rows, Sums
from memokern.calls.checks import check_neighbours, prepared, prepared_x

WEIGHTINGS = {"gaussian": 0, "log": 1}
_F64 = torch.float64


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep; see :mod:`memokern.ops` for the formulas."""
    q = prepared(query, rows)
    args, keep = native_rows(rows)
    sigma = q.sigma
    sums = Sums(torch.empty_like(q.x), *(torch.empty_like(sigma) for _ in range(4)))
    module().posterior(
        args, q.x.dtype == _F64, q.x.data_ptr(), sigma.numel(), sigma.data_ptr(),
        q.alpha.data_ptr(), q.temperature.data_ptr(), pointer(q.bias), WEIGHTINGS[q.weighting],
        torch.get_num_threads(), *(v.data_ptr() for v in sums),
    )  # fmt: skip
    del keep
    return sums if q.x.dtype == query.x.dtype else sums._replace(mean=sums.mean.to(query.x.dtype))


def small_mean(
    x: Tensor, rows: Rows, numbers: tuple[float, float, float], log_weights: Tensor | None
) -> Tensor:
    """The mean alone, of a few queries [*batch, *shape], contiguous in the compute type, that share
    sigma, alpha and temperature, over a training set's contiguous tensors: no tensor is made but
    the result, nothing is checked."""
    data, center, sq_norms = rows.data, rows.center, rows.sq_norms
    assert center is not None and sq_norms is not None
    n, d = data.shape
    mean = torch.empty_like(x)
    args = described(
        data.data_ptr(), n, d, d, ROW_TYPES[data.dtype], rows.scale, rows.shift,
        center.data_ptr(), sq_norms.data_ptr(),
    )  # fmt: skip
    module().mean(
        args, x.dtype == _F64, x.data_ptr(), x.numel() // d, *numbers,
        0 if log_weights is None else log_weights.data_ptr(), torch.get_num_threads(),
        mean.data_ptr(),
    )  # fmt: skip
    return mean


def posterior_backward(query: Query, rows: Rows, sums: Sums, grads: Sums) -> Gradients:
    """The gradients for the query; see :mod:`memokern.ops`."""
    q = prepared(query, rows)
    args, keep = native_rows(rows)
    # x's type rounded the mean: what is left of <g, y - mean> would be noise.
    mean = sums.mean if q.x.dtype == query.x.dtype else posterior(q, rows).mean
    mean, grad_mean = mean.to(_F64).contiguous(), grads.mean.to(_F64).contiguous()
    stats, grad_stats = stacked(sums), stacked(grads)
    out = empty_gradients(q)
    module().backward(
        args, q.x.dtype == _F64, q.x.data_ptr(), q.x.shape[0], q.sigma.data_ptr(),
        q.alpha.data_ptr(), q.temperature.data_ptr(), pointer(q.bias), WEIGHTINGS[q.weighting],
        torch.get_num_threads(), mean.data_ptr(), stats.data_ptr(), grad_mean.data_ptr(),
        grad_stats.data_ptr(), *(v.data_ptr() for v in out[:4]),
        0 if q.bias is None else out.bias.data_ptr(),
    )  # fmt: skip
    del keep
    return out._replace(x=out.x.to(query.x.dtype))


def stacked(sums: Sums) -> Tensor:
    """log_z, mean_logit, mean_bias and weight_sq, or their gradients, as [4, B] float64."""
    return torch.stack([v.to(_F64) for v in sums[1:]])


def empty_gradients(query: Query) -> Gradients:
    """Room for the gradients of a query, that of x in its type."""
    each = [torch.empty_like(query.sigma) for _ in range(3)]
    bias = torch.empty(0, dtype=_F64) if query.bias is None else torch.empty_like(query.bias)
    return Gradients._make([torch.empty_like(query.x), *each, bias])


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    q = prepared_x(x, rows)
    check_neighbours(k, rows)
    args, keep = native_rows(rows)
    sq_dist = torch.empty(q.shape[0], k, dtype=_F64)
    index = torch.empty(q.shape[0], k, dtype=torch.int64)
    module().nearest(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0], k, torch.get_num_threads(),
        sq_dist.data_ptr(), index.data_ptr(),
    )  # fmt: skip
    del keep
    return sq_dist, index
