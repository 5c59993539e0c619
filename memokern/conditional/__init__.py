"""Queries that ask for some of the rows: those with a label, those whose conditions are near, or
all but one.

A label becomes a part of the rows, over which its queries share a sweep. A condition and a row left
out become fields of the query, of which the compiled kernels take as many as there are queries in
one sweep; or, where a backend does not, and for queries that all ask for the same, a bias per row,
which every backend, regulariser and strategy has. So nothing of size N x B is made.
"""

from memokern.conditional.groups import Group, groups
from memokern.conditional.sweeps import allowed_for, joined, posterior, put_back
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
    "allowed_for",
    "count_labels",
    "groups",
    "joined",
    "label_numbers",
    "posterior",
    "put_back",
]
