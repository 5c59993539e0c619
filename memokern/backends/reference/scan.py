"""Which rows can matter to each query: the bounds of an index, in plain float64 PyTorch.

The formulas are derived in ``docs/pruning.md``. Pairs (query, row) are held as two flat lists, in
the order of the queries: no array of N times B, and no loop over queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.backends.reference.blocks import ELEMENTS, F64
from memokern.calls import LogitBounds, Query, RowLists, Rows, Scan

_ULP = 2.0**-52  # twice the unit roundoff: pays for the second-order terms too
_PROMISING = 4  # rows per query and level whose logit is evaluated exactly
_FEW = 16  # survivors that are cheaper to evaluate than to bound again


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """Which rows can matter; see :mod:`memokern.ops`."""
    b, x = query.x.shape[0], query.x
    gap = math.log(rows.n / bounds.eps)
    usable = (query.sigma > 0) & (query.temperature > 0) & torch.isfinite(x).all(1)
    for v in (query.sigma, query.alpha, query.temperature, bounds.margin, bounds.sq):
        usable = usable & torch.isfinite(v)
    found: list[tuple[Tensor, ...]] = []
    step = max(1, ELEMENTS // rows.n)
    for start in range(0, b, step):
        at = slice(start, min(start + step, b))
        found.append(_Block(query.take(at), rows, bounds, at).climb(gap, usable[at]))
    offsets = torch.zeros(b + 1, dtype=torch.int64, device=x.device)
    if not found:
        empty = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Scan(RowLists(offsets, empty), query.sigma.new_empty(0), empty.clone())
    counts, index, threshold, level = (torch.cat(column) for column in zip(*found, strict=True))
    offsets[1:] = counts.cumsum(0)
    return Scan(RowLists(offsets, index), threshold, level)


class _Block:
    """The bounds for one block of queries; everything in float64."""

    def __init__(self, query: Query, rows: Rows, bounds: LogitBounds, at: slice) -> None:
        self.x, self.rows, self.bias = query.x.to(F64), rows, query.bias
        assert rows.sq_norms is not None  # the schema says so
        self.sq_norms = rows.sq_norms
        self.coarse, self.fine = bounds.coarse, bounds.fine
        self.z, self.norms = bounds.z[at].to(F64), bounds.norms[at].to(F64)
        self.dims, self.first_band = bounds.dims, bounds.first_band
        self.most_listed = bounds.most_listed
        self.columns = {
            "sigma": query.sigma, "alpha": query.alpha, "temperature": query.temperature,
            "margin": bounds.margin[at], "sq": bounds.sq[at],
        }  # fmt: skip

    def logit_bound(self, near: Tensor, q: Tensor, i: Tensor) -> Tensor:
        """t_n <= ... where a <xc, yc_n> <= near, for the pairs (q, i), which may broadcast."""
        c = {name: v[q] for name, v in self.columns.items()}
        r2 = c["sq"] + c["alpha"].square() * self.sq_norms[i] - 2 * near
        b = 0.0 if self.bias is None else self.bias[i]
        return (-0.5 * (r2 / c["sigma"]) / c["sigma"] + b) / c["temperature"]

    def exact(self, q: Tensor, i: Tensor) -> Tensor:
        """Lower bounds on t by direct differences [M], below the true value by their rounding."""
        step = max(1, ELEMENTS // self.x.shape[1])
        if len(q) > step:
            pieces = zip(q.split(step), i.split(step), strict=True)
            return torch.cat([self.exact(*piece) for piece in pieces])
        x, c = self.x[q], {name: v[q] for name, v in self.columns.items()}
        y = self.rows.values(i)
        r2 = (x - c["alpha"][:, None] * y).square().sum(1)
        r, size = r2.sqrt(), x.square().sum(1).sqrt()
        # Each difference is off by u (|x| + 2 r) at most; the sum of squares by D u in relation.
        off = 2 * _ULP * (size + 2 * r)
        r2 = r2 * (1 + _ULP * (x.shape[1] + 16)) + 2 * r * off + off.square()
        b = torch.zeros_like(r2) if self.bias is None else self.bias[i]
        t = (-0.5 * (r2 / c["sigma"]) / c["sigma"] + b) / c["temperature"]
        return torch.where(torch.isneginf(t), t, t - 8 * _ULP * t.abs())

    def coarsest(self, k: int, first: int) -> tuple[Tensor, Tensor]:
        """Level 0 for all rows: the bounds on t, and t without what the bands could add [b, N]."""
        each = torch.arange(len(self.x), device=self.x.device)[:, None]
        every = torch.arange(self.rows.n, device=self.x.device)[None]
        alpha, margin = self.columns["alpha"][:, None], self.columns["margin"][:, None]
        bands = self.norms.shape[1] - 1
        coarse = self.coarse.to(F64)
        product = alpha * (self.z[:, :k] @ coarse[:, :k].T)
        slack = self.norms[:, first:bands] @ coarse[:, k + first : k + bands].T + margin
        bound = self.logit_bound(product + alpha.abs() * slack, each, every)
        return bound, self.logit_bound(product, each, every)

    def finer(self, k0: int, k: int, first: int, q: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """A later level, for the pairs that are left: the same two numbers [M]."""
        near, slack = [], []
        step = max(1, ELEMENTS // k)
        for start in range(0, len(q), step):
            qs, rows = q[start : start + step], i[start : start + step]
            coarse, query = self.coarse[rows].to(F64), self.norms[qs]
            near.append(
                (self.z[qs, :k0] * coarse[:, :k0]).sum(1)
                + (self.z[qs, k0:k] * self.fine[rows, : k - k0].to(F64)).sum(1)
            )
            # The bands that are left, and the rounding of the stored coordinates: the last column.
            slack.append((query[:, first:] * coarse[:, k0 + first :]).sum(1))
        alpha, margin = self.columns["alpha"][q], self.columns["margin"][q]
        product = alpha * torch.cat(near)
        widest = alpha.abs() * (torch.cat(slack) + margin)
        return self.logit_bound(product + widest, q, i), self.logit_bound(product, q, i)

    def climb(self, gap: float, usable: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> counts, rows, thresholds and levels of the queries of this block."""
        b, n, dims, first_band = len(self.x), self.rows.n, self.dims, self.first_band
        bound, guess = self.coarsest(dims[0], first_band[0])
        top = guess.nan_to_num(-torch.inf).topk(min(_PROMISING, n), dim=1).indices
        q = torch.arange(b, device=top.device).repeat_interleave(top.shape[1])
        best = self.exact(q, top.reshape(-1)).reshape(b, -1).amax(1)
        q, i = (usable[:, None] & (bound >= best[:, None] - gap)).nonzero(as_tuple=True)
        q, i = self.without_weightless(q, i)
        levels = usable.to(torch.int64)
        for k, first in zip(dims[1:], first_band[1:], strict=True):
            count = torch.bincount(q, minlength=b)
            more = count > _FEW
            if not bool(more.any()):
                break
            levels += more
            mine = more[q]
            refined, guess = self.finer(dims[0], k, first, q[mine], i[mine])
            best = self.improved(best, guess, q[mine], i[mine])
            keep = torch.ones_like(mine)
            keep[mine] = refined >= best[q[mine]] - gap
            q, i = q[keep], i[keep]
        count = torch.bincount(q, minlength=b)
        given_up = (count > self.most_listed) | ~torch.isfinite(best)
        levels[given_up] = 0
        keep = ~given_up[q]
        return count * ~given_up, i[keep], best - gap, levels

    def without_weightless(self, q: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of bias -inf never survive, not even where no bound is finite."""
        if self.bias is None:
            return q, i
        keep = ~torch.isneginf(self.bias[i])
        return q[keep], i[keep]

    def improved(self, best: Tensor, guess: Tensor, q: Tensor, i: Tensor) -> Tensor:
        """The lower bound on max t, after evaluating each query's most promising row."""
        top = torch.full_like(best, -torch.inf).scatter_reduce(0, q, guess, "amax")
        hit = guess == top[q]
        exact = self.exact(q[hit], i[hit])
        return best.scatter_reduce(0, q[hit], exact, "amax")
