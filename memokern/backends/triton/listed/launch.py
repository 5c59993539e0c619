"""The Triton launchers of what selects rows: the nearest ones, and sums over lists of them.

The signatures are those of :mod:`memokern.ops.dense` and :mod:`memokern.ops.listed`. What the kernels
cannot take (:func:`memokern.backends.triton.core.inputs.refusal`) goes through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cpu.native import shaped
from memokern.backends.reference import dense as reference
from memokern.backends.triton.core.inputs import (
    Centred,
    capturing,
    centred,
    checked,
    multiprocessors,
    numbers,
    refusal,
)
from memokern.backends.triton.core.rows import stride_of
from memokern.backends.triton.listed import kernels as support
from memokern.backends.triton.nearest import kernels as near

_F32, _F64 = torch.float32, torch.float64
_WORKSPACE = 64 << 20  # bytes of the least keys of all groups; more queries go in turns
_U = 1.01 * 2.0**-24


def nearest(
    x: Tensor, rows: Tensor, k: int, center: Tensor | None, sq_norms: Tensor | None,
    scale: float, shift: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    q, n = checked(x, rows), rows.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the number of rows, {n}; got {k}")
    if refusal(x, rows) is not None or k > near.ROOM[-1]:
        return reference.nearest(x, rows, k, center, sq_norms, scale, shift)
    rows, b = rows.detach(), len(q)
    c = centred(rows, center, sq_norms, scale, shift)
    dist = torch.empty(b, k, dtype=_F64, device=x.device)
    index = torch.empty(b, k, dtype=torch.int64, device=x.device)
    step = max(1, _WORKSPACE // (4 * -(-n // near.GROUP)))
    for at in (slice(i, min(i + step, b)) for i in range(0, b, step)):
        dist[at], index[at] = _nearest_block(q[at], rows, k, c, scale, shift)
    return dist, index


def _nearest_block(
    q: Tensor, rows: Tensor, k: int, c: Centred, scale: float, shift: float
) -> tuple[Tensor, Tensor]:
    (b, d), n, device = q.shape, rows.shape[0], q.device
    groups = -(-n // near.GROUP)
    xc = q.to(_F64) - c.center
    xx = xc.square().sum(1)
    lost = ~torch.isfinite(xx)
    xc, xx = torch.where(lost[:, None], 0.0, xc), torch.where(lost, 0.0, xx)
    precision = near.PRECISION
    least = torch.empty(b, groups, dtype=_F32, device=device)
    first = near.groups_variant(rows.dtype, b <= 16, precision)
    first.launch(
        (-(-b // first.constexprs["BLOCK_B"]) * groups,), device,
        xc=xc.to(_F32), rows=rows, offset=c.offset, half_sq=c.half_sq, least=least,
        B=b, N=n, D=d, stride_n=stride_of(rows), scale=scale,
    )  # fmt: skip
    limit = torch.full((b,), torch.inf, dtype=_F32, device=device)
    if groups >= k:
        e = key_error(xx.sqrt(), c, d, scale, precision)
        kth = least.topk(k, dim=1, largest=False).values[:, -1].to(_F64)
        bound = torch.where(torch.isfinite(e), kth + 2 * e, torch.inf)
        limit = torch.nextafter(bound.to(_F32), limit)
    second = near.exact_variant(rows.dtype, k)
    parts = max(1, min(groups, 32, 2 * multiprocessors(device) // b))
    slots = second.constexprs["SLOTS"]
    dist = torch.empty(b, parts, slots, dtype=_F64, device=device)
    index = torch.empty(b, parts, slots, dtype=torch.int64, device=device)
    second.launch(
        (b * parts,), device, x=q, rows=rows, numbers=numbers(scale, shift, device), least=least,
        limit=limit, dist=dist, index=index, N=n, D=d, stride_n=stride_of(rows), parts=parts, k=k,
    )  # fmt: skip
    # By distance, and by index among equals.
    index, order = index.flatten(1).sort(dim=1, stable=True)
    dist, order = dist.flatten(1).gather(1, order).sort(dim=1, stable=True)
    dist, index = dist[:, :k], index.gather(1, order)[:, :k]
    return (
        torch.where(lost[:, None], torch.nan, dist),
        torch.where(lost[:, None], torch.arange(k, device=device), index),
    )


def key_error(size: Tensor, c: Centred, d: int, scale: float, precision: str) -> Tensor:
    """What rounding can do to a key of `nearest_groups_kernel`, for |xc| = size [B], any data.

    With u = 2^-24 and Y = max |yc|: the product of xc and raw + offset, each rounded, in any order
    of its D sums: ieee (D + 8) u; tf32x3 drops the product of the low parts and what they lose,
    3 2^-20, and sums 3 D products in tensor cores, which are taken to truncate with up to four
    times u each: (12 D + 64) u. A row: raw + offset, with offset rounded: 4 u (Y + pad). The norm,
    and the last three operations: 4 u. In float64: xc, |xc|^2, |yc|^2 and the direct difference.
    """
    u, y, pad = _U, c.reach, c.pad
    sums = d + 8 if precision == "ieee" else 12 * d + 64 + 3 * 16
    product, row = size * y, y + pad
    wide = (d + 32) * 4.5e-16 * (size + row).square()
    e = u * (sums * size * (y + 4 * u * row) + 4 * size * row + 5 * product + 4 * y.square()) + wide
    # Where float32 might overflow nothing is ruled out.
    unit = max(1.0, abs(scale), 1 / abs(scale))
    return torch.where((size + 1) * (row + 1) * unit < 1e36, 1.01 * e, torch.inf)


# --- sums over lists ----------------------------------------------------------------------------


def pairs(
    x: Tensor, rows: Tensor, alpha: Tensor, unit: Tensor, query: Tensor, index: Tensor,
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """r^2, <g, y>, <x - alpha y, y> [M] of these queries and rows; the last two with grad_mean
    only. unit: the rows' scale and shift."""
    m = len(index)
    r2, gy, xy = (torch.empty(m, dtype=_F64, device=x.device) for _ in range(3))
    variant = support.pairs_variant(rows.dtype, grad_mean is not None)
    variant.launch(
        (-(-m // variant.constexprs["BLOCK_M"]),), x.device, x=x, rows=rows, numbers=unit,
        alpha=alpha, grad_mean=unit if grad_mean is None else grad_mean, query=query, index=index,
        r2=r2, gy=gy, xy=xy, M=m, D=x.shape[1], N=len(rows), stride_n=stride_of(rows),
    )  # fmt: skip
    return r2, gy, xy


class _Lists:
    """Checked arguments of the operations on lists, and what both directions do with them."""

    def __init__(
        self, x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
        bias: Tensor | None, start: Tensor, index: Tensor, scale: float, shift: float,
    ) -> None:  # fmt: skip
        self.x, self.rows = checked(x, rows), rows.detach()
        self.b, self.d, self.device = len(x), x.shape[1], x.device
        self.sigma = shaped("sigma", sigma, (self.b,), _F64)
        self.alpha = shaped("alpha", alpha, (self.b,), _F64)
        self.temperature = shaped("temperature", temperature, (self.b,), _F64)
        self.bias = None if bias is None else shaped("bias", bias, (len(rows),), _F64)
        self.start = shaped("start", start, (self.b + 1,), torch.int64)
        self.index = shaped("index", index, (index.numel(),), torch.int64)
        self.numbers = numbers(scale, shift, x.device)
        self._check()
        xx = self.x.to(_F64).square().sum(1)
        inverse = 1 / self.temperature
        soft = inverse / self.sigma / self.sigma * (xx + 1) < 1e280
        self.lost = ~((xx < torch.inf) & (self.sigma >= 0) & (inverse > 0) & (inverse < torch.inf))
        mode = torch.where(soft, support.SOFT, support.HARD)
        self.mode = torch.where(self.lost, support.LOST, mode).to(torch.int32)
        each = torch.arange(len(index), device=x.device)
        self.query = torch.searchsorted(self.start[1:], each, right=True).clamp_(max=self.b - 1)

    def _check(self) -> None:
        """Whether the lists are lists; not while a CUDA graph is captured, which cannot wait. The
        kernels read no other memory even then."""
        if capturing(self.device):
            return
        m, n = len(self.index), len(self.rows)
        good = (self.start[0] == 0) & (self.start[-1] == m) & (self.start.diff() >= 0).all()
        good &= ((self.index >= 0) & (self.index < n)).all()
        if not bool(good):
            raise ValueError(
                f"start must go from 0 to {m} without falling, and index lie in [0, {n})"
            )

    def pairs(self, grad_mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """r^2, <g, y>, <x - alpha y, y> [M]; the last two with grad_mean only."""
        return pairs(self.x, self.rows, self.alpha, self.numbers, self.query, self.index, grad_mean)

    def _per_query(self) -> dict[str, Tensor | int]:
        return {
            "index": self.index, "bias": self.numbers if self.bias is None else self.bias,
            "start": self.start, "mode": self.mode, "sigma": self.sigma,
            "temperature": self.temperature, "B": self.b,
        }  # fmt: skip

    def weights(self, r2: Tensor) -> tuple[Tensor, Tensor]:
        """w [M], and the six numbers of each query [6, B]."""
        w = torch.empty_like(r2)
        stats = torch.empty(6, self.b, dtype=_F64, device=self.device)
        variant = support.weights_variant(self.bias is not None)
        variant.launch((self.b,), self.device, r2=r2, w=w, stats=stats, **self._per_query())
        return w, stats

    def coefficients(
        self, w: Tensor, products: tuple[Tensor, Tensor, Tensor], stats: Tensor, grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, the pairs' part of the bias's gradient [M], and four numbers of each query [4, B]."""
        r2, gy, xy = products
        q, grad_b = torch.empty_like(r2), torch.empty_like(r2)
        out = torch.empty(4, self.b, dtype=_F64, device=self.device)
        support.coefficients_variant(self.bias is not None).launch(
            (self.b,), self.device, w=w, r2=r2, gy=gy, xy=xy, stats=stats, grads=grads, q=q,
            grad_b=grad_b, out=out, **self._per_query(),
        )  # fmt: skip
        return q, grad_b, out

    def sum(self, w: Tensor) -> Tensor:
        """sum of w y over each list [B, D]; the parts of a long list are added up in order."""
        variant = support.sum_variant(self.rows.dtype)
        blocks = self.b * -(-self.d // variant.constexprs["BLOCK_D"])
        # Enough programs for every multiprocessor, of four steps at least.
        steps = len(w) // (4 * variant.constexprs["BLOCK_M"] * self.b) + 1
        parts = max(1, min(4 * multiprocessors(self.device) // blocks, steps))
        out = torch.empty(parts, self.b, self.d, dtype=_F64, device=self.device)
        variant.launch(
            (blocks * parts,), self.device, w=w, index=self.index, rows=self.rows,
            numbers=self.numbers, start=self.start, out=out, B=self.b, D=self.d,
            stride_n=stride_of(self.rows), parts=parts,
        )  # fmt: skip
        return out.sum(0)


def posterior_on_support(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums of ``posterior`` over the rows listed, each logit by direct differences."""
    args = (x, rows, sigma, alpha, temperature, bias, start, index, scale, shift)
    if refusal(x, rows) is not None:
        return reference.posterior_on_support(*args)
    if len(x) == 0:
        empty = [sigma.new_empty(0) for _ in range(4)]
        return x.new_empty(x.shape), empty[0], empty[1], empty[2], empty[3]
    lists = _Lists(*args)
    w, stats = lists.weights(lists.pairs(None)[0])
    # -inf is log_z of a list without weight, and of a limit that no row hits; E is known there.
    nothing = lists.lost | torch.isnan(stats[1])
    mean = torch.where(nothing[:, None], torch.nan, lists.sum(w)).to(x.dtype)
    log_z, *rest = (torch.where(lists.lost, torch.nan, v) for v in stats[:4].unbind(0))
    return mean, log_z, rest[0], rest[1], rest[2]


def posterior_on_support_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, mean: Tensor, log_z: Tensor,
    mean_logit: Tensor, mean_bias: Tensor, weight_sq: Tensor, grad_mean: Tensor,
    grad_log_z: Tensor, grad_mean_logit: Tensor, grad_mean_bias: Tensor, grad_weight_sq: Tensor,
    scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for x, sigma, alpha, temperature and bias; the weights are taken anew."""
    args = (x, rows, sigma, alpha, temperature, bias, start, index)
    grads = (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)
    if refusal(x, rows) is not None:
        return reference.posterior_on_support_backward(
            *args, mean, log_z, mean_logit, mean_bias, weight_sq, grad_mean, *grads, scale, shift
        )
    grad_bias = sigma.new_zeros(0 if bias is None else len(rows))
    if len(x) == 0:
        empty = [sigma.new_empty(0) for _ in range(3)]
        return x.new_empty(x.shape), empty[0], empty[1], empty[2], grad_bias
    lists = _Lists(*args, scale, shift)
    products = lists.pairs(grad_mean.detach().to(_F64).contiguous())
    w, stats = lists.weights(products[0])
    q, grad_b, out = lists.coefficients(
        w, products, stats, torch.stack([v.detach().to(_F64) for v in grads])
    )
    pull = lists.alpha[:, None] * lists.sum(q) - lists.x.to(_F64) * out[3][:, None]
    hard = lists.mode == support.HARD
    width = torch.where(hard, 1.0, lists.sigma)[:, None]
    grad_x = torch.where(hard[:, None], 0.0, pull / width / width)
    if bias is not None:  # sorted, so that the sums have an order
        grad_b = torch.where(lists.lost[lists.query], torch.nan, grad_b)
        grad_bias = grad_bias.index_put((lists.index,), grad_b, accumulate=True)
    grad_x = torch.where(lists.lost[:, None], torch.nan, grad_x).to(x.dtype)
    sums = [torch.where(lists.lost, torch.nan, v) for v in out[:3].unbind(0)]
    return grad_x, sums[0], sums[1], sums[2], grad_bias
