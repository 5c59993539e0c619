"""Rows of every kind that bounds may find hard, and data sets with a plain index of them."""

import torch
from torch import Tensor

from memokern import TrainingSet
from tests.cases import F64, normal
from tests.plain_index import with_index


def rows_of(kind: str, n: int, d: int, seed: int) -> Tensor:
    """[n, d] float64."""
    z = normal(n, d, seed=seed)
    if kind == "random":
        return z
    if kind == "clustered":
        return 5 * normal(3, d, seed=seed + 1)[torch.arange(n) % 3] + 0.05 * z
    if kind == "low-rank":
        return z[:, :2] @ normal(2, d, seed=seed + 1) + 1e-4 * z
    if kind == "duplicated":
        return z[torch.arange(n) % max(1, n // 3)]
    if kind == "integer":  # many rows at the same distance
        return z.round()
    assert kind == "adversarial"
    return adversarial_rows(n, d, seed)


def adversarial_rows(n: int, d: int, seed: int) -> Tensor:
    """All that differs lies in the last coordinates, in one direction, with both signs."""
    rows = 0.01 * normal(n, d, seed=seed)
    sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).to(F64)
    rows[:, -3:] += sign[:, None] * torch.tensor([2.0, 2.0, 2.0], dtype=F64)
    return rows


def indexed(n: int = 300, d: int = 24, dtype: torch.dtype = F64, **how: Tensor) -> TrainingSet:
    """Rows whose variance falls from feature to feature, with a plain index."""
    rows = (normal(n, d, seed=5) * torch.logspace(0, -1, d)).to(dtype)
    return with_index(TrainingSet(rows, **how))
