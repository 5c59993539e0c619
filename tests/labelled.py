"""A small set of rows with labels, conditions and weights, and queries of them."""

from __future__ import annotations

import torch

from memokern import TrainingSet
from tests import cases
from tests.cases import F64

N, D, K, B = 60, 5, 2, 6


def normal(*shape, seed=0):
    return cases.normal(*shape, seed=seed)


ROWS, CONDITIONS = normal(N, D, seed=1), normal(N, K, seed=2)
LABELS = torch.arange(N) % 7
LOG_WEIGHTS = normal(N, seed=3)
X, SIGMA = normal(B, D, seed=4), 0.3 + torch.rand(B, dtype=F64)
ASKED = {
    "label": torch.tensor([3, 0, 3, 6, 0, 3]),
    "condition": normal(B, K, seed=5)[[0, 1, 0, 2, 3, 0]],
    "bandwidth": torch.tensor([0.5, 0.2, 0.5, 3.0, 1e-3, 0.7], dtype=F64),
    "leave_out": torch.tensor([3, 7, 3, -1, 0, 10]),
}
CASES = {
    "label": ("label",),
    "condition": ("condition", "bandwidth"),
    "leave-out": ("leave_out",),
    "all": tuple(ASKED),
}


def data_of(dtype=F64, **more):
    own = {"labels": LABELS, "conditions": CONDITIONS, "log_weights": LOG_WEIGHTS}
    return TrainingSet(ROWS.to(dtype), **own | more)
