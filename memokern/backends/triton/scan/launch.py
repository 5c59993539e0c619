"""The Triton launcher of ``bound_scan``: which rows can matter to each query.

The signature is that of :mod:`memokern.ops.listed`, the algorithm and the slack for rounding those
of ``csrc/bounds-inl.h``. How many rows are left only the device knows, so this waits for it, once
and then once per level: it cannot be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.backends.cpu.native import shaped
from memokern.backends.levels import bands_of, check_limits
from memokern.backends.reference import dense as reference
from memokern.backends.triton.core.inputs import capturing, checked, numbers, refusal
from memokern.backends.triton.listed.launch import pairs
from memokern.backends.triton.scan import kernels as scan

_F32, _F64 = torch.float32, torch.float64
_PAIRS = 1 << 26  # queries times rows that are scanned at a time: lists can be no longer
_PROMISING = 4  # rows per query that are evaluated before the scan
_U = 6e-8  # above 2^-24, as all of the slack


def bound_scan(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor, sq_norms: Tensor, scale: float, shift: float,
    coarse: Tensor, fine: Tensor, z: Tensor, norms: Tensor, margin: Tensor, sq: Tensor,
    dims: list[int], first_band: list[int], eps: float, cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows that can matter to each query; :mod:`memokern.ops.listed` says what is proven."""
    if capturing(x.device):
        raise RuntimeError(
            "bound_scan waits for the device, so it cannot be captured in a CUDA graph: sweep"
            " densely there (method='dense')"
        )
    if refusal(x, rows) is not None:
        return reference.bound_scan(
            x, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, coarse, fine,
            z, norms, margin, sq, dims, first_band, eps, cap,
        )  # fmt: skip
    (m, d), n = x.shape, len(rows)
    dims, first_band = list(dims), list(first_band)
    bands = bands_of(coarse, dims, first_band)
    check_limits(n, eps, cap)
    q = _Queries(
        checked(x, rows), shaped("z", z, (m, dims[-1]), _F32),
        shaped("norms", norms, (m, bands + 1), _F32), shaped("margin", margin, (m,), _F64),
        shaped("sq", sq, (m,), _F64), shaped("sigma", sigma, (m,), _F64),
        shaped("alpha", alpha, (m,), _F64), shaped("temperature", temperature, (m,), _F64),
    )  # fmt: skip
    data = _Data(
        rows.detach(), shaped("coarse", coarse, (n, dims[0] + bands + 1), _F32),
        shaped("fine", fine, (n, dims[-1] - dims[0]), torch.float16, _F32),
        shaped("center", center, (d,), _F32, _F64).to(_F64),
        shaped("sq_norms", sq_norms, (n,), _F64),
        None if bias is None else shaped("bias", bias, (n,), _F64),
        numbers(scale, shift, x.device), dims, first_band, bands, eps,
    )  # fmt: skip
    step = max(1, _PAIRS // n)
    found = [
        _Scan(data, _Queries(*(v[i : i + step] for v in q))).run(cap) for i in range(0, m, step)
    ]
    start = torch.zeros(m + 1, dtype=torch.int64, device=x.device)
    if not found:
        return start, start.new_empty(0), sigma.new_empty(0), start.new_empty(0)
    counts, index, threshold, level = (torch.cat(column) for column in zip(*found, strict=True))
    torch.cumsum(counts, 0, out=start[1:])
    return start, index, threshold, level


class _Queries(NamedTuple):
    x: Tensor
    z: Tensor
    norms: Tensor
    margin: Tensor
    sq: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor


class _Data(NamedTuple):
    rows: Tensor
    coarse: Tensor
    fine: Tensor
    center: Tensor
    sq_norms: Tensor
    bias: Tensor | None
    numbers: Tensor
    dims: list[int]
    first_band: list[int]
    bands: int
    eps: float


class _Scan:
    """One block of queries. best [B]: the largest s_n - |xc|^2 / 2 known to be reached."""

    def __init__(self, data: _Data, q: _Queries) -> None:
        self.data, self.q, self.device = data, q, q.x.device
        self.b, self.n, self.k0 = len(q.x), len(data.rows), data.dims[0]
        self.a, self.s2 = q.alpha.abs(), q.sigma.square()
        self.unit = self.s2 * q.temperature
        self._limits()
        self.best = torch.full((self.b,), -torch.inf, dtype=_F64, device=self.device)

    def _limits(self) -> None:
        """What is added to `best` to get the value below which a computed bound is that of a row to
        drop; and which queries are in the range where float32 can neither overflow nor lose
        sigma^2 b. The slack is scan_query's of csrc/bounds-inl.h, term by term."""
        q, data, a = self.q, self.data, self.a
        y_max, c = data.sq_norms.max().sqrt(), data.center.square().sum().sqrt()
        b_max = torch.zeros((), dtype=_F64, device=self.device)
        if data.bias is not None:
            size = torch.where(torch.isneginf(data.bias), 0.0, data.bias.abs())
            b_max = torch.where(torch.isnan(size), torch.inf, size).max()
        size, span = q.sq.sqrt(), self.unit * math.log(self.n / data.eps)
        product = a * size * y_max
        rest = 0.5 * a.square() * y_max.square() + self.s2 * b_max
        slack = (
            a * q.margin + 64 * _U * product + (data.coarse.shape[1] + 64) * _U * rest
            + 1e-12 * q.sq + 1e-15 * a * (c + y_max) * (size + a * y_max) + 1e-35
        )  # fmt: skip
        self.reach = 0.5 * q.sq - span - slack
        usual = (q.sigma > 1e-15) & (q.sigma < 1e15) & (q.temperature > 1e-15)
        usual &= (q.temperature < 1e15) & (a < 1e15) & (q.sq < 1e30) & (q.margin >= 0)
        self.active = usual & (slack < 1e30) & (span < 1e30) & (product + rest < 1e30)

    def least(self) -> Tensor:
        """[B] float32, not above best + reach; inf for queries that are out of range."""
        value = (self.best + self.reach).to(_F32)
        return torch.where(self.active, value - value.abs() * 1.3e-7, torch.inf)

    def consider(self, query: Tensor, index: Tensor) -> Tensor:
        """Proven lower bounds of s_n - |xc|^2 / 2 [M]: direct differences, less their rounding."""
        q, data = self.q, self.data
        r2 = pairs(q.x, data.rows, q.alpha, data.numbers, query, index)[0]
        b = self.s2[query] * (0.0 if data.bias is None else data.bias[index])
        value = b - 0.5 * r2
        less = (q.x.shape[1] + 16) * 2.3e-16 * r2 + 1e-15 * b.abs()
        return torch.where(torch.isfinite(value), value - less, -torch.inf)

    def run(self, cap: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> counts, rows, thresholds and levels of these queries."""
        query, index, up = self.coarsest()
        level = torch.ones(self.b, dtype=torch.int64, device=self.device)
        for k in range(1, len(self.data.dims)):
            count = torch.bincount(query, minlength=self.b)
            if int(count.max()) <= 1:
                break
            level += count > 1
            self.climb(k, query, index, up)
            self.improve(query, index, up)
            keep = ~(up < self.least()[query])
            query, index, up = query[keep], index[keep], up[keep]
        count = torch.bincount(query, minlength=self.b)
        lost = ~self.active | ~torch.isfinite(self.best) | (count > cap)
        threshold = self.best / self.unit - math.log(self.n / self.data.eps)
        return (
            torch.where(lost, 0, count), index[~lost[query]],
            torch.where(lost, torch.nan, threshold), torch.where(lost, 0, level),
        )  # fmt: skip

    def coarsest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Level 0: the pairs that are left, by query and row, and their bounds."""
        data, q, device = self.data, self.q, self.device
        blocks = -(-self.n // scan.BLOCK_N)
        value = torch.empty(self.b, blocks, dtype=_F32, device=device)
        place = torch.empty(self.b, blocks, dtype=torch.int64, device=device)
        none, no_pair = value.new_empty(0), place.new_empty(0)
        xs = torch.cat([
            q.alpha[:, None] * q.z[:, : self.k0], self.a[:, None] * q.norms[:, : data.bands]
        ], 1).to(_F32)  # fmt: skip
        # A query that is out of range has numbers that are harmless, and is not listed.
        fixed = {
            "coarse": data.coarse, "half": (-0.5 * data.sq_norms).to(_F32),
            "xs": torch.where(self.active[:, None], xs, 0.0),
            "bias": none if data.bias is None else data.bias.to(_F32),
            "a2": torch.where(self.active, self.a.square(), 0.0).to(_F32),
            "s2": torch.where(self.active, self.s2, 1.0).to(_F32), "B": self.b, "N": self.n,
            "k0": self.k0, "K": self.k0 + data.bands, "stride_n": data.coarse.shape[1],
        }  # fmt: skip

        def launch(step: int, least: Tensor, m: int = 0) -> tuple[Tensor, Tensor, Tensor]:
            variant = scan.level0_variant(step, data.bias is not None, self.b <= 16)
            out = (
                no_pair.new_empty(m), no_pair.new_empty(m),
                torch.empty(m, dtype=_F32, device=device),
            )  # fmt: skip
            variant.launch(
                (-(-self.b // variant.constexprs["BLOCK_B"]) * blocks,), device, **fixed,
                least=least, value=value, place=place, query=out[0], index=out[1], up=out[2],
            )  # fmt: skip
            return out

        launch(scan.PROMISE, none)
        top = place.gather(1, value.topk(min(_PROMISING, blocks), dim=1).indices)
        each = torch.arange(self.b, device=device)[:, None].expand_as(top)
        reached = self.consider(each.reshape(-1), top.reshape(-1))
        self.best = reached.reshape(top.shape).amax(1)
        least = self.least()
        launch(scan.COUNT, least)
        after = place.flatten().cumsum(0)
        total = int(after[-1])
        place = (after - place.flatten()).view_as(place)
        return launch(scan.LIST, least, total)

    def climb(self, level: int, query: Tensor, index: Tensor, up: Tensor) -> None:
        """Adds a level to the bounds."""
        data, q = self.data, self.q
        k1, k2 = (k - self.k0 for k in data.dims[level - 1 : level + 1])
        b1, b2 = data.first_band[level - 1 : level + 1]
        variant = scan.climb_variant(data.fine.dtype)
        variant.launch(
            (-(-len(up) // variant.constexprs["BLOCK_M"]),), self.device, coarse=data.coarse,
            fine=data.fine, xs=(q.alpha[:, None] * q.z[:, self.k0 :]).to(_F32),
            norms=(self.a[:, None] * q.norms).to(_F32), query=query, index=index, up=up,
            M=len(up), F=data.fine.shape[1], stride_n=data.coarse.shape[1], k0=self.k0,
            bands=data.bands, k1=k1, k2=k2, b1=b1, b2=b2, pad=float(level == 1),
        )  # fmt: skip

    def improve(self, query: Tensor, index: Tensor, up: Tensor) -> None:
        """`best`, after each query's most promising row was evaluated: its first of the largest."""
        top = up.new_full((self.b,), -torch.inf).scatter_reduce(0, query, up, "amax")
        m = len(query)
        at = torch.where(up == top[query], torch.arange(m, device=self.device), m)
        first = at.new_full((self.b,), m).scatter_reduce(0, query, at, "amin")
        there = (first < m).nonzero()[:, 0]
        value = self.consider(there, index[first[there]])
        self.best[there] = torch.maximum(self.best[there], value)
