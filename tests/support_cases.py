"""What the tests of certified pruning share: an index of their own, plainly, and the truth."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, column, cpu
from torch import Tensor

U = 2.0**-24
DIMS, EDGES = [8, 12, 16, 24], [8, 10, 12, 16, 24, 32]  # of a ladder and of its bands


def up(t: Tensor) -> Tensor:
    """float64 norms to float32, not below them."""
    return (t * (1 + 1e-6) + 1e-30).to(F32)


def spread(n: int, d: int, seed: int, kind: str = "random") -> torch.Tensor:
    """[n, d] float32 rows with a few directions of large variance."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, d, dtype=F64, generator=g) * torch.linspace(3, 0.1, d, dtype=F64)
    if kind == "clustered":  # sorted: the last cluster's rows come last
        y = 0.05 * y + 3 * torch.randn(8, d, dtype=F64, generator=g)[torch.arange(n) * 8 // n]
    if kind == "duplicated":
        y[n // 3 :] = y[torch.arange(n - n // 3) % max(n // 3, 1)]
    return y.to(F32)


def near(rows, b: int, sigma: float, alpha: float, seed: int, x_dtype=F32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(rows), (b,), generator=g)
    noise = torch.randn(b, rows.shape[1], dtype=F64, generator=g)
    return (alpha * rows.to(F64)[pick] + sigma * noise).to(x_dtype)


class Plain:
    """An index by a random orthonormal basis, and the queries in it: the contract of bound_scan."""

    def __init__(self, y: Tensor, dims: list[int], edges: list[int], half: bool, basis: str):
        self.center = y.mean(0)
        yc = y - self.center
        d = y.shape[1]
        if basis == "pca":
            self.basis = torch.linalg.svd(yc.T @ yc)[0]
        elif basis == "axes":
            self.basis = torch.eye(d, dtype=F64)
        else:
            g = torch.Generator().manual_seed(1)
            self.basis = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=g))[0]
        self.dims, self.k = dims, dims[-1]
        self.edges = [e for e in edges if dims[0] <= e < d] + [d]
        self.first_band = [self.edges.index(k) for k in dims]
        full = yc @ self.basis
        z = full[:, : self.k]
        stored = z[:, dims[0] :].to(torch.float16 if half else F32)
        coarse = z[:, : dims[0]].to(F32)
        pad = (torch.cat([coarse, stored], 1).to(F64) - z).norm(dim=1)
        self.coarse = torch.cat([coarse, self.bands(full), up(pad)[:, None]], 1).contiguous()
        self.fine = stored.contiguous()
        self.sq_norms = yc.square().sum(1)
        self.y_max = self.sq_norms.max().sqrt().item()

    def bands(self, full: Tensor) -> Tensor:
        cuts = list(zip(self.edges, self.edges[1:], strict=False))
        if not cuts:
            return torch.empty(len(full), 0, dtype=F32)
        return torch.stack([up(full[:, a:b].norm(dim=1)) for a, b in cuts], 1)

    def queries(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, norms, margin, sq of the queries, as bound_scan takes them."""
        xc = x.to(F64) - alpha[:, None] * self.center
        full, sq = xc @ self.basis, xc.square().sum(1)
        length = sq.sqrt()
        norms = torch.cat([self.bands(full), up(length)[:, None]], 1)
        nb = len(self.edges) - 1
        margin = 2 * (self.k + nb + 16) * U * length * self.y_max + 1e-12 * length * self.y_max
        return full[:, : self.k].to(F32).contiguous(), norms, margin, sq


def scan(x, rows, index, sigma, alpha, temperature, bias, scale, shift, *, eps=1e-6, cap=None,
         coarse=None, backend=cpu):  # fmt: skip
    """bound_scan with the queries' part of the index; -> start, index, threshold, level."""
    return backend.bound_scan(
        x, rows, sigma, alpha, temperature, bias, index.center, index.sq_norms, scale, shift,
        index.coarse if coarse is None else coarse, index.fine, *index.queries(x, alpha),
        index.dims, index.first_band, eps, len(rows) if cap is None else cap,
    )  # fmt: skip


def logits(x, y, sigma, alpha, temperature, bias):
    """t [B, N], by direct differences in float64."""
    r2 = torch.stack([(q - a * y).square().sum(1) for q, a in zip(x.to(F64), alpha, strict=True)])
    b = torch.zeros(len(y), dtype=F64) if bias is None else bias
    return (-r2 / (2 * sigma[:, None] ** 2) + b) / temperature[:, None]


def check_lists(found, t: Tensor, eps: float) -> None:
    """The promise of bound_scan: against all logits t [B, N]."""
    start, index, threshold, level = found
    assert start[0] == 0 and start[-1] == len(index)
    for b in range(len(t)):
        mine = index[start[b] : start[b + 1]]
        if level[b] == 0:
            assert len(mine) == 0
            continue
        assert bool((mine.diff() > 0).all()) and len(mine) > 0
        left = torch.ones(t.shape[1], dtype=torch.bool)
        left[mine] = False
        assert bool((t[b][left] <= threshold[b]).all())
        assert bool(left[t[b] > threshold[b]].logical_not().all())
        top = t[b].max()
        # The threshold is a sum of doubles the size of the largest logit.
        slack = 1e-15 * abs(top.item()) * 100
        lse = torch.logsumexp(t[b], 0)
        assert math.log(t.shape[1]) + threshold[b] - lse <= math.log(eps) + slack


def lying_bounds(n: int, b: int, backend) -> None:
    """Norms too small on rows that the coordinates do not tell: `check_lists` must fail."""
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(n, 40, dtype=F64)
    y[:, :8] = torch.randn(n, 8, dtype=F64, generator=g)
    y[:, 30:] = 6 * torch.randn(n, 10, dtype=F64, generator=g)  # beyond the ladder
    rows = y.to(F32)
    y = rows.to(F64)
    index = Plain(y, DIMS[:3], EDGES, True, "axes")
    how = (column(0.5, b), column(1.0, b), column(1.0, b))
    x = near(y, b, 0.5, 1.0, 2)
    t = logits(x, y, *how, None)
    found = scan(x, rows, index, *how, None, 1.0, 0.0, backend=backend)
    check_lists(found, t, 1e-6)
    broken = index.coarse.clone()
    broken[:, 8:-1] *= 0.05
    found = scan(x, rows, index, *how, None, 1.0, 0.0, coarse=broken, backend=backend)
    with pytest.raises(AssertionError):
        check_lists(found, t, 1e-6)


def lists(n: int, b: int, seed: int, empty: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    counts = [0 if empty and i == 1 else int(torch.randint(1, n + 1, (1,), generator=g))
              for i in range(b)]  # fmt: skip
    index = [torch.randperm(n, generator=g)[:c].sort().values for c in counts]
    return torch.tensor([0, *counts]).cumsum(0), torch.cat(index)


def on_lists(x, rows, sigma, alpha, temperature, bias, start, index, scale, shift):
    """The formulas over the rows listed, in float64; differentiable."""
    out = []
    for b in range(len(x)):
        n = index[start[b] : start[b + 1]]
        extra = torch.zeros(len(n), dtype=F64) if bias is None else bias[n]
        keep = extra > -math.inf
        n, extra = n[keep], extra[keep]
        y = rows[n].to(F64) * scale + shift
        r2 = (x[b].to(F64) - alpha[b] * y).square().sum(1)
        logit = -r2 / (2 * sigma[b] ** 2) + extra
        w = torch.softmax(logit / temperature[b], 0)
        log_z = temperature[b] * torch.logsumexp(logit / temperature[b], 0)
        out.append((w @ y, log_z, (w * logit).sum(), (w * extra).sum(), w.square().sum()))
    return tuple(torch.stack(v) for v in zip(*out, strict=True))
