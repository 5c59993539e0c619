"""The truth that every kernel is tested against: plain PyTorch, float64, any device.

It is also a real backend: it runs where the compiled module is missing and on devices that have no
kernel yet, and since it is made of PyTorch operations only, every transform of PyTorch (forward
mode, ``torch.func``, any order of derivative) works through it.

Memory: a block of queries times N in float64. Time: about 3 N B D operations for the direct
differences and 4 N B D for the products, none of them fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from memokern.backends import derivatives
from memokern.backends.derivatives import recording, vjp
from memokern.backends.reference_support import (
    bound_scan,
    posterior_on_support,
    posterior_on_support_backward,
    posterior_on_support_double_backward,
)

__all__ = [
    "bound_scan",
    "nearest",
    "posterior",
    "posterior_backward",
    "posterior_backward_rows",
    "posterior_on_support",
    "posterior_on_support_backward",
    "posterior_on_support_double_backward",
]

_F64 = torch.float64
_ELEMENTS = 1 << 22  # of a temporary: 32 MiB in float64


def unavailable() -> str | None:
    """The reference always runs."""
    return None


def refuses(device_type: str) -> str | None:
    """Nothing: it runs on every device."""
    return None


def detail() -> str:
    """One line for ``memokern info``."""
    return "plain PyTorch in float64, any device; slow, every transform works"


def _row_blocks(rows: Tensor, scale: float, shift: float) -> Iterator[tuple[slice, Tensor]]:
    """The rows as float64 values, a block at a time: never a float copy of the data set."""
    step = max(1, _ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        where = slice(start, min(start + step, rows.shape[0]))
        block = rows[where].to(_F64)
        if scale != 1.0 or shift != 0.0:
            block = block * scale + shift
        yield where, block


def _mean_row(rows: Tensor, scale: float, shift: float) -> Tensor:
    with torch.no_grad():
        total = sum(block.sum(0) for _, block in _row_blocks(rows.detach(), scale, shift))
        assert isinstance(total, Tensor)
        return total / rows.shape[0]


def _direct(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """|x_b - alpha_b y_n|^2 as a sum of squared differences, blocked: [B, D], [N, D] -> [B, N]."""
    out = []
    step = max(1, _ELEMENTS // max(1, x.shape[0] * x.shape[1]))
    for start in range(0, y.shape[0], step):
        diff = x[:, None] - alpha[:, None, None] * y[None, start : start + step]
        out.append(diff.square().sum(-1))
    return torch.cat(out, 1)


def squared_distances(
    x: Tensor, rows: Tensor, alpha: Tensor, center: Tensor, scale: float, shift: float
) -> Tensor:
    """|x_b - alpha_b y_n|^2 [B, N] of float64 queries, differentiable to any order."""
    xc = x - alpha[:, None] * center
    squares, products, direct = [], [], []
    for _, y in _row_blocks(rows, scale, shift):
        yc = y - center
        squares.append(yc.square().sum(1))
        products.append(xc @ yc.T)
        with torch.no_grad():
            direct.append(_direct(x.detach(), y.detach(), alpha.detach()))
    expanded = (
        xc.square().sum(1, keepdim=True)
        + alpha[:, None].square() * torch.cat(squares)
        - 2 * alpha[:, None] * torch.cat(products, 1)
    )
    # The value comes from direct differences, which do not cancel at small sigma; the derivatives,
    # exact polynomials of any order, from the expanded square.
    return torch.cat(direct, 1) + (expanded - expanded.detach())


def _logits_and_weights(
    r2: Tensor, sigma: Tensor, temperature: Tensor, bias: Tensor | None, kernel: str, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N] squared distances -> logits, weights, and [B, 1] where the logit is infinite."""
    b = torch.zeros((), dtype=_F64, device=r2.device) if bias is None else bias
    with torch.no_grad():
        reachable = r2 if bias is None else torch.where(torch.isneginf(b), torch.inf, r2)
        best = reachable.amin(1, keepdim=True)
        hit = reachable == best
        limit = (sigma[:, None] == 0) if kernel == "gaussian" else (best == 0)
        at_limit = torch.where(hit, 0.0, -torch.inf)
    if kernel == "gaussian":
        spread = torch.where(limit, 1.0, sigma[:, None])
        # Divided twice: sigma^2 underflows long before sigma does.
        pull = -0.5 * (r2 / spread) / spread
    else:
        pull = -0.5 * dim * torch.log(torch.where(r2 == 0, 1.0, r2) / dim)
    logits = torch.where(limit, at_limit, pull) + b
    weights = torch.softmax(logits / temperature[:, None], 1)
    return logits, weights, limit & (best != 0) if kernel == "gaussian" else limit


