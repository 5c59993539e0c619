"""Queries that ask for some of the rows: those with a label, those whose conditions are near, or
all but one.

Queries that ask for the same rows share a sweep. What they ask for becomes a part of the rows (a
label) and a bias per row (a condition, a row left out), which every backend, regulariser and
strategy has; so nothing of size N x B is made.
"""

from memokern.conditional.groups import Group, groups
from memokern.conditional.sweeps import joined, posterior, put_back
from memokern.conditional.wanted import (
    EVERY_ROW,
    Label,
    Wanted,
    count_labels,
    label_numbers,
)

__all__ = [
    "EVERY_ROW",
    "Group",
    "Label",
    "Wanted",
    "count_labels",
    "groups",
    "joined",
    "label_numbers",
    "posterior",
    "put_back",
]
