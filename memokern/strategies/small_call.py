"""The short way of small calls to the CPU kernels: their sweep takes less than the way to it.

Tensors of one number each, checks and the dispatcher take some 30 us, a sweep of a hundred 2-D
points takes 2. This way is open where the dispatcher would have nothing to do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.backends.protocol import preferred
from memokern.data.training_set import TrainingSet
from memokern.util.torch_internals import undispatched
from memokern.validate import PerQuery

# Numbers in the queries of a small call: beyond, the 30 us that the short way saves count little.
SMALL = 1 << 11


def _single(value: PerQuery) -> float:
    """A float, or the one number of a tensor that the dispatcher would have nothing to do with; NaN
    for anything else."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and undispatched(value):
        return float(value)
    return math.nan


def small_mean(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    method: str,
) -> Tensor | None:
    """`posterior(...).mean` of a few queries by the shortest way. None where a call is not of this
    kind, or has something wrong in it, which posterior() will say."""
    if not (
        type(data) is TrainingSet
        and data.index is None
        and bias is None
        and method in ("auto", "dense")
        and undispatched(x, data.rows)
    ):
        return None
    s, a, t = _single(sigma), _single(alpha), _single(temperature)
    # NaN, which stands for what is no single number, is in no range.
    if not (
        0 <= s < math.inf
        and -math.inf < a < math.inf
        and 0 < t < math.inf
        and x.dtype == (torch.float64 if data.rows.dtype == torch.float64 else torch.float32)
        and x.shape[x.dim() - len(data.shape) :] == data.shape
        and x.numel() <= SMALL
        and x.is_contiguous()
    ):
        return None
    run = getattr(preferred("cpu"), "small_mean", None)
    if run is None:
        return None
    mean: Tensor = run(x, data.as_rows(), (s, a, t), data.log_weights)
    return mean