def posterior_block(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor,
    scale: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`posterior` for one block of float64 queries, differentiable in every tensor."""
    r2 = squared_distances(x, rows, alpha, center, scale, shift)
    logits, w, limit = _logits_and_weights(r2, sigma, temperature, bias, kernel, x.shape[1])
    mean = center + sum(w[:, where] @ (y - center) for where, y in _row_blocks(rows, scale, shift))
    log_z = temperature * torch.logsumexp(logits / temperature[:, None], 1)
    mean_logit = (w * torch.where(torch.isfinite(logits), logits, 0.0)).sum(1)
    if bias is None:
        mean_bias = torch.zeros_like(log_z)
    else:
        mean_bias = (w * torch.where(torch.isneginf(bias), 0.0, bias)).sum(1)
    # At the limit the nearest row's logit is -inf (gaussian, unless hit) or +inf (log kernel).
    edge = -torch.inf if kernel == "gaussian" else torch.inf
    log_z = torch.where(limit[:, 0], edge, log_z)
    mean_logit = torch.where(limit[:, 0], edge, mean_logit)
    # A query that is not finite knows nothing; without this, rules of 0 * NaN would decide.
    lost = ~torch.isfinite(x).all(1)
    log_z, mean_logit, mean_bias, weight_sq = (
        torch.where(lost, torch.nan, v) for v in (log_z, mean_logit, mean_bias, w.square().sum(1))
    )
    mean = torch.where(lost[:, None], torch.nan, mean)
    return mean, log_z, mean_logit, mean_bias, weight_sq


def _query_blocks(b: int, n: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, n))
    for start in range(0, b, step):
        yield slice(start, min(start + step, b))


def _center(rows: Tensor, center: Tensor | None, scale: float, shift: float) -> Tensor:
    return _mean_row(rows, scale, shift) if center is None else center.to(_F64)


def posterior(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dense sweep; see :func:`memokern.ops.posterior` for the formulas."""
    c = _center(rows, center, scale, shift)
    parts = [
        posterior_block(
            x[at].to(_F64),
            rows,
            sigma[at],
            alpha[at],
            temperature[at],
            bias,
            c,
            scale,
            shift,
            kernel,
        )
        for at in _query_blocks(x.shape[0], rows.shape[0])
    ]
    if not parts:
        empty = sigma.new_empty(0)
        return x.new_empty(x.shape), empty, empty.clone(), empty.clone(), empty.clone()
    mean, *stats = (torch.cat(column) for column in zip(*parts, strict=True))
    return (mean.to(x.dtype), *stats)  # type: ignore[return-value]


def weights(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
) -> Tensor:
    """softmax(l / T) [B, N], dense."""
    c = _center(rows, center, scale, shift)
    r2 = squared_distances(x.to(_F64), rows, alpha, c, scale, shift)
    return _logits_and_weights(r2, sigma, temperature, bias, kernel, x.shape[1])[1]


def _blocks(
    x: Tensor, rows: Tensor, center: Tensor, scale: float, shift: float, kernel: str
) -> Iterator[derivatives.Block]:
    rows = rows.detach()

    def sums(x: Tensor, s: Tensor, a: Tensor, t: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        return posterior_block(x, rows, s, a, t, b, center, scale, shift, kernel)

    for at in _query_blocks(x.shape[0], rows.shape[0]):
        yield at, sums


def posterior_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
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
    kernel: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, sigma, alpha, temperature and bias, by differentiating the formulas."""
    c = _center(rows, center, scale, shift)
    grads = [grad_mean, grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq]
    inputs = (x, sigma, alpha, temperature, bias)
    return derivatives.backward(inputs, grads, _blocks(x, rows, c, scale, shift, kernel))


def posterior_double_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    grads: list[Tensor],
    grad_grads: list[Tensor],
    scale: float,
    shift: float,
    kernel: str,
    precision: str = "auto",
) -> list[Tensor]:
    """Gradients of <grad_grads, posterior_backward> for the inputs, bias last, then for grads."""
    c = _center(rows, center, scale, shift)
    inputs = (x, sigma, alpha, temperature, bias)
    blocks = _blocks(x, rows, c, scale, shift, kernel)
    return derivatives.double_backward(inputs, grads, grad_grads, blocks)


def posterior_backward_rows(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    grads: list[Tensor],
    scale: float,
    shift: float,
    kernel: str,
    precision: str = "auto",
) -> Tensor:
    """The gradient for floating-point rows [N, D]."""
    c = _center(rows, center, scale, shift)
    total = torch.zeros_like(rows, dtype=_F64)
    for at in _query_blocks(x.shape[0], rows.shape[0]):
        with recording():
            leaf = rows.detach().to(_F64).requires_grad_()
            values = posterior_block(
                x[at].detach().to(_F64), leaf, sigma[at].detach(), alpha[at].detach(),
                temperature[at].detach(), None if bias is None else bias.detach(),
                c, scale, shift, kernel,
            )  # fmt: skip
            total += vjp(values, [leaf], [g[at].to(_F64) for g in grads])[0]
    return total.to(rows.dtype)


def nearest(
    x: Tensor,
    rows: Tensor,
    k: int,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    b, n = x.shape[0], rows.shape[0]
    distance = torch.full((b, k), torch.nan, dtype=_F64, device=x.device)
    index = torch.arange(k, device=x.device).repeat(b, 1)
    for at in _query_blocks(b, n):
        q = x[at].to(_F64)
        one = torch.ones(q.shape[0], dtype=_F64, device=x.device)
        r2 = torch.cat([_direct(q, y, one) for _, y in _row_blocks(rows, scale, shift)], 1)
        # A stable sort, for the ties; topk promises no order.
        value, order = torch.sort(r2, dim=1, stable=True)
        known = ~torch.isnan(q).any(1, keepdim=True)
        distance[at] = torch.where(known, value[:, :k], math.nan)
        index[at] = torch.where(known, order[:, :k], index[at])
    return distance, index
