"""What queries ask for beside their noise level, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memokern.data.storage import as_given
from memokern.data.training_set import TrainingSet
from memokern.util.torch_internals import traced
from memokern.validate import PerQuery, broadcastable

Label = int | Tensor | Sequence[int | None] | None
# The label of queries that use all rows: the null class of guidance.
EVERY_ROW = -1


@dataclass(frozen=True)
class Wanted:
    """What queries ask for beside their noise level; :func:`memokern.posterior` describes each."""

    label: Label = None
    condition: Tensor | None = None
    bandwidth: PerQuery | None = None
    leave_out: int | Tensor | None = None

    @property
    def label_alone(self) -> bool:
        """Whether nothing but a label is asked for."""
        return self.label is not None and self.condition is None and self.leave_out is None

    def __bool__(self) -> bool:
        return not (self.label is None and self.condition is None and self.leave_out is None)


def label_numbers(
    label: Label, batch: Sequence[int], device: torch.device, count: Callable[[], int]
) -> Tensor:
    """Labels as integers [] or [*batch]: given so, with None for -1, or one-hot
    [*batch, count()], where a query of zeros is -1. Only one-hot labels are counted.

    Raises: TypeError, ValueError for anything else.
    """
    if isinstance(label, list | tuple):
        label = [EVERY_ROW if v is None else v for v in label]
    labels = as_given(label, "label").to(device)
    if labels.is_floating_point() and labels.shape == (*batch, count() or -1):
        total = labels.sum(-1)
        if not bool(((labels == 0) | (labels == 1)).all()) or bool((total > 1).any()):
            raise ValueError("expected label as integers, or one-hot with one 1 or none per query")
        return torch.where(total == 0, EVERY_ROW, labels.argmax(-1))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected label as integers, got {labels.dtype}")
    if labels.dim() and labels.shape != tuple(batch):
        raise ValueError(
            f"expected label as one integer or one per query {tuple(batch)}, got"
            f" {tuple(labels.shape)}"
        )
    return labels


def count_labels(data: TrainingSet) -> int:
    """1 more than the largest label; 0 without labels."""
    count: int = data.label_count()
    return count


def checked_condition(
    wanted: Wanted, batch: Sequence[int], data: TrainingSet
) -> tuple[Tensor, Tensor] | None:
    """The condition [B, K] and the bandwidth [B], float64."""
    condition, bandwidth = wanted.condition, wanted.bandwidth
    if condition is None:
        if bandwidth is not None:
            raise ValueError("bandwidth is that of a condition: give condition= too")
        return None
    if data.conditions is None:
        raise ValueError(
            "this training set has no conditions: make it with conditions= [N, K], one for each row"
        )
    if bandwidth is None:
        raise ValueError("condition needs a bandwidth >= 0, in the units of the conditions")
    k = data.conditions.shape[1]
    c = as_given(condition, "condition").to(data.device)
    if c.is_complex() or c.dtype == torch.bool:
        raise TypeError(f"expected condition as real numbers, got {c.dtype}")
    c = c.to(torch.float64)
    one = c.numel() == k and tuple(c.shape[:1]) != tuple(batch[:1])
    if k == 1 and tuple(c.shape) == tuple(batch):
        c = c[..., None]
    elif one or tuple(c.shape[: len(batch)]) != tuple(batch):
        c = c.reshape(-1) if c.numel() == k else c
        if c.shape != (k,):
            raise ValueError(
                f"expected condition [{k}] or one per query {[*batch, k]}, got"
                f" {list(as_given(condition, 'condition').shape)}"
            )
        c = c.expand(*batch, k)
    c = c.reshape(*batch, math.prod(c.shape[len(batch) :]))
    if c.shape[-1] != k:
        raise ValueError(f"expected condition of {k} numbers, as the rows', got {c.shape[-1]}")
    h = broadcastable("bandwidth", bandwidth, batch, data.device).expand(tuple(batch))
    if not traced(c, h):
        if not bool(torch.isfinite(c).all()):
            raise ValueError("expected a finite condition, got NaN or inf")
        good = (h >= 0) & (h < math.inf)
        if not bool(good.all()):
            raise ValueError(f"expected bandwidth finite and >= 0, got {float(h[~good][0])}")
    return c.reshape(-1, k), h.reshape(-1)


def checked_left_out(
    leave_out: int | Tensor | None, batch: Sequence[int], data: TrainingSet
) -> Tensor | None:
    """The number of the row that each query leaves out [B] int64, -1 for none."""
    if leave_out is None:
        return None
    found = as_given(leave_out, "leave_out").to(data.device)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"expected leave_out as row numbers (integers), got {found.dtype}")
    if found.dim() and tuple(found.shape) != tuple(batch):
        got = tuple(found.shape)
        raise ValueError(
            f"expected leave_out as one row or one per query {tuple(batch)}, got {got}"
        )
    if (
        not traced(found)
        and found.numel()
        and not -1 <= int(found.min()) <= int(found.max()) < data.n
    ):
        raise ValueError(
            f"expected leave_out in 0..{data.n - 1}, or -1 for none, got"
            f" {int(found.min())}..{int(found.max())}"
        )
    return found.to(torch.int64).expand(tuple(batch)).reshape(-1)
