"""Certified pruning in plain float64 PyTorch: the bounds, and the sweep over what they leave.

The formulas are derived in ``docs/pruning.md``. Pairs (query, row) are held as two flat lists, in
the order of the queries: no array of N times B, and no loop over queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from memokern.backends import derivatives

_F64 = torch.float64
_ELEMENTS = 1 << 22  # of a temporary: 32 MiB in float64
_ULP = 2.0**-52  # twice the unit roundoff: pays for the second-order terms too
_PROMISING = 4  # rows per query and level whose logit is evaluated exactly
_FEW = 16  # survivors that are cheaper to evaluate than to bound again


# --- bound_scan ---------------------------------------------------------------------------------


def bound_scan(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor,
    sq_norms: Tensor,
    scale: float,
    shift: float,
    coarse: Tensor,
    fine: Tensor,
    z: Tensor,
    norms: Tensor,
    margin: Tensor,
    sq: Tensor,
    dims: list[int],
    first_band: list[int],
    eps: float,
    cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows can matter; see :mod:`memokern.ops_support`."""
    n, b = rows.shape[0], x.shape[0]
    gap = math.log(n / eps)
    usable = (sigma > 0) & (temperature > 0) & torch.isfinite(x).all(1)
    for v in (sigma, alpha, temperature, margin, sq):
        usable = usable & torch.isfinite(v)
    columns = {
        "sigma": sigma, "alpha": alpha, "temperature": temperature, "margin": margin, "sq": sq,
    }  # fmt: skip
    found_by_block: list[tuple[Tensor, ...]] = []
    step = max(1, _ELEMENTS // n)
    for start in range(0, b, step):
        at = slice(start, min(start + step, b))
        scan = _Scan(
            x[at].to(_F64), rows, bias, sq_norms, scale, shift, coarse, fine, z[at].to(_F64),
            norms[at].to(_F64), {name: v[at] for name, v in columns.items()},
        )  # fmt: skip
        found_by_block.append(scan.climb(dims, first_band, gap, cap, usable[at]))
    offsets = torch.zeros(b + 1, dtype=torch.int64, device=x.device)
    if not found_by_block:
        empty = torch.zeros(0, dtype=torch.int64, device=x.device)
        return offsets, empty, sigma.new_empty(0), empty.clone()
    counts, index, threshold, level = (
        torch.cat(column) for column in zip(*found_by_block, strict=True)
    )
    offsets[1:] = counts.cumsum(0)
    return offsets, index, threshold, level


class _Scan:
    """The bounds for one block of queries; everything in float64."""

    def __init__(
        self, x: Tensor, rows: Tensor, bias: Tensor | None, sq_norms: Tensor, scale: float,
        shift: float, coarse: Tensor, fine: Tensor, z: Tensor, norms: Tensor,
        columns: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.x, self.rows, self.bias, self.sq_norms = x, rows, bias, sq_norms
        self.scale, self.shift = scale, shift
        self.coarse, self.fine, self.z, self.norms = coarse, fine, z, norms
        self.columns = columns

    def logit_bound(self, near: Tensor, q: Tensor, i: Tensor) -> Tensor:
        """t_n <= ... where a <xc, yc_n> <= near, for the pairs (q, i), which may broadcast."""
        c = {name: v[q] for name, v in self.columns.items()}
        r2 = c["sq"] + c["alpha"].square() * self.sq_norms[i] - 2 * near
        b = 0.0 if self.bias is None else self.bias[i]
        return (-0.5 * (r2 / c["sigma"]) / c["sigma"] + b) / c["temperature"]

    def exact(self, q: Tensor, i: Tensor) -> Tensor:
        """Lower bounds on t by direct differences [M], below the true value by their rounding."""
        step = max(1, _ELEMENTS // self.x.shape[1])
        if len(q) > step:
            pieces = zip(q.split(step), i.split(step), strict=True)
            return torch.cat([self.exact(*piece) for piece in pieces])
        x, c = self.x[q], {name: v[q] for name, v in self.columns.items()}
        y = self.rows[i].to(_F64) * self.scale + self.shift
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
        every = torch.arange(len(self.rows), device=self.x.device)[None]
        alpha, margin = self.columns["alpha"][:, None], self.columns["margin"][:, None]
        bands = self.norms.shape[1] - 1
        coarse = self.coarse.to(_F64)
        product = alpha * (self.z[:, :k] @ coarse[:, :k].T)
        slack = self.norms[:, first:bands] @ coarse[:, k + first : k + bands].T + margin
        bound = self.logit_bound(product + alpha.abs() * slack, each, every)
        return bound, self.logit_bound(product, each, every)

    def finer(self, k0: int, k: int, first: int, q: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """A later level, for the pairs that are left: the same two numbers [M]."""
        near, slack = [], []
        step = max(1, _ELEMENTS // k)
        for start in range(0, len(q), step):
            qs, rows = q[start : start + step], i[start : start + step]
            coarse, query = self.coarse[rows].to(_F64), self.norms[qs]
            near.append(
                (self.z[qs, :k0] * coarse[:, :k0]).sum(1)
                + (self.z[qs, k0:k] * self.fine[rows, : k - k0].to(_F64)).sum(1)
            )
            # The bands that are left, and the rounding of the stored coordinates: the last column.
            slack.append((query[:, first:] * coarse[:, k0 + first :]).sum(1))
        alpha, margin = self.columns["alpha"][q], self.columns["margin"][q]
        product = alpha * torch.cat(near)
        widest = alpha.abs() * (torch.cat(slack) + margin)
        return self.logit_bound(product + widest, q, i), self.logit_bound(product, q, i)

    def climb(
        self, dims: list[int], first_band: list[int], gap: float, cap: int, usable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> counts, rows, thresholds and levels of the queries of this block."""
        b, n = len(self.x), len(self.rows)
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
        given_up = (count > cap) | ~torch.isfinite(best)
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


# --- posterior_on_support -----------------------------------------------------------------------


def _support_block(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    index: Tensor,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums of `posterior` over lists of rows, differentiable in every tensor but the rows."""
    each = torch.arange(len(x), device=x.device)
    q = each.repeat_interleave(counts)
    y = rows[index].to(_F64) * scale + shift
    r2 = (x[q] - alpha[q, None] * y).square().sum(1)
    b = torch.zeros_like(r2) if bias is None else bias[index]
    with torch.no_grad():  # sigma = 0: the nearest row, ties share
        reachable = torch.where(torch.isneginf(b), torch.inf, r2)
        best = torch.full_like(sigma, torch.inf).scatter_reduce(0, q, reachable, "amin")
        limit = sigma == 0
        at_limit = torch.where(reachable == best[q], 0.0, -torch.inf)
    spread = torch.where(limit, 1.0, sigma)[q]
    logits = torch.where(limit[q], at_limit, -0.5 * (r2 / spread) / spread) + b
    t = logits / temperature[q]
    with torch.no_grad():
        top = torch.full_like(sigma, -torch.inf).scatter_reduce(0, q, t, "amax")
        top = torch.where(torch.isinf(top), 0.0, top)
    power = torch.exp(t - top[q])
    total = torch.zeros_like(sigma).index_add(0, q, power)
    w = power / total[q]

    def sums(value: Tensor) -> Tensor:
        return value.new_zeros((len(x), *value.shape[1:])).index_add(0, q, value)

    mean = sums(w[:, None] * y)
    log_z = temperature * (top + torch.log(total))
    mean_logit = sums(w * torch.where(torch.isfinite(logits), logits, 0.0))
    mean_bias = sums(w * torch.where(torch.isneginf(b), 0.0, b))
    weight_sq = sums(w.square())
    edge = limit & (best != 0)
    log_z, mean_logit = (torch.where(edge, -torch.inf, v) for v in (log_z, mean_logit))
    lost = ~torch.isfinite(x).all(1)
    nothing = lost | (counts == 0)
    mean = torch.where(nothing[:, None], torch.nan, mean)
    mean_logit, mean_bias, weight_sq = (
        torch.where(nothing, torch.nan, v) for v in (mean_logit, mean_bias, weight_sq)
    )
    return mean, torch.where(lost, torch.nan, log_z), mean_logit, mean_bias, weight_sq


def _lists(start: Tensor, dim: int) -> Iterator[tuple[slice, slice]]:
    """Queries, and their part of the index, a block of rows at a time; at least one query."""
    offsets, limit = start.tolist(), max(1, _ELEMENTS // max(1, dim))
    first = 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= limit:
            last += 1
        yield slice(first, last), slice(offsets[first], offsets[last])
        first = last


def posterior_on_support(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    start: Tensor,
    index: Tensor,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sweep over a list of rows for each query; see :mod:`memokern.ops_support`."""
    counts = start.diff()
    parts = [
        _support_block(
            x[at].to(_F64), rows, sigma[at], alpha[at], temperature[at], bias, counts[at],
            index[where], scale, shift,
        )
        for at, where in _lists(start, x.shape[1])
    ]  # fmt: skip
    if not parts:
        empty = sigma.new_empty(0)
        return x.new_empty(x.shape), empty, empty.clone(), empty.clone(), empty.clone()
    mean, log_z, mean_logit, mean_bias, weight_sq = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return mean.to(x.dtype), log_z, mean_logit, mean_bias, weight_sq


def _blocks(
    rows: Tensor, start: Tensor, index: Tensor, scale: float, shift: float
) -> Iterator[derivatives.Block]:
    counts, rows = start.diff(), rows.detach()

    def sums_of(counts: Tensor, index: Tensor) -> derivatives.Sums:
        return lambda x, s, a, t, b: _support_block(
            x, rows, s, a, t, b, counts, index, scale, shift
        )

    for at, where in _lists(start, rows.shape[1]):
        yield at, sums_of(counts[at], index[where])


def posterior_on_support_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    start: Tensor,
    index: Tensor,
    mean: Tensor,
    log_z: Tensor,
    mean_logit: Tensor,
    mean_bias: Tensor,
    weight_sq: Tensor,
    grad_mean: Tensor,
    grad_log_z: Tensor,
    grad_mean_logit: Tensor,
    grad_mean_bias: Tensor,
    grad_weight_sq: Tensor,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, sigma, alpha, temperature and bias, by differentiating the formulas."""
    grads = [grad_mean, grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq]
    inputs = (x, sigma, alpha, temperature, bias)
    blocks = _blocks(rows, start, index, scale, shift)
    return derivatives.backward(inputs, grads, blocks)


def posterior_on_support_double_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    start: Tensor,
    index: Tensor,
    grads: list[Tensor],
    grad_grads: list[Tensor],
    scale: float,
    shift: float,
) -> list[Tensor]:
    """Gradients of <grad_grads, the backward> for the inputs, bias last, then for grads."""
    inputs = (x, sigma, alpha, temperature, bias)
    blocks = _blocks(rows, start, index, scale, shift)
    return derivatives.double_backward(inputs, grads, grad_grads, blocks)
