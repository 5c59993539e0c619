"""Distances whose squares float64 cannot hold: these rows are searched for again, in other units.

A float64 goes up to 1.8e308, so that the square of a distance is infinite from 1.3e154 on; below
1e-154 it has few digits, or is 0. Multiplied by a power of two, queries and rows keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memokern.calls import Rows
from memokern.util.torch_internals import traced

# What is multiplied by these has squares that fit: distances beyond 1e154, and below 1e-120.
DOWN, UP = 2.0**-600, 2.0**600
# A square below TINY may lack digits. Of a query with a feature of NEAR it is made of features that
# are far smaller than that: the row is hit as far as anyone can tell.
TINY, NEAR = 2.0**-900, 2.0**-400

# The squared distances of queries, in a unit, to their nearest rows, and these.
Search = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def distances(
    x: Tensor,
    rows: Rows,
    sq: Tensor,
    row: Tensor,
    search: Search,
    anywhere: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The distances [B, k] of queries x [B, D] to the nearest rows, and these, given the squares
    sq [B, k] and the rows that a search in plain units found.

    search(x, unit): the same of queries that are multiplied by the unit, as the rows must be.
    anywhere: where other processes search along, makes of flags [2] whether any has each of them.
    Nothing is searched for again where there are no values to look at, as under a compiler.
    """
    distance = root(sq)
    if torch.float64 not in (x.dtype, rows.data.dtype) or traced(x, rows.data):
        return distance, row
    if anywhere is None and sq.numel():
        least, most = sq.detach().aminmax()
        if least.item() >= TINY and most.item() < math.inf:
            return distance, row
    with torch.no_grad():
        beyond = torch.isinf(sq) & torch.isfinite(x).all(1, keepdim=True)
        below = sq < TINY
        if below.any():
            below = below & (x.abs().amax(1, keepdim=True) < NEAR)
            below = below & (rows.data.dtype == torch.float64)  # float32 rows are never so small
        flags = torch.stack([beyond.any(), below.any()])
        some = flags if anywhere is None else anywhere(flags)
    for asked, mask, unit in zip(some.tolist(), (beyond, below), (DOWN, UP), strict=True):
        if not asked:
            continue
        at = mask.any(1).nonzero()[:, 0]
        found, which = search(x[at] * unit, unit)
        again = torch.where(mask[at], root(found) / unit, distance[at])
        distance = distance.index_copy(0, at, again)
        row = row.index_copy(0, at, torch.where(mask[at], which, row[at]))
    return distance, row


def root(sq: Tensor) -> Tensor:
    """The square root. At 0 it has no derivative; 0 is one of its subgradients."""
    if not sq.requires_grad:
        return sq.sqrt()
    hit = sq == 0
    return torch.where(hit, 0.0, torch.where(hit, 1.0, sq).sqrt())
