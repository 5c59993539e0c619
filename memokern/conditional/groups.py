"""The queries by the rows that they ask for, and what becomes of that: a part of the rows, and a
bias per row that they share, or one of each query's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Condition, Rows, condition_bias, condition_squares
from memokern.conditional.lists import NONE, Allowed, of_labels
from memokern.conditional.wanted import (
    EVERY_ROW,
    Wanted,
    checked_condition,
    checked_left_out,
    label_numbers,
)
from memokern.data.parted import PartedSet
from memokern.data.sharded import ShardedSet
from memokern.data.training_set import TrainingSet
from memokern.strategies import parted
from memokern.sweep import NOTHING, Own
from memokern.util.torch_internals import primal, traced, under_transform

# Numbers up to which all pairs of conditions are compared at once, with no kernel's call.
FEW = 1 << 20


class Group(NamedTuple):
    """Queries that share a sweep.

    at: which queries, [b] int64 into the flat batch. data: the rows that they may see. chosen:
    which of all rows these are. bias: [n] float64 or None, what their condition adds to each logit,
    less the largest, where they share it. own: what they do not share.
    """

    at: Tensor
    data: TrainingSet
    chosen: Tensor | slice
    bias: Tensor | None
    own: Own = NOTHING

    @property
    def is_whole(self) -> bool:
        """Whether it has all queries in their order, each with rows of its own."""
        return self.own.lists is not None or self.own.segments is not None

    def total_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of these rows, with their part of one for all rows."""
        if bias is None:
            return self.bias
        part = bias[self.chosen]
        return part if self.bias is None else part + self.bias


def groups(
    data: TrainingSet,
    batch: Sequence[int],
    wanted: Wanted,
    together: bool,
    allowed: Allowed = NONE,
) -> list[Group]:
    """The queries of a flat batch by their label, in ascending order of that; within a label all
    together, or by what else they ask for. Where they ask for labels alone, nearly as many as there
    are queries, one group in which each has rows of its own, in a way that is allowed.

    A gradient for condition or bandwidth, and a transform or compiler, which has no values to
    compare, count as queries that all ask for something else.

    Raises: TypeError, ValueError for what does not fit; RuntimeError on the meta device.
    """
    if data.rows.is_meta:
        raise RuntimeError(
            "labels and conditions choose rows by their values, and rows on the meta device have"
            " none: load a state first, or leave them out"
        )
    b = math.prod(batch)
    labels, given, left_out = _checked(data, batch, wanted)
    apart = isinstance(data, PartedSet)
    if b == 0 and not (
        isinstance(data, PartedSet) and parted.is_split(data)
    ):  # of which other ranks may have some
        return []
    if any(allowed) and not apart and labels is not None and wanted.label_alone:
        listed = of_labels(data, labels, allowed)
        if listed is not None:
            every = torch.arange(b, device=data.device)
            return [Group(every, listed.data, listed.chosen, None, listed.own)]
    found = []
    for label, of_label in _by_label(data, b, labels):
        index: Tensor | slice = slice(None)
        rows = data
        if label is not None:
            index, rows = rows_of(data, label)
        keys = _what_else(of_label, given, left_out)
        varied = apart or keys is None or (len(of_label) > 1 and bool((keys != keys[:1]).any()))
        if (
            together
            and varied
            and not (given is None and left_out is None)
            and (apart or len(of_label) > 1)
        ):
            condition = None if given is None else _condition(given, of_label, rows)
            places = None
            if left_out is not None and isinstance(rows, ShardedSet) and label is not None:
                places = parted.numbers_within(left_out[of_label], index, rows, data)
            elif left_out is not None:
                places = _places(left_out[of_label], index, rows)
            found.append(Group(of_label, rows, index, None, Own(condition, places)))
            continue
        parts = of_label.split(1) if keys is None else _alike(len(of_label), [keys])
        for part in parts:
            at = part if keys is None else of_label[part]
            found.append(Group(at, rows, index, _shared_bias(at[:1], given, left_out, index, rows)))
    return found


def _checked(
    data: TrainingSet, batch: Sequence[int], wanted: Wanted
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None]:
    """What queries ask for: labels [B], condition and bandwidth, and the rows that they leave out;
    of rows on several ranks the same on all of them."""

    def check() -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None]:
        labels = None
        if wanted.label is not None:
            labels = label_numbers(wanted.label, batch, data.device, data.label_count)
            labels = labels.expand(tuple(batch)).reshape(-1)
        given = checked_condition(wanted, batch, data)
        return labels, given, checked_left_out(wanted.leave_out, batch, data)

    if not isinstance(data, PartedSet):
        return check()
    labels, given, left_out = parted.together(data, "label", check)
    c, h = (None, None) if given is None else given
    parted.compare(data, {"label": labels, "condition": c, "bandwidth": h, "leave_out": left_out})
    return labels, given, left_out


