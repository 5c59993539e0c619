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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
# From which share of the rows on, asked for (k) or kept, a sweep over all is as fast. CIFAR-10,
# N = 9,000: with what goes before, lists of some 2 % of the rows.
MOST_ASKED, MOST_KEPT = 1 / 1000, 1 / 64
# A search is worth trying where a sweep for a posterior takes so many calls of an operation.
WORTH_CALLS = 36
LEAST_PART = 16  # queries that are searched for together
ELEMENTS = 1 << 22  # of a temporary
COPIED_BYTES = 1 << 26  # of rows that are listed, at a time
LISTED = 1 << 23  # rows that the lists of queries hold at a time, of 24 bytes each
# A scan keeps rows within 2 sigma^2 log(N / eps) of the best distance; sigma is made to fit.
EPS = 0.5
# The squared distances [B, k] of the nearest rows, ascending, and their numbers.
Neighbours = tuple[Tensor, Tensor]
# What a squared distance from the index may be off by, as a share of the rows' mean square: a scan
# that does not reach far enough is repeated, one that reaches too far lists more.
OFF = 1 / 64


class Reading(NamedTuple):
    """How rows are come by. stored: those with some numbers [k], as they are stored [k, D].
    looking: open while a scan evaluates some of them where they lie."""

    stored: Callable[[Tensor], Tensor]
    looking: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Search:
    """What is searched, and how. most_listed: rows of a query's list. choosy: where a sweep takes
    many queries, it takes all. off: what a squared distance from the index may be off by."""

    rows: Rows
    index: Index
    k: int
    most_listed: int
    choosy: bool
    off: float
    reading: Reading


def nearest(
    x: Tensor,
    rows: Rows,
    index: Index,
    k: int,
    costs: Costs | None = None,
    every: Callable[[Tensor], Neighbours] | None = None,
    reading: Reading | None = None,
) -> Neighbours:
    """`ops.nearest` of queries x [B, D]: the same rows, ties and distances.

    With costs, queries that would keep too many rows are swept densely, as are all where a sweep
    takes no time or k is large; without, all that can be pruned are. Queries that are not finite
    are always swept. every: how queries are swept over all rows; None for `ops.nearest`.
    """
    search = _search(rows, index, k, costs, reading)
    if every is None:
        every = functools.partial(ops.nearest, rows=rows, k=k)
    if not _pays(len(x), rows, k, costs):
        return every(x)
    return _searched(x, lambda some: project(x[some], index), search, every)


def nearest_in_chunk(
    x: Tensor,
    p: Projected,
    chunk: tuple[int, Rows],
    index: Index,
    k: int,
    costs: Costs | None,
    known: Tensor | None,
) -> Neighbours:
    """The same of a chunk of the rows that an index is of, in memory, for queries that were
    projected. Instead of rows that lie beyond known [B], squared, others may be given, for k as
    near as that were found among other rows."""
    first, rows = chunk
    if not _pays(len(x), rows, k, costs):
        return ops.nearest(x, rows, k)
    part = index.take(slice(first, first + rows.n), index.fingerprint, for_once=True)
    search = replace(_search(rows, index, k, costs, None), index=part)
    return _searched(
        x, lambda some: Projected(*(v[some] for v in p)), search,
        functools.partial(ops.nearest, rows=rows, k=k), known,
    )  # fmt: skip


def project(x: Tensor, index: Index) -> Projected:
    """The coordinates of queries whose alpha is 1."""
    with torch.no_grad():
        return index.project(x, torch.ones(len(x), dtype=torch.float64, device=x.device))


def _pays(b: int, rows: Rows, k: int, costs: Costs | None) -> bool:
    """Whether any of b queries may be better off with a list."""
    if b == 0 or costs is None:
        return b > 0
    swept = costs.dense(b, rows.n, rows.dim)
    return k <= rows.n * MOST_ASKED and swept >= WORTH_CALLS * costs.call


def _search(
    rows: Rows, index: Index, k: int, costs: Costs | None, reading: Reading | None
) -> Search:
    if reading is None:
        reading = Reading(lambda some: rows.data.index_select(0, some))
    most_listed = rows.n if costs is None else max(1, int(rows.n * MOST_KEPT))
    off = OFF * index.mean_square
    return Search(rows, index, k, most_listed, costs is not None, off, reading)


def _searched(
    x: Tensor,
    projected: Callable[[Tensor], Projected],
    search: Search,
    every: Callable[[Tensor], Neighbours],
    known: Tensor | None = None,
) -> Neighbours:
    parts: list[Found] = []
    far = []
    # Each query of a part may have a list as long as that.
    step = max(LEAST_PART, LISTED // search.most_listed)
    for some in torch.arange(len(x), device=x.device).split(step):
        reach = None if known is None else known[some]
        found, left = _by_lists(x[some], projected(some), search, reach)
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
    x: Tensor, p: Projected, search: Search, known: Tensor | None
) -> tuple[list[Found], Tensor]:
    """What is found from lists of rows, and the queries that are left for a sweep. known: as of
    :func:`nearest_in_chunk`."""
    with torch.no_grad():
        likely = _likely(p, search.index, search.k)
        assert search.rows.sq_norms is not None  # a TrainingSet has them
        sq = _guess(p, search.index, search.rows.sq_norms, likely)
        left = torch.isfinite(p.margin)
    parts = []
    rest = [(~left).nonzero()[:, 0]]
    at = left.nonzero()[:, 0]
    for _ in range(2):
        # As far as the last of the k rows, and no further than others are known to be.
        reach = sq[at, -1] if known is None else torch.minimum(sq[at, -1], known[at])
        with torch.no_grad(), search.reading.looking():
            lists, beyond = _within(x[at], search, p, at, reach - sq[at, 0])
        found_out = ~torch.isnan(beyond)
        few = 4 * found_out.sum() < 3 * len(found_out)
        if not found_out.any() or (search.choosy and few):
            break  # a sweep for many costs little more for all
        rest.append(at[~found_out])
        at, beyond = at[found_out], beyond[found_out]
        # The lists that are not known are empty.
        lists = lists._replace(start=_starts(lists.start.diff()[found_out]))
        found, row = _by_groups(x[at], search, lists, likely[at])
        reach = found[:, -1].detach()
        done = (reach if known is None else torch.minimum(reach, known[at])) < beyond
        parts.append(Found(at[done], found[done], row[done]))
        sq[at] = found.detach()
        at = at[~done]
    return parts, torch.cat([*rest, at])


