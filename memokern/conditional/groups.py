"""The queries by the rows that they ask for, and what becomes of that: a part of the rows, and a
bias per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.conditional.wanted import (
    EVERY_ROW,
    Wanted,
    checked_condition,
    checked_left_out,
    count_labels,
    label_numbers,
)
from memokern.data.storage import chunks
from memokern.data.training_set import TrainingSet
from memokern.util.torch_internals import traced


class Group(NamedTuple):
    """Queries that ask for the same rows.

    at: which queries, [b] int64 into the flat batch. data: the rows that they may see. chosen:
    which of all rows these are. bias: [n] float64 or None, what their condition adds to each logit,
    less the largest.
    """

    at: Tensor
    data: TrainingSet
    chosen: Tensor | slice
    bias: Tensor | None

    def total_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of these rows, with their part of one for all rows."""
        if bias is None:
            return self.bias
        part = bias[self.chosen]
        return part if self.bias is None else part + self.bias


def squares(conditions: Tensor, c: Tensor) -> Tensor:
    """|c - c_n|^2 [N] of conditions [N, K], by direct differences; twice differentiable in c, for
    which nothing of size N x K is kept but the conditions."""
    at = c.detach()
    exact = torch.cat([(part - at).square().sum(1) for part in chunks(conditions)])
    if not c.requires_grad:
        return exact
    moved = c - at  # 0, and has c's gradient
    along = torch.mv(conditions, moved) - (at * moved).sum()
    return exact - 2 * along + moved.square().sum()


def condition_bias(conditions: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """What a condition adds to each logit, -|c - c_n|^2 / (2 h^2), less the largest of them [N]: so
    it is finite for the nearest condition, whatever h is. At h = 0 the limit: 0 where the row's
    condition is c, else -inf.

    Raises: ValueError at h = 0 where no row has the condition.
    """
    r2 = squares(conditions, c)
    least = r2.detach().argmin()
    over = r2 - r2[least]
    zero = h == 0
    if not traced(h, c) and bool(zero) and float(r2[least].detach()) > 0:
        raise ValueError(
            "at bandwidth 0 only rows with exactly the query's condition count, and no row has it:"
            f" the nearest is {math.sqrt(float(r2[least].detach())):.3g} away; use a bandwidth > 0"
        )
    width = torch.where(zero, 1.0, h)
    # What is infinite has no weight and no derivative.
    far = torch.isinf((over / width / width).detach()) | (zero & (over > 0))
    value = -0.5 * (torch.where(far, 0.0, over) / width) / width
    return torch.where(far, -torch.inf, value)


def groups(data: TrainingSet, batch: Sequence[int], wanted: Wanted) -> list[Group]:
    """The queries of a flat batch by what they ask for, in ascending order of that.

    A gradient for condition or bandwidth, and a transform or compiler, which has no values to
    compare, give each query a group of its own.

    Raises: TypeError, ValueError for what does not fit; RuntimeError on the meta device.
    """
    if data.rows.is_meta:
        raise RuntimeError(
            "labels and conditions choose rows by their values, and rows on the meta device have"
            " none: load a state first, or leave them out"
        )
    b = math.prod(batch)
    labels = None
    if wanted.label is not None:
        labels = label_numbers(wanted.label, batch, data.device, lambda: count_labels(data))
    given = checked_condition(wanted, batch, data)
    left_out = checked_left_out(wanted.leave_out, batch, data)
    keys = []
    if labels is not None:
        keys.append(labels.expand(tuple(batch)).reshape(-1, 1).to(torch.float64))
    if left_out is not None:
        keys.append(left_out[:, None].to(torch.float64))
    apart = False
    if given is not None:
        keys += [given[0], given[1][:, None]]
        apart = traced(*given) or any(v.requires_grad for v in given)
    if b == 0:
        return []
    whole = torch.arange(b, device=data.device)
    if apart or b == 1:
        members = list(whole.split(1))
    else:
        _, which = torch.unique(torch.cat(keys, 1), dim=0, return_inverse=True)
        order = torch.argsort(which, stable=True)
        members = list(order.split(torch.bincount(which).tolist()))
    found = []
    for at in members:
        first = int(at[0])
        index: Tensor | slice = slice(None)
        rows, bias = data, None
        if labels is not None:
            one = labels if labels.dim() == 0 else labels.reshape(-1)[first]
            index, rows = rows_of(data, int(one))
        if given is not None:
            assert rows.conditions is not None
            bias = condition_bias(rows.conditions, given[0][first], given[1][first])
        if left_out is not None and int(left_out[first]) >= 0:
            bias = _without(int(left_out[first]), index, rows.n, bias, data)
        found.append(Group(at, rows, index, bias))
    return found


def _without(
    row: int, index: Tensor | slice, n: int, bias: Tensor | None, data: TrainingSet
) -> Tensor | None:
    """The bias of the n rows at `index`, without one of all rows."""
    place = row
    if isinstance(index, Tensor):
        hit = (index == row).nonzero()
        if not len(hit):
            return bias  # a row of another label, which these queries do not see
        place = int(hit[0, 0])
    if n == 1:
        raise ValueError(f"row {row} is the only one that its query could see, and is left out")
    out = torch.zeros(n, dtype=torch.float64, device=data.device) if bias is None else bias.clone()
    out[place] = -torch.inf
    return out


def rows_of(data: TrainingSet, label: int) -> tuple[Tensor | slice, TrainingSet]:
    """Which rows have a label, and those rows; all for the null class."""
    labels = data.labels
    if label == EVERY_ROW and (labels is None or not bool((labels == label).any())):
        return slice(None), data
    return data.of_label(label)
