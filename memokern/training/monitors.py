"""Metrics of a run that look at samples: how many are copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from memokern import memorization, samplers
from memokern.data.training_set import TrainingSet
from memokern.memorization import Memorization
from memokern.training.learned import LearnedDenoiser
from memokern.util import checks

Criterion = Callable[[Tensor, TrainingSet], Memorization]
Sampler = Callable[[LearnedDenoiser], Tensor]


def memorised(
    data: TrainingSet | Tensor,
    count: int = 64,
    *,
    criterion: Criterion = memorization.ratio,
    steps: int = samplers.ODE_STEPS,
    seed: int = 0,
    sampler: Sampler | None = None,
) -> Callable[[LearnedDenoiser], float]:
    """A metric for :class:`.Trainer`: the memorised fraction of `count` samples, from the same
    starts each time.

    Args:
        data: the training rows. criterion: of samples and data, by default
            :func:`memokern.memorization.ratio`.
        steps, seed: of Heun's method on the probability flow.
        sampler: what draws the samples instead.

    Example:
        >>> import torch
        >>> from memokern.training import MLP, LearnedDenoiser, memorised
        >>> _ = torch.manual_seed(0)
        >>> fraction = memorised(torch.eye(2), 8, steps=4)
        >>> 0 <= fraction(LearnedDenoiser(MLP((2,), width=8))) <= 1
        True
    """
    rows = data if isinstance(data, TrainingSet) else TrainingSet(data)
    count = checks.integer("count", count, 1)

    def fraction(model: LearnedDenoiser) -> float:
        x = samplers.ode(model, count, steps, seed=seed).x if sampler is None else sampler(model)
        return judged(x.to(rows.device), rows, criterion).fraction

    return fraction


def judged(x: Tensor, rows: TrainingSet, criterion: Criterion) -> Memorization:
    """What the criterion says of a network's samples: without the warning that their range is not
    that of the rows, which is true of networks that have hardly learned anything."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the samples lie in", UserWarning)
        return criterion(x, rows)
