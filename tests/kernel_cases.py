"""What the tests of the compiled kernels share: cases, and an oracle in float64 of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memokern.backends import protocol
from memokern.calls import LogitBounds, Query, RowLists, Rows, Sums


class Flat:
    """A backend's operations with their arguments one by one."""

    def __init__(self, name: str) -> None:
        self.backend = protocol.get(name)

    def posterior(self, *args):
        query, rows, _ = self._call(args)
        return self.backend.posterior(query, rows)

    def posterior_backward(self, *args):
        query, rows, given = self._call(args)
        return self.backend.posterior_backward(query, rows, Sums(*given[:5]), Sums(*given[5:]))

    def posterior_backward_rows(self, *args):
        x, rows, sigma, alpha, temperature, bias, _, grads, scale, shift, *how = args
        query = Query(x, sigma, alpha, temperature, bias, *how)
        return self.backend.posterior_backward_rows(query, Rows(rows, scale, shift), Sums(*grads))

    def nearest(self, x, rows, k, center, sq_norms, scale, shift):
        return self.backend.nearest(x, Rows(rows, scale, shift, center, sq_norms), k)

    def posterior_listed(self, *args):
        query, rows, lists, _ = self._listed(args)
        return self.backend.posterior_listed(query, rows, lists)

    def posterior_listed_backward(self, *args):
        query, rows, lists, given = self._listed(args)
        back = self.backend.posterior_listed_backward
        return back(query, rows, lists, Sums(*given[:5]), Sums(*given[5:]))

    def bound_scan(self, *args):
        x, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, *bounds = args
        *tensors, dims, first_band, eps, most_listed = bounds
        bounds = LogitBounds(*tensors, tuple(dims), tuple(first_band), eps, most_listed)
        query = Query(x, sigma, alpha, temperature, bias)
        found = self.backend.bound_scan(query, Rows(rows, scale, shift, center, sq_norms), bounds)
        return (*found.lists, found.threshold, found.level)

    @staticmethod
    def _call(args):
        """Query, rows, and what lies between the eighth argument and the units."""
        x, rows, sigma, alpha, temperature, bias, center, sq_norms, *rest = args
        i = next(i for i, v in enumerate(rest) if isinstance(v, float))
        given, (scale, shift, *how) = rest[:i], rest[i:]
        query = Query(x, sigma, alpha, temperature, bias, *how)
        return query, Rows(rows, scale, shift, center, sq_norms), given

    @staticmethod
    def _listed(args):
        x, rows, sigma, alpha, temperature, bias, start, index, *given, scale, shift = args
        query = Query(x, sigma, alpha, temperature, bias)
        return query, Rows(rows, scale, shift), RowLists(start, index), given


cpu = Flat("cpu")
if cpu.backend.unavailable() is not None:
    pytest.skip(cpu.backend.unavailable(), allow_module_level=True)

F32, F64 = torch.float32, torch.float64
ROW_TYPES = [F64, F32, torch.bfloat16, torch.float16, torch.uint8]
# Relative to the largest |y|: the float32 kernels' contract; float64 with room for 2^10 sums.
MEAN_TOL = {F32: 1e-5, F64: 1e-12}


def column(value: float, b: int) -> Tensor:
    return torch.full((b,), value, dtype=F64)


