"""Short ways to the CPU kernels: for small calls, whose sweep takes less than the way to it.

The dispatcher, tensors of one number each and checks take some 30 us, a sweep of a hundred 2-D
points takes 2. These ways are open where the dispatcher would have nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memokern import backends
from memokern.data import TrainingSet
from memokern.queries import PerQuery, Rows, undispatched

# Numbers in the queries of a small call: beyond, the 30 us that the short way saves count little.
SMALL = 1 << 11


def sweep_of(x: Tensor, rows: Rows, *others: Tensor | None) -> Callable[..., Any] | None:
    """The backend's own `sweep`, where it has one that takes x as it is and the dispatcher would
    have nothing else to do."""
    if not (undispatched(x, rows.rows, *others) and x.is_contiguous()):
        return None
    if x.dtype == torch.float32 and rows.rows.dtype == torch.float64:
        return None  # computed in float64
    return getattr(backends.choose_for("cpu"), "sweep", None)


def small_mean(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    method: str,
) -> Tensor | None:
    """`posterior(...).mean` of a few queries by the shortest way: their sweep takes less time than
    the general way to it. None where a call is not of this kind, or has something wrong in it,
    which posterior() will say."""
    if not (
        type(data) is TrainingSet
        and data.index is None
        and type(sigma) is type(alpha) is type(temperature) is float
        and bias is None
        and method in ("auto", "dense")
        and undispatched(x, data.rows)
        and 0 <= sigma < math.inf
        and -math.inf < alpha < math.inf
        and 0 < temperature < math.inf
        and x.dtype == (torch.float64 if data.rows.dtype == torch.float64 else torch.float32)
        and x.shape[x.dim() - len(data.shape) :] == data.shape
        and x.numel() <= SMALL
        and x.is_contiguous()
    ):
        return None
    run = getattr(backends.choose_for("cpu"), "small_mean", None)
    if run is None:
        return None
    mean: Tensor = run(
        x, data.rows, sigma, alpha, temperature, data.log_weights,
        data.center64, data.sq_norms, data.scale, data.shift,
    )  # fmt: skip
    return mean
