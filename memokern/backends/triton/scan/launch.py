"""The launcher of ``bound_scan``: which rows can matter to each query.

The algorithm and the slack for rounding are those of the compiled kernels; ``docs/pruning.md`` has
the proofs. Only the device knows how many rows are left, so this waits for it, once and then once
per level, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.backends.triton.core.centering import check_types, scale_shift
from memokern.backends.triton.core.pairs import Pairs
from memokern.backends.triton.scan import kernels
from memokern.calls import LogitBounds, Query, RowLists, Rows, Scan
from memokern.calls.checks import (
    bands_of,
    check_selectable,
    contiguous64,
    prepared,
    prepared_bounds,
)

_F32, _F64 = torch.float32, torch.float64
_PAIRS = 1 << 26  # queries times rows that are scanned at a time: lists can be no longer
_PROMISING = 4  # rows per query that are evaluated before the scan
_U = 6e-8  # a little above 2^-24: all of the slack is rounded up


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """The rows that can matter to each query; :mod:`memokern.ops` says what is proven of the
    others."""
    query, rows = prepared(query.detach(), rows), rows.detach()
    check_selectable(query, "bound_scan")
    check_types(query.x, rows)
    if rows.center is None or rows.sq_norms is None:
        raise ValueError("bound_scan needs the center of the rows that the bounds were made about")
    rows = rows._replace(center=contiguous64(rows.center), sq_norms=contiguous64(rows.sq_norms))
    m = len(query.x)
    bounds = prepared_bounds(bounds, m, rows)
    step = max(1, _PAIRS // rows.n)
    blocks = [slice(i, i + step) for i in range(0, m, step)]
    found = [_Scan(query.take(at), rows, _take(bounds, at)).run() for at in blocks]
    start = torch.zeros(m + 1, dtype=torch.int64, device=query.x.device)
    if not found:
        none = start.new_empty(0)
        return Scan(RowLists(start, none), query.sigma.new_empty(0), none.clone())
    counts, index, threshold, level = (torch.cat(column) for column in zip(*found, strict=True))
    torch.cumsum(counts, 0, out=start[1:])
    return Scan(RowLists(start, index), threshold, level)


def _take(bounds: LogitBounds, at: slice) -> LogitBounds:
    """The bounds for some of the queries."""
    return bounds._replace(
        z=bounds.z[at], norms=bounds.norms[at], margin=bounds.margin[at], sq=bounds.sq[at]
    )


class _Scan:
    """One block of queries. best [B]: the largest s_n - |xc|^2 / 2 that is known to be reached."""

    def __init__(self, query: Query, rows: Rows, bounds: LogitBounds) -> None:
        assert rows.center is not None and rows.sq_norms is not None
        self.query, self.rows, self.bounds = query, rows, bounds
        self.center, self.sq_norms = rows.center, rows.sq_norms
        self.device, self.b, self.n = query.x.device, len(query.x), rows.n
        self.k0, self.bands = bounds.dims[0], bands_of(bounds)
        self.a, self.s2 = query.alpha.abs(), query.sigma.square()
        self.unit = self.s2 * query.temperature
        self.pairs = Pairs(query, rows, scale_shift(rows))
        self.span = math.log(self.n / bounds.eps)
        self._reach()
        self.best = torch.full((self.b,), -torch.inf, dtype=_F64, device=self.device)

    def _reach(self) -> None:
        """What is added to `best` to get the value below which a computed bound is that of a row to
        drop; and which queries are in the range where float32 can neither overflow nor lose
        sigma^2 b. The slack is that of the compiled kernels, term by term."""
        q, bounds, a = self.query, self.bounds, self.a
        y_max, c = self.sq_norms.max().sqrt(), self.center.square().sum().sqrt()
        b_max = torch.zeros((), dtype=_F64, device=self.device)
        if q.bias is not None:
            size = torch.where(torch.isneginf(q.bias), 0.0, q.bias.abs())
            b_max = torch.where(torch.isnan(size), torch.inf, size).max()
        size, span = bounds.sq.sqrt(), self.unit * self.span
        product = a * size * y_max
        rest = 0.5 * a.square() * y_max.square() + self.s2 * b_max
        slack = (
            a * bounds.margin + 64 * _U * product + (bounds.coarse.shape[1] + 64) * _U * rest
            + 1e-12 * bounds.sq + 1e-15 * a * (c + y_max) * (size + a * y_max) + 1e-35
        )  # fmt: skip
        self.reach = 0.5 * bounds.sq - span - slack
        usual = (q.sigma > 1e-15) & (q.sigma < 1e15) & (q.temperature > 1e-15)
        usual &= (q.temperature < 1e15) & (a < 1e15) & (bounds.sq < 1e30) & (bounds.margin >= 0)
        self.active = usual & (slack < 1e30) & (span < 1e30) & (product + rest < 1e30)

    def least(self) -> Tensor:
        """[B] float32, not above best + reach; inf for queries that are out of range."""
        value = (self.best + self.reach).to(_F32)
        return torch.where(self.active, value - value.abs() * 1.3e-7, torch.inf)

    def consider(self, query: Tensor, index: Tensor) -> Tensor:
        """Proven lower bounds of s_n - |xc|^2 / 2 [M]: direct differences, less their rounding."""
        r2, bias = self.pairs.evaluate(query, index)[0], self.query.bias
        b = self.s2[query] * (0.0 if bias is None else bias[index])
        value = b - 0.5 * r2
        less = (self.rows.dim + 16) * 2.3e-16 * r2 + 1e-15 * b.abs()
        return torch.where(torch.isfinite(value), value - less, -torch.inf)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> counts, rows, thresholds and levels of these queries."""
        query, index, bound = self.first_level()
        level = torch.ones(self.b, dtype=torch.int64, device=self.device)
        for k in range(1, len(self.bounds.dims)):
            count = torch.bincount(query, minlength=self.b)
            if int(count.max()) <= 1:
                break
            level += count > 1
            self.next_level(k, query, index, bound)
            self.improve(query, index, bound)
            keep = ~(bound < self.least()[query])
            query, index, bound = query[keep], index[keep], bound[keep]
        count = torch.bincount(query, minlength=self.b)
        lost = ~self.active | ~torch.isfinite(self.best) | (count > self.bounds.most_listed)
        threshold = self.best / self.unit - self.span
        return (
            torch.where(lost, 0, count), index[~lost[query]],
            torch.where(lost, torch.nan, threshold), torch.where(lost, 0, level),
        )  # fmt: skip

    def first_level(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that the first level leaves, by query and row, and their bounds."""
        q, bounds, device = self.query, self.bounds, self.device
        blocks = -(-self.n // kernels.BLOCK_N)
        value = torch.empty(self.b, blocks, dtype=_F32, device=device)
        place = torch.empty(self.b, blocks, dtype=torch.int64, device=device)
        none, no_pair = value.new_empty(0), place.new_empty(0)
        scaled = torch.cat([
            q.alpha[:, None] * bounds.z[:, : self.k0],
            self.a[:, None] * bounds.norms[:, : self.bands],
        ], 1).to(_F32)  # fmt: skip
        # A query that is out of range gets numbers that do no harm, and is not listed.
        fixed = {
            "coarse": bounds.coarse, "half": (-0.5 * self.sq_norms).to(_F32),
            "scaled": torch.where(self.active[:, None], scaled, 0.0),
            "bias": none if q.bias is None else q.bias.to(_F32),
            "a2": torch.where(self.active, self.a.square(), 0.0).to(_F32),
            "s2": torch.where(self.active, self.s2, 1.0).to(_F32), "B": self.b, "N": self.n,
            "k0": self.k0, "K": self.k0 + self.bands, "stride_n": bounds.coarse.shape[1],
        }  # fmt: skip

        def launch(step: int, least: Tensor, m: int = 0) -> tuple[Tensor, Tensor, Tensor]:
            variant = kernels.first_level_variant(step, q.bias is not None, self.b <= 16)
            out = (
                no_pair.new_empty(m), no_pair.new_empty(m),
                torch.empty(m, dtype=_F32, device=device),
            )  # fmt: skip
            variant.launch(
                (-(-self.b // variant.constexprs["BLOCK_B"]) * blocks,), device, **fixed,
                least=least, value=value, place=place, query=out[0], index=out[1], bound=out[2],
            )  # fmt: skip
            return out

        launch(kernels.PROMISE, none)
        top = place.gather(1, value.topk(min(_PROMISING, blocks), dim=1).indices)
        each = torch.arange(self.b, device=device)[:, None].expand_as(top)
        # Of one query `each` is one number seen several times, which a kernel must not be given.
        reached = self.consider(each.reshape(-1).contiguous(), top.reshape(-1))
        self.best = reached.reshape(top.shape).amax(1)
        least = self.least()
        launch(kernels.COUNT, least)
        after = place.flatten().cumsum(0)
        total = int(after[-1])
        place = (after - place.flatten()).view_as(place)
        return launch(kernels.LIST, least, total)

    def next_level(self, level: int, query: Tensor, index: Tensor, bound: Tensor) -> None:
        """Adds a level to the bounds."""
        q, bounds = self.query, self.bounds
        k1, k2 = (k - self.k0 for k in bounds.dims[level - 1 : level + 1])
        b1, b2 = bounds.first_band[level - 1 : level + 1]
        variant = kernels.next_level_variant(bounds.fine.dtype)
        variant.launch(
            (-(-len(bound) // variant.constexprs["BLOCK_M"]),), self.device, coarse=bounds.coarse,
            fine=bounds.fine, scaled=(q.alpha[:, None] * bounds.z[:, self.k0 :]).to(_F32),
            norms=(self.a[:, None] * bounds.norms).to(_F32), query=query, index=index, bound=bound,
            M=len(bound), F=bounds.fine.shape[1], stride_n=bounds.coarse.shape[1], k0=self.k0,
            bands=self.bands, k1=k1, k2=k2, b1=b1, b2=b2, pad=float(level == 1),
        )  # fmt: skip

    def improve(self, query: Tensor, index: Tensor, bound: Tensor) -> None:
        """Raises `best`, after evaluating each query's most promising row: the first of those with
        the largest bound."""
        top = bound.new_full((self.b,), -torch.inf).scatter_reduce(0, query, bound, "amax")
        m = len(query)
        at = torch.where(bound == top[query], torch.arange(m, device=self.device), m)
        first = at.new_full((self.b,), m).scatter_reduce(0, query, at, "amin")
        there = (first < m).nonzero()[:, 0]
        value = self.consider(there, index[first[there]])
        self.best[there] = torch.maximum(self.best[there], value)
