"""The nearest rows, exactly, from a fraction of the distances: the bounds of an index used twice.

1. the index tells rows that are likely to be near, and about how far the k-th of them is;
2. ``bound_scan`` lists all rows that cannot be proven to lie beyond that;
3. these are evaluated, and the k-th of them must lie nearer than every row that was not listed.

Only the third step decides. Where it fails, the second is repeated with the distances found, and
then all rows are swept. Proof: ``docs/pruning.md``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Query, RowLists, Rows
from memokern.index.index import Index
from memokern.index.projection import Projected
from memokern.strategies.costs import Costs
from memokern.strategies.pruned import scan_index

# Queries whose lists are evaluated together, if these are long or of one row each: a call costs as
# much as some rows, and the rows of one query are evaluated for all of its group.
GROUP = (4, 64)
# From which share of the rows on, asked for (k) or kept, and for how few queries, a sweep over all
# is as fast. CIFAR-10, N = 9,000: with what goes before, lists of 3 to 5 % of the rows.
MOST_ASKED, MOST_KEPT, FEWEST = 1 / 1000, 1 / 32, 16
ELEMENTS = 1 << 22  # of a temporary
LISTED = 1 << 23  # rows that the lists of queries hold at a time, of 24 bytes each
# A scan keeps rows within 2 sigma^2 log(N / eps) of the best distance; sigma is made to fit.
EPS = 0.5
# What a squared distance from the index may be off by, as a share of the rows' mean square: a scan
# that does not reach far enough is repeated, one that reaches too far lists more.
OFF = 1 / 64


def nearest(
    x: Tensor,
    rows: Rows,
    index: Index,
    k: int,
    costs: Costs | None = None,
    every: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.nearest` of queries x [B, D]: the same rows, ties and distances.

    With costs, queries that would keep too many rows are swept densely, as are all where a sweep
    takes no time or k is large; without, all that can be pruned are. Queries that are not finite
    are always swept. every: how queries are swept over all rows; None for `ops.nearest`.
    """
    if every is None:
        every = functools.partial(_among, rows=rows, k=k, some=None)
    n, dim, b = rows.n, rows.dim, len(x)
    most_listed = n
    if costs is not None:
        most_listed = int(n * MOST_KEPT)
        if b < FEWEST or k > n * MOST_ASKED or costs.dense(b, n, dim) < 8 * costs.call:
            return every(x)
    if b == 0:
        return every(x)
    parts: list[Found] = []
    far = []
    # Each query of a part may have a list as long as that.
    for some in torch.arange(b, device=x.device).split(max(FEWEST, LISTED // most_listed)):
        found, left = _by_lists(x[some], rows, index, k, most_listed, costs is not None)
        parts += [Found(some[v.at], v.sq, v.row) for v in found]
        far.append(some[left])
    rest = torch.cat(far)
    if len(rest):
        parts.append(Found(rest, *every(x[rest])))
    at, sq, row = (torch.cat(v) for v in zip(*parts, strict=True))
    back = torch.argsort(at)
    return sq[back], row[back]


class Found(NamedTuple):
    """at: which queries; sq, row: the squared distances and numbers of their k nearest rows."""

    at: Tensor
    sq: Tensor
    row: Tensor


def _by_lists(
    x: Tensor, rows: Rows, index: Index, k: int, most_listed: int, choosy: bool
) -> tuple[list[Found], Tensor]:
    """What is found from lists of rows, and the queries that are left for a sweep. choosy: where
    that takes many of them, it takes all."""
    with torch.no_grad():
        p = index.project(x, torch.ones(len(x), dtype=torch.float64, device=x.device))
        likely = _likely(p, index, k)
        sq = _guess(p, rows, index, likely)
        left = torch.isfinite(p.margin)
    parts = []
    rest = [(~left).nonzero()[:, 0]]
    at = left.nonzero()[:, 0]
    for _ in range(2):
        with torch.no_grad():
            lists, beyond = _within(x[at], rows, index, p, at, sq, most_listed)
        known = ~torch.isnan(beyond)
        if not known.any() or (choosy and 4 * known.sum() < 3 * len(known)):
            break  # a sweep for many costs little more for all
        rest.append(at[~known])
        at, beyond = at[known], beyond[known]
        # The lists that are not known are empty.
        lists = lists._replace(start=_starts(lists.start.diff()[known]))
        found, row = _by_groups(x[at], rows, k, lists, likely[at])
        done = found[:, -1].detach() < beyond
        parts.append(Found(at[done], found[done], row[done]))
        sq[at] = found.detach()
        at = at[~done]
    return parts, torch.cat([*rest, at])


def _among(x: Tensor, rows: Rows, k: int, some: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ops.nearest` among some rows, ascending; None: all."""
    if some is None:
        return ops.nearest(x, rows, k)
    assert rows.sq_norms is not None  # a TrainingSet has them
    part = rows._replace(data=rows.data.index_select(0, some), sq_norms=rows.sq_norms[some])
    sq, at = ops.nearest(x, part, k)
    return sq, some[at]


def _starts(count: Tensor) -> Tensor:
    """Where lists of these lengths start in one, and where the last ends."""
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def _by_groups(
    x: Tensor, rows: Rows, k: int, lists: RowLists, likely: Tensor
) -> tuple[Tensor, Tensor]:
    """The k nearest of the rows listed and the likely ones of each query's group: no fewer."""
    offsets, listed = lists.start.tolist(), lists.index
    parts = []
    each = likely.shape[1] + len(listed) // len(x)
    step = max(GROUP[0], GROUP[1] // each)
    for first in range(0, len(x), step):
        last = min(first + step, len(x))
        some = torch.cat([listed[offsets[first] : offsets[last]], likely[first:last].reshape(-1)])
        parts.append(_among(x[first:last], rows, k, torch.unique(some)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _likely(p: Projected, index: Index, k: int) -> Tensor:
    """[B, k] rows that are nearest in the first coordinates; no more than a guess."""
    k0 = index.dims[0]
    z, n = p.z[:, :k0], len(index.coarse)
    step = max(k, ELEMENTS // len(z))
    best: tuple[Tensor, Tensor] | None = None
    for first in range(0, n, step):
        part = index.coarse[first : first + step, :k0]
        off = torch.addmm(part.square().sum(1), z, part.T, beta=0.5, alpha=-1)
        value, at = off.topk(min(k, len(part)), dim=1, largest=False)
        at = at + first
        if best is not None:
            value, at = torch.cat([best[0], value], 1), torch.cat([best[1], at], 1)
            value, order = value.topk(k, dim=1, largest=False)
            at = at.gather(1, order)
        best = value, at
    assert best is not None
    return best[1]


def _guess(p: Projected, rows: Rows, index: Index, likely: Tensor) -> Tensor:
    """[B, k] squared distances of these rows, ascending, as if what the index lacks were
    orthogonal."""
    k0, last = index.dims[0], index.dims[-1]
    assert rows.sq_norms is not None
    parts = []
    step = max(1, ELEMENTS // (likely.shape[1] * last))
    for z, at in zip(p.z.split(step), likely.split(step), strict=True):
        near = (index.coarse[at][..., :k0] * z[:, None, :k0]).sum(2)
        parts.append(near + (index.fine[at] * z[:, None, k0:last]).sum(2))
    sq = p.sq[:, None] + rows.sq_norms[likely] - 2 * torch.cat(parts)
    return sq.clamp(min=0.0).sort(dim=1).values


def _within(
    x: Tensor, rows: Rows, index: Index, p: Projected, at: Tensor, sq: Tensor, most_listed: int
) -> tuple[RowLists, Tensor]:
    """Lists of rows, and [B] what every row that is not listed has as its squared distance at
    least, as `ops.nearest` computes it; NaN where there were too many.

    Beyond the nearest row, the lists reach as much further as sq [., k] says of the last.
    """
    sq = sq[at]
    window = sq[:, -1] - sq[:, 0] + OFF * index.mean_square
    sigma = (window / (2 * math.log(rows.n / EPS))).sqrt()
    one = torch.ones_like(sigma)
    mine = Projected(*(v[at] for v in p))
    scan = scan_index(Query(x, sigma, one, one), rows, index, mine, EPS, most_listed)
    # t = -r^2 / (2 sigma^2) <= threshold. What is computed of r^2 is less by the rounding of the
    # sum of squares (and of threshold and sigma) and of each difference x - y, |y| <= |x| + r.
    least = -2 * sigma.square() * scan.threshold
    unit = 2.0**-52
    off = 4 * unit * (torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) + 2 * least.sqrt())
    beyond = least * (1 - unit * (rows.dim + 32)) - 2 * least.sqrt() * off
    return scan.lists, torch.where(scan.level > 0, beyond, torch.nan)
