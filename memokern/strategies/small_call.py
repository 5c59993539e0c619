"""The short way of small calls to the CPU kernels: their sweep takes less than the way to it.

Tensors of one number each, checks, call objects and the dispatcher take some 80 us, a sweep of a
hundred 2-D points takes 2. This way is open where the dispatcher would have nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.backends.protocol import preferred
from memokern.calls import Rows
from memokern.data.training_set import TrainingSet
from memokern.util.torch_internals import undispatched
from memokern.validate import PerQuery, as_data

# Numbers in the queries of a small call: beyond, what the short way saves counts little.
SMALL = 1 << 11
_INF = math.inf


class Small(NamedTuple):
    """A small call, checked: one value for sigma, alpha and temperature, which all queries share.

    x: contiguous [*batch, *shape] in the type that the sweep accumulates in. run: the kernel.
    """

    x: Tensor
    rows: Rows
    shape: tuple[int, ...]
    log_weights: Tensor | None
    numbers: tuple[float, float, float]
    run: Callable[..., None]


def small_call(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    method: str,
    precision: str = "auto",
) -> Small | None:
    """The call, if it is of this kind. None where it is not, or has something wrong in it, which
    posterior() will say."""
    if not (bias is None and method in ("auto", "dense") and precision == "auto"):
        return None
    if method == "auto" and type(data) is TrainingSet and data.is_indexed:
        return None
    if not undispatched(x):
        return None
    s = sigma if type(sigma) is float else _single(sigma)
    a = alpha if type(alpha) is float else _single(alpha)
    t = temperature if type(temperature) is float else _single(temperature)
    # NaN, which stands for what is no single number, is in no range.
    if not (0 <= s < _INF and -_INF < a < _INF and 0 < t < _INF):
        return None
    if type(data) is TrainingSet:
        rows, shape, log_weights = data.plain_rows(), data.shape, data.log_weights
        if rows is None:
            return None
    elif isinstance(data, Tensor) and undispatched(data):
        rows, shape, log_weights = as_data(data)
    else:
        return None
    if not (
        x.dtype == (torch.float64 if rows.data.dtype == torch.float64 else torch.float32)
        and x.shape[-len(shape) or x.dim() :] == shape
        and x.numel() <= SMALL
        and x.is_contiguous()
    ):
        return None
    run = getattr(preferred("cpu"), "small_posterior", None)
    if run is None:
        return None
    # Four times as fast as Small(...), which is a function of Python.
    return tuple.__new__(Small, (x, rows, shape, log_weights, (s, a, t), run))


def _single(value: PerQuery) -> float:
    """The one number of a tensor that the dispatcher would have nothing to do with; NaN for
    anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and undispatched(value):
        return float(value)
    return math.nan


def small_mean(call: Small) -> Tensor:
    """The mean [*batch, *shape] alone."""
    mean = torch.empty_like(call.x)
    call.run(call.x, call.rows, call.numbers, call.log_weights, mean, None, None)
    return mean


def small_residual(call: Small) -> Tensor:
    """The residual [*batch, *shape] alone."""
    residual = torch.empty_like(call.x)
    call.run(call.x, call.rows, call.numbers, call.log_weights, None, residual, None)
    return residual


def small_posterior(call: Small) -> tuple[Tensor, ...]:
    """Mean and residual, and [*batch] float64 sigma, alpha, temperature, log_z, mean_logit,
    mean_bias, weight_sq."""
    x = call.x
    batch = x.shape[: x.dim() - len(call.shape)]
    columns = torch.empty((7, *batch), dtype=torch.float64, device="cpu")
    mean, residual = torch.empty_like(x), torch.empty_like(x)
    call.run(x, call.rows, call.numbers, call.log_weights, mean, residual, columns)
    return mean, residual, *columns.unbind()
