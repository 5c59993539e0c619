"""The compiled CPU kernels: checks what pointers cannot, and hands them over.

The signatures are those of :mod:`memokern.ops` and :mod:`memokern.ops_support`. The kernels are
described in ``csrc/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memokern.backends.cpu_support import (
    CosineProjection,
    bound_scan,
    posterior_on_support,
    posterior_on_support_backward,
)
from memokern.backends.native import (
    ROW_TYPES,
    described,
    module,
    pointer,
    queried,
    queries_of,
    rows_of,
    wide,
)
from memokern.backends.reference import posterior_backward_rows

__all__ = [
    "CosineProjection",
    "bound_scan",
    "detail",
    "isa",
    "nearest",
    "posterior",
    "posterior_backward",
    "posterior_backward_rows",
    "posterior_on_support",
    "posterior_on_support_backward",
    "refuses",
    "small_mean",
    "sweep",
    "unavailable",
]

_KERNELS = {"gaussian": 0, "log": 1}
_F64 = torch.float64


def unavailable() -> str | None:
    """None where the kernels can run, else the reason in one line."""
    try:
        module()
    except ImportError as error:
        return (
            f"the compiled module is missing ({error}): install memokern where there is a C++"
            " compiler"
        )
    return None


def refuses(device_type: str) -> str | None:
    """None for tensors on the CPU, else the reason."""
    if device_type == "cpu":
        return None
    return f"it runs tensors on the CPU, and these are on {device_type}"


def isa() -> str:
    """The instruction set in use: ``baseline``, ``avx2`` or ``avx512``."""
    return str(module().isa())


def detail() -> str:
    """One line for ``memokern info``."""
    threads = torch.get_num_threads() if module().openmp else 1
    return f"compiled kernels, {isa()}, {threads} thread{'s' if threads > 1 else ''}"


def posterior(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dense sweep; see :func:`memokern.ops.posterior` for the formulas."""
    q, numbers, b = queries_of(x, rows, sigma, alpha, temperature, bias)
    mean, *stats = sweep(q, rows, numbers, b, center, sq_norms, scale, shift, kernel)
    return mean.to(x.dtype), stats[0], stats[1], stats[2], stats[3]


def sweep(
    q: Tensor,
    rows: Tensor,
    numbers: Sequence[Tensor],
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`posterior` of queries [*batch, *shape], contiguous in the compute type, and numbers
    [*batch] float64."""
    args, keep = rows_of(rows, center, sq_norms, scale, shift)
    bias = wide(bias)
    s, a, t = numbers
    if s.numel() > 1:  # they may be views of one number
        s, a, t = s.contiguous(), a.contiguous(), t.contiguous()
    mean, log_z = torch.empty_like(q), torch.empty_like(s)
    # Not views of one tensor: outputs of an operation may not alias.
    mean_logit, mean_bias = torch.empty_like(s), torch.empty_like(s)
    weight_sq = torch.empty_like(s)
    module().posterior(
        args, q.dtype == _F64, q.data_ptr(), s.numel(),
        s.data_ptr(), a.data_ptr(), t.data_ptr(), pointer(bias),
        _KERNELS[kernel], torch.get_num_threads(), mean.data_ptr(),
        log_z.data_ptr(), mean_logit.data_ptr(), mean_bias.data_ptr(), weight_sq.data_ptr(),
    )  # fmt: skip
    del keep
    return mean, log_z, mean_logit, mean_bias, weight_sq


def small_mean(
    q: Tensor,
    rows: Tensor,
    sigma: float,
    alpha: float,
    temperature: float,
    bias: Tensor | None,
    center: Tensor,
    sq_norms: Tensor,
    scale: float,
    shift: float,
) -> Tensor:
    """The mean alone, of a few queries as for :func:`sweep` with numbers that they share and a
    training set's contiguous tensors: no tensor is made but the result, nothing is checked."""
    n, d = rows.shape
    mean = torch.empty_like(q)
    args = described(
        rows.data_ptr(), n, d, d, ROW_TYPES[rows.dtype], scale, shift,
        center.data_ptr(), sq_norms.data_ptr(),
    )  # fmt: skip
    module().mean(
        args, q.dtype == _F64, q.data_ptr(), q.numel() // d, sigma, alpha, temperature,
        0 if bias is None else bias.data_ptr(), torch.get_num_threads(), mean.data_ptr(),
    )  # fmt: skip
    return mean


def posterior_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    mean: Tensor,
    log_z: Tensor,
    mean_logit: Tensor,
    mean_bias: Tensor,
    weight_sq: Tensor,
    grad_mean: Tensor,
    grad_log_z: Tensor,
    grad_mean_logit: Tensor,
    grad_mean_bias: Tensor,
    grad_weight_sq: Tensor,
    scale: float,
    shift: float,
    kernel: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, sigma, alpha, temperature and bias; see :mod:`memokern.ops`."""
    q, (s, a, t), b = queries_of(x, rows, sigma, alpha, temperature, bias)
    args, keep = rows_of(rows, center, sq_norms, scale, shift)
    # x's type rounded the mean: what is left of <g, y - mean> would be noise.
    if q.dtype != x.dtype:
        mean = posterior(
            q, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, kernel
        )[0]
    mean, grad_mean = mean.to(_F64).contiguous(), grad_mean.to(_F64).contiguous()
    stats = torch.stack([v.to(_F64) for v in (log_z, mean_logit, mean_bias, weight_sq)])
    grad_stats = torch.stack(
        [v.to(_F64) for v in (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)]
    )
    grad_x = torch.empty_like(q)
    grads = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(3))
    grad_bias = torch.empty(0 if b is None else b.shape[0], dtype=_F64)
    module().backward(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), pointer(b),
        _KERNELS[kernel], torch.get_num_threads(),
        mean.data_ptr(), stats.data_ptr(), grad_mean.data_ptr(),
        grad_stats.data_ptr(), grad_x.data_ptr(),
        *(v.data_ptr() for v in grads), 0 if b is None else grad_bias.data_ptr(),
    )  # fmt: skip
    del keep
    return grad_x.to(x.dtype), grads[0], grads[1], grads[2], grad_bias


def nearest(
    x: Tensor,
    rows: Tensor,
    k: int,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    q = queried(x, rows)
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must lie between 1 and the number of rows, {rows.shape[0]}; got {k}")
    args, keep = rows_of(rows, center, sq_norms, scale, shift)
    sq_dist = torch.empty(q.shape[0], k, dtype=_F64)
    index = torch.empty(q.shape[0], k, dtype=torch.int64)
    module().nearest(
        args,
        q.dtype == _F64,
        q.data_ptr(),
        q.shape[0],
        k,
        torch.get_num_threads(),
        sq_dist.data_ptr(),
        index.data_ptr(),
    )
    del keep
    return sq_dist, index
