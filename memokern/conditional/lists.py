"""Queries of about as many labels as there are queries: a list of rows for each, in one sweep, or a
segment of the rows sorted by their labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import RowLists, Segments
from memokern.conditional.wanted import EVERY_ROW
from memokern.data.training_set import TrainingSet
from memokern.sweep import Own

# Queries per label up to which one call for all is faster than a sweep for each label, which costs
# 50 us to begin with, and a regulariser's 0.4 ms.
TOGETHER = 2
# How many rows may be listed together, and of how many numbers a query's rows may be: more are read
# faster by a sweep of their own. Where segments may be swept, they are from so many numbers on.
MOST_LISTED, MOST_NUMBERS, LEAST_SWEPT = 1 << 21, 1 << 19, 1 << 13
# Numbers of a query's rows beyond which an index, where there is one, may save more than a call of
# its own costs; and bytes of rows up to which a copy of them is kept, sorted by their labels.
MOST_UNSCANNED, MOST_SORTED = 1 << 21, 1 << 30


class Allowed(NamedTuple):
    """Which ways are open to queries of different labels beside a sweep for each label. indexed:
    whether an index would select rows in such a sweep."""

    lists: bool = False
    segments: bool = False
    indexed: bool = False


NONE = Allowed()


class Listed(NamedTuple):
    """Queries that each see some of these rows, in one sweep.

    chosen: which of all rows these are.
    """

    data: TrainingSet
    chosen: Tensor | slice
    own: Own


def of_labels(data: TrainingSet, labels: Tensor, allowed: Allowed) -> Listed | None:
    """The rows of each query's label [B], or None where a sweep for each label is faster.

    Raises: ValueError for a label that no row has.
    """
    if len(labels) < 2 or data.labels is None:
        return None
    distinct = len(labels.unique())
    if distinct < 2 or len(labels) > TOGETHER * distinct:
        return None
    known, order, first = data.by_class()
    place = torch.searchsorted(known, labels.contiguous()).clamp(max=len(known) - 1)
    found = known[place] == labels
    if not bool(found.all()):
        missed = int(labels[~found][0])
        if missed != EVERY_ROW:
            data.where(missed)  # raises
        return None
    count = first[place + 1] - first[place]
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    total = int(start[-1])
    numbers = total * data.dim // len(labels)
    scanned = allowed.indexed and numbers > MOST_UNSCANNED
    swept = allowed.segments and not scanned and data.rows.nbytes <= MOST_SORTED
    if swept and numbers >= LEAST_SWEPT:
        segments = Segments(first[place], first[place + 1])
        return Listed(data.sorted_by_label(), order, Own(segments=segments))
    if not allowed.lists or total > MOST_LISTED or numbers > MOST_NUMBERS:
        return None
    shift = (first[place] - start[:-1]).repeat_interleave(count, output_size=total)
    lists = RowLists(start, order[torch.arange(total, device=shift.device) + shift])
    return Listed(data, slice(None), Own(lists=lists))