def _by_label(data: TrainingSet, b: int, labels: Tensor | None) -> list[tuple[int | None, Tensor]]:
    """Which of b queries [b] ask for each label, in ascending order of these. Ranks that have
    queries of their own go through the labels of all of them."""
    if labels is None:
        return [(None, torch.arange(b, device=data.device))]
    if isinstance(data, PartedSet) and parted.is_split(data):
        every = parted.labels_of_all(data, labels)
        return [(label, (labels == label).nonzero()[:, 0]) for label in every]
    return [(int(labels[at[0]]), at) for at in _alike(b, [_column(labels)])]


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1).to(torch.float64)


def _alike(b: int, keys: list[Tensor]) -> list[Tensor]:
    """The numbers of b queries, those with equal keys [b, .] together, in ascending order."""
    whole = torch.arange(b, device=keys[0].device if keys else None)
    if b == 1 or not sum(v.shape[1] for v in keys):
        return [whole]
    _, which = torch.unique(torch.cat(keys, 1), dim=0, return_inverse=True)
    order = torch.argsort(which, stable=True)
    return list(order.split(torch.bincount(which).tolist()))


def _what_else(
    at: Tensor, given: tuple[Tensor, Tensor] | None, left_out: Tensor | None
) -> Tensor | None:
    """What some queries ask for beside a label [b, .], to be compared; None where all count as
    different."""
    keys = [at.new_zeros((len(at), 0), dtype=torch.float64)]
    if left_out is not None:
        if traced(left_out):
            return None
        keys.append(_column(left_out[at]))
    if given is not None:
        if traced(*given) or any(v.requires_grad for v in given):
            return None
        keys += [given[0][at], _column(given[1][at])]
    return torch.cat(keys, 1)


def _condition(given: tuple[Tensor, Tensor], at: Tensor, data: TrainingSet) -> Condition:
    """What some queries ask of the conditions of these rows.

    Raises: ValueError at h = 0 where no row has the condition.
    """
    conditions = data.conditions
    assert conditions is not None
    c, h = (v[at] for v in given)
    with torch.no_grad():
        if isinstance(data, PartedSet):
            sq, anchor = parted.nearest_conditions(c.detach(), data)
        elif under_transform(c):  # which the operation would lose
            anchor = conditions[condition_squares(primal(c), conditions).argmin(1)]
            sq = None
        else:
            if not traced(c) and c.numel() * len(conditions) <= FEW:
                sq, nearest = condition_squares(c, conditions).min(1)
            else:
                sq, nearest = (v[:, 0] for v in ops.nearest(c.detach(), Rows(conditions), 1))
            anchor = conditions[nearest]
        if sq is not None:
            missed = (h == 0) & (sq > 0)
            if not traced(h, c) and bool(missed.any()):
                raise ValueError(
                    "at bandwidth 0 only rows with exactly the query's condition count, and no row"
                    f" has it: the nearest is {float(sq[missed][0].sqrt()):.3g} away; use a"
                    " bandwidth > 0"
                )
    return Condition(c, h, anchor)


def _shared_bias(
    first: Tensor,
    given: tuple[Tensor, Tensor] | None,
    left_out: Tensor | None,
    index: Tensor | slice,
    data: TrainingSet,
) -> Tensor | None:
    """The bias [n] of these rows for queries that ask for what the `first` [1] does, or None."""
    bias = None
    if given is not None:
        condition = _condition(given, first, data)
        assert data.conditions is not None
        bias = condition_bias(data.conditions, condition)[0]
    if left_out is not None and int(left_out[first]) >= 0:
        place = int(_places(left_out[first], index, data))
        if place >= 0:
            if bias is None:
                bias = torch.zeros(data.n, dtype=torch.float64, device=data.device)
            bias = bias.index_fill(0, torch.tensor([place], device=data.device), -torch.inf)
    return bias


def _places(row: Tensor, index: Tensor | slice, data: TrainingSet) -> Tensor:
    """Where rows [b] of all here are among the data's, those at `index`, which are ascending; -1
    for those that are not, and for -1."""
    place, n = row, data.n_here
    if isinstance(index, Tensor):
        if n == 0:
            return torch.full_like(row, -1)
        place = torch.searchsorted(index, row.contiguous()).clamp(max=n - 1)
        place = torch.where(index[place] == row, place, -1)
    if (
        data.n == 1
        and not isinstance(data, PartedSet)
        and not traced(row)
        and bool((place >= 0).any())
    ):
        only = int(row[place >= 0][0])
        raise ValueError(f"row {only} is the only one that its query could see, and is left out")
    return place


def rows_of(data: TrainingSet, label: int) -> tuple[Tensor | slice, TrainingSet]:
    """Which rows have a label, and those rows; all for the null class."""
    labels = data.labels
    if label == EVERY_ROW and (labels is None or not data.has_label(label)):
        return slice(None), data
    return data.of_label(label)