def _among(x: Tensor, search: Search, some: Tensor) -> Neighbours:
    """`ops.nearest` among some rows, ascending, of which few are in memory at a time."""
    rows, k = search.rows, search.k
    assert rows.sq_norms is not None
    step = max(k, COPIED_BYTES // (rows.dim * rows.data.element_size()))
    best: Neighbours | None = None
    for part in some.split(step):
        few = rows._replace(data=search.reading.stored(part), sq_norms=rows.sq_norms[part])
        sq, at = ops.nearest(x, few, min(k, len(part)))
        best = merged(best, (sq, part[at]), k)
    assert best is not None
    return best


def merged(best: Neighbours | None, more: Neighbours, k: int) -> Neighbours:
    """The k nearest of those among some rows and among rows behind these; ties to the first."""
    if best is None:
        return more
    sq, row = torch.cat([best[0], more[0]], 1), torch.cat([best[1], more[1]], 1)
    sq, order = sq.sort(dim=1, stable=True)
    return sq[:, :k], row.gather(1, order[:, :k])


def _starts(count: Tensor) -> Tensor:
    """Where lists of these lengths start in one, and where the last ends."""
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def _by_groups(x: Tensor, search: Search, lists: RowLists, likely: Tensor) -> Neighbours:
    """The k nearest of the rows listed and the likely ones of each query's group: no fewer."""
    offsets, listed = lists.start.tolist(), lists.index
    parts = []
    each = likely.shape[1] + len(listed) // len(x)
    step = max(GROUP[0], GROUP[1] // each)
    for first in range(0, len(x), step):
        last = min(first + step, len(x))
        some = torch.cat([listed[offsets[first] : offsets[last]], likely[first:last].reshape(-1)])
        parts.append(_among(x[first:last], search, torch.unique(some)))
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


def _guess(p: Projected, index: Index, sq_norms: Tensor, likely: Tensor) -> Tensor:
    """[B, k] squared distances of these rows, ascending, as if what the index lacks were
    orthogonal."""
    k0, last = index.dims[0], index.dims[-1]
    parts = []
    step = max(1, ELEMENTS // (likely.shape[1] * last))
    for z, at in zip(p.z.split(step), likely.split(step), strict=True):
        near = (index.coarse[at][..., :k0] * z[:, None, :k0]).sum(2)
        parts.append(near + (index.fine[at] * z[:, None, k0:last]).sum(2))
    sq = p.sq[:, None] + sq_norms[likely] - 2 * torch.cat(parts)
    return sq.clamp(min=0.0).sort(dim=1).values


def _within(
    x: Tensor, search: Search, p: Projected, at: Tensor, further: Tensor
) -> tuple[RowLists, Tensor]:
    """Lists of rows, and [B] what every row that is not listed has as its squared distance at
    least, as `ops.nearest` computes it; NaN where there were too many.

    The lists reach further [.] than the nearest row, in squared distance.
    """
    rows, index = search.rows, search.index
    window = further.clamp(min=0.0) + search.off
    sigma = (window / (2 * math.log(rows.n / EPS))).sqrt()
    one = torch.ones_like(sigma)
    mine = Projected(*(v[at] for v in p))
    scan = scan_index(Query(x, sigma, one, one), rows, index, mine, EPS, search.most_listed)
    # t = -r^2 / (2 sigma^2) <= threshold. What is computed of r^2 is less by the rounding of the
    # sum of squares (and of threshold and sigma) and of each difference x - y, |y| <= |x| + r.
    least = -2 * sigma.square() * scan.threshold
    unit = 2.0**-52
    off = 4 * unit * (torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) + 2 * least.sqrt())
    beyond = least * (1 - unit * (rows.dim + 32)) - 2 * least.sqrt() * off
    return scan.lists, torch.where(scan.level > 0, beyond, torch.nan)


def share_within(p: Projected, index: Index, sq_norms: Tensor, some: Tensor, k: int) -> Tensor:
    """[B] the share of these rows that may lie as near as the k-th nearest row of all: about."""
    k0 = index.dims[0]
    norms = sq_norms[some]
    reach = _guess(p, index, sq_norms, _likely(p, index, k))[:, -1]
    z = torch.cat([index.coarse[some, :k0], index.fine[some].to(torch.float32)], 1)
    near = z.double().square().sum(1)
    rest = (norms - near).clamp(min=0.0).sqrt()
    parts = []
    for at in torch.arange(len(p.z), device=p.z.device).split(max(1, ELEMENTS // len(some))):
        mine = p.z[at]
        own = mine.double().square().sum(1)
        # Those beyond the index's coordinates point the same way at best.
        least = own[:, None] + near - 2 * (mine @ z.T).double()
        least += ((p.sq[at] - own).clamp(min=0.0).sqrt()[:, None] - rest).square()
        parts.append((least <= reach[at, None]).double().mean(1))
    return torch.cat(parts)
