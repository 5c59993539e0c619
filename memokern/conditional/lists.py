"""Queries of about as many labels as there are queries: a list of rows for each, in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.calls import RowLists
from memokern.conditional.wanted import EVERY_ROW
from memokern.data.training_set import TrainingSet

# Queries per label up to which lists of rows are faster than a sweep for each label, how many rows
# may be listed together, and of how many numbers a query's rows may be: more are read faster by a
# sweep of their own, which costs 50 us to begin with, and a regulariser's 0.4 ms.
LISTED, MOST_LISTED, MOST_NUMBERS = 2, 1 << 21, 1 << 19


def of_labels(data: TrainingSet, labels: Tensor) -> RowLists | None:
    """The rows of each query's label [B], or None where a sweep for each label is faster.

    Raises: ValueError for a label that no row has.
    """
    if len(labels) < 2 or data.labels is None:
        return None
    distinct = len(labels.unique())
    if distinct < 2 or len(labels) > LISTED * distinct:
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
    if total > MOST_LISTED or total * data.dim > MOST_NUMBERS * len(labels):
        return None
    shift = (first[place] - start[:-1]).repeat_interleave(count, output_size=total)
    return RowLists(start, order[torch.arange(total, device=shift.device) + shift])