def make(b: int, n: int, d: int, dtype: torch.dtype, sigma: float, *, alpha: float = 1.0,
         x_dtype: torch.dtype = F32,
         seed: int = 0, offset: float = 0.0, repeat: float | None = None):  # fmt: skip
    """Rows, their scale and shift, and queries alpha y + sigma z around some of them."""
    g = torch.Generator().manual_seed(seed)
    scale, shift = (2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    if dtype == torch.uint8:
        rows = torch.randint(0, 256, (n, d), dtype=dtype, generator=g)
    else:
        rows = torch.randn(n, d, dtype=F64, generator=g) + offset
        if repeat is not None:  # near-duplicates of the first row
            rows[n // 2 :] = rows[0] + repeat * torch.randn(n - n // 2, d, dtype=F64, generator=g)
        rows = rows.to(dtype)
    y = rows.to(F64) * scale + shift
    pick = torch.arange(b) % n
    x = (alpha * y[pick] + sigma * torch.randn(b, d, dtype=F64, generator=g)).to(x_dtype)
    return x, rows, scale, shift


def far(rows: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The same rows, 2^30 elements apart: memory of which a page for each is touched. The fourth
    lies beyond 2^31."""
    (n, d), stride = rows.shape, 1 << 30
    memory = torch.empty(stride * (n - 1) + d, dtype=rows.dtype, device=device)
    return memory.as_strided((n, d), (stride, 1)).copy_(rows)


def oracle(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel):
    """The formulas, densely, by direct differences; sigma > 0 and no exact hits."""
    b = torch.zeros(rows.shape[0], dtype=F64) if bias is None else bias
    kept = torch.isfinite(b)
    y, b = (rows.to(F64) * scale + shift)[kept], b[kept]
    xd = x.to(F64)
    r2 = torch.stack([(xd - alpha[:, None] * row).square().sum(1) for row in y], 1)
    d = x.shape[1]
    if kernel == "gaussian":
        logit = -r2 / (2 * sigma[:, None] ** 2)
    else:
        logit = -d / 2 * torch.log(r2 / d)
    logit = logit + b
    w = torch.softmax(logit / temperature[:, None], 1)
    log_z = temperature * torch.logsumexp(logit / temperature[:, None], 1)
    return w @ y, log_z, (w * logit).sum(1), (w * b).sum(1), w.square().sum(1)


def compare(got, want, rows, scale, shift, compute):
    largest = (rows.to(F64) * scale + shift).abs().max().item()
    assert all(torch.isfinite(v).all() for v in got)
    tol = MEAN_TOL[compute] * max(largest, 1e-30)
    assert (got[0].to(F64) - want[0]).abs().max().item() <= tol + (1e-12 if compute == F64 else 0)
    # Weights are right to 1e-4 in float32: so are the logarithm of their sum and sum w^2. A mean
    # of logits is off by the logits' own error and by 1e-4 of their spread.
    stat = 1e-4 if compute == F32 else 1e-9
    for a, e in zip(got[1:], want[1:], strict=True):
        assert ((a - e).abs() <= stat * (1 + e.abs())).all(), (a - e).abs().max()


def run(
    x,
    rows,
    sigma,
    alpha=1.0,
    temperature=1.0,
    bias=None,
    scale=1.0,
    shift=0.0,
    kernel="gaussian",
    cached=False,
):
    b = x.shape[0]
    center = sq = None
    if cached:
        y = rows.to(F64) * scale + shift
        center = y.mean(0).to(F64 if rows.dtype == F64 else F32)
        sq = (y - center.to(F64)).square().sum(1)
    columns = [column(v, b) for v in (sigma, alpha, temperature)]
    got = cpu.posterior(x, rows, *columns, bias, center, sq, scale, shift, kernel)
    return got, columns


def check(
    x,
    rows,
    scale,
    shift,
    sigma,
    *,
    alpha=1.0,
    temperature=1.0,
    bias=None,
    kernel="gaussian",
    cached=False,
):
    got, columns = run(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel, cached)
    compute = F64 if F64 in (x.dtype, rows.dtype) else F32
    assert got[0].dtype == x.dtype
    want = oracle(x, rows, *columns, bias, scale, shift, kernel)
    compare(got, want, rows, scale, shift, F32 if x.dtype == F32 else compute)
    return got


def gradients(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel, grads):
    leaves = [v.to(F64).requires_grad_() for v in (x, sigma, alpha, temperature)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
    values = oracle(
        leaves[0], rows, *leaves[1:4], leaves[4] if bias is not None else None, scale, shift, kernel
    )
    total = sum((v * g).sum() for v, g in zip(values, grads, strict=True))
    got = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(got, leaves, strict=True)]
