"""The dense sweep in plain float64 PyTorch.

Memory: a block of queries times N in float64. Time: about 3 N B D operations for the direct
differences and 4 N B D for the products, none of them fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.backends.reference import derivatives
from memokern.backends.reference.blocks import (
    F64,
    center_of,
    direct_squares,
    empty_squares,
    gaussian_logit,
    joined,
    nan_for_inf,
    nan_where_lost,
    query_blocks,
    residuals,
    row_blocks,
    squared_distances,
)
from memokern.calls import (
    BasicSums,
    Gradients,
    Query,
    Rows,
    State,
    Sums,
    empty_state,
    to_sums,
    with_own_bias,
    without,
)
from memokern.util.torch_internals import recording


class _Exponents(NamedTuple):
    """The exponents v = l / T [B, N] of a block of queries: the state's `key` [B], `base` [B], the
    logit of the nearest row without its bias, `m` [B], the largest of v - base / T, and what v is
    below m + base / T where a row has weight, and where that is."""

    key: Tensor
    base: Tensor
    m: Tensor
    below: Tensor
    weighs: Tensor


# e^v is 0 in float64 below it, and the row's part in any sum or derivative.
_NOTHING = -800.0
# An exponent beyond which, in float64, biases lose what counts: 10^-7.
_FAR = 1e9


def _exponents(query: Query, rows: Rows, center: Tensor) -> _Exponents:
    """Of a query without a condition."""
    r2 = squared_distances(query.x, rows, query.alpha, center)
    with torch.no_grad():
        reachable = torch.ones_like(r2, dtype=torch.bool)
        if query.bias is not None:
            reachable = reachable & ~torch.isneginf(query.bias)
        nearest, first = torch.where(reachable, r2, torch.inf).min(1, keepdim=True)
        if query.weighting == "gaussian":
            # sigma = 0, or so small that even the nearest row's logit overflows.
            at_zero = torch.zeros_like(nearest, dtype=torch.bool)
            limit = torch.isinf(_exponent(query, nearest, None, at_zero)) | (
                query.sigma[:, None] == 0
            )
            key = torch.where(limit, nearest, 0.0)
        else:
            limit = nearest == 0
            key = (~limit).to(F64)
        # Written so that NaN has weight: of a query that is lost the gradients are NaN as well.
        weighs = reachable & (~limit | ~(r2 > nearest))
        known = torch.isfinite(nearest)
    # Relative to the nearest row, since a bias is lost beside a large distance: r^2 less its own,
    # or over it where the logit is a logarithm. Its own is 0, with derivative 0, so that what
    # cancels in the derivatives of the others is not divided by sigma^2.
    if query.weighting == "gaussian":
        least = torch.where(known, r2.gather(1, first), 0.0)
        own = torch.arange(r2.shape[1], device=r2.device) == first
        relative = torch.where(own & known, 0.0, r2 - least)
    else:
        least = torch.where(known & (nearest > 0), nearest, float(query.x.shape[1]))
        relative = r2 * (query.x.shape[1] / least)
    with torch.no_grad():
        v = torch.where(weighs, _exponent(query, relative, query.bias, limit), -torch.inf)
        m = v.amax(1, keepdim=True)
        weighs = weighs & ~(v - m <= _NOTHING)
        key = torch.where(weighs.any(1, keepdim=True), key, torch.inf)
    # What is not weighed is left out before it can become 0 times infinity in a derivative.
    bias = None if query.bias is None else torch.where(weighs, query.bias, 0.0)
    v = _exponent(query, torch.where(weighs, relative, 1.0), bias, limit)
    v = v + nan_where_lost(query, nearest[:, 0])[:, None]
    base = _pull(query, least, limit)
    below = torch.where(weighs, v - m, 0.0)
    return _Exponents(key[:, 0], base[:, 0], m[:, 0], below, weighs)


def _exponent(query: Query, r2: Tensor, bias: Tensor | None, limit: Tensor) -> Tensor:
    """l / T of squared distances [B, .]; at a limit [B, 1] the bias alone."""
    logit = _pull(query, r2, limit)
    return (logit if bias is None else logit + bias) / query.temperature[:, None]


def _pull(query: Query, r2: Tensor, limit: Tensor) -> Tensor:
    """l of squared distances [B, .], without a bias; 0 at a limit [B, 1]."""
    if query.weighting == "gaussian":
        return gaussian_logit(r2, query.sigma[:, None], limit)
    dim = query.x.shape[1]
    pull = -0.5 * dim * torch.log(torch.where(r2 == 0, 1.0, r2) / dim)
    return torch.where(limit, 0.0, pull)


def _block_state(query: Query, rows: Rows, center: Tensor) -> State:
    """The state of one block of float64 queries, differentiable in every tensor but m and key,
    which its sums do not depend on."""
    state, base = _block_relative(query, rows, center, state=True)
    with torch.no_grad():
        base = base / query.temperature
        # Beside a larger one a bias would have no digits left: m stays relative to the nearest row,
        # whose squared distance becomes the key.
        far = torch.isfinite(state.key) & (base.abs() > _FAR) & (query.weighting == "gaussian")
        nearest = -2.0 * base * query.temperature * query.sigma * query.sigma
        key = torch.where(far & (state.key == 0), nearest, state.key)
        return state._replace(key=key, m=torch.where(far, state.m, state.m + base))


def _block_sums(query: Query, rows: Rows, center: Tensor) -> Sums:
    """The sums of one block of float64 queries, differentiable in every tensor. The base, which may
    be large, does not depend on the temperature: it comes in last."""
    state, base = _block_relative(query, rows, center, state=False)
    sums = to_sums(state, query)
    return sums._replace(log_z=sums.log_z + base, mean_logit=sums.mean_logit + base)


def _block_relative(
    query: Query, rows: Rows, center: Tensor, *, state: bool
) -> tuple[State, Tensor]:
    """The state of one block of queries with m relative to a base [B]: l - base in place of l.
    state: whether the sums carry the derivatives of base / T, which a state's m cannot."""
    query = with_own_bias(query, rows)
    key, base, m, below, weighs = _exponents(query, rows, center)
    if state:
        own = (base / query.temperature)[:, None]
        below = torch.where(weighs, below + (own - own.detach()), 0.0)
    power = torch.where(weighs, below.exp(), 0.0)
    acc = query.x.new_zeros(query.x.shape)
    for where, y in row_blocks(rows):
        acc = acc + power[:, where] @ (y - center)
    s = power.sum(1)
    if query.bias is None:
        s_bias = torch.zeros_like(s)
    else:
        s_bias = (power * torch.where(torch.isneginf(query.bias), 0.0, query.bias)).sum(1)
    residual = residuals(power, query.x, rows, query.alpha, center, acc)
    each = ((power * below).sum(1), s_bias, power.square().sum(1))
    found = State(key, m, s, *each, acc, residual, center)
    # A query that is not finite knows nothing; without this, rules of 0 * NaN would decide.
    return without(found, ~torch.isfinite(query.x).all(1)), base


def _wide(query: Query, at: slice) -> Query:
    """Some of the queries, with x in float64."""
    return _finite(query.take(at))


def _finite(query: Query) -> Query:
    """x in float64, NaN where it is infinite or the condition is not finite: such a query is
    lost."""
    x = nan_for_inf(query.x.to(F64))
    if query.condition is not None:
        c, h, a = query.condition
        known = torch.isfinite(c.sum(-1) + a.sum(-1) + h) & (h >= 0)
        x = x * torch.where(known, 1.0, torch.nan)[:, None]
    return query._replace(x=x)


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, its accumulator in float64."""
    center = center_of(rows)
    parts = [
        _block_state(_wide(query, at), rows, center)
        for at in query_blocks(query.x.shape[0], rows.n)
    ]
    if not parts:
        return empty_state(0, center, F64)
    columns = list(zip(*parts, strict=True))[:-1]
    return State._make([*(torch.cat(column) for column in columns), center])


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep, normalised; differentiable to any order in every tensor."""
    center = center_of(rows)
    parts = [
        _block_sums(_wide(query, at), rows, center) for at in query_blocks(query.x.shape[0], rows.n)
    ]
    if not parts:
        return to_sums(empty_state(0, center, F64), query)
    return joined(parts, query.x.dtype)


def weights(query: Query, rows: Rows) -> Tensor:
    """softmax(l / T) [B, N] float64, dense."""
    whole = with_own_bias(_wide(query, slice(None)), rows)
    _, _, _, below, weighs = _exponents(whole, rows, center_of(rows))
    power = torch.where(weighs, below.exp(), 0.0)
    return power / power.sum(1, keepdim=True)


def _blocks(query: Query, rows: Rows) -> Iterator[derivatives.Block]:
    center, rows = center_of(rows), rows.detach()

    def sums(part: Query) -> Sums:
        return _block_sums(_finite(part), rows, center)

    for at in query_blocks(query.x.shape[0], rows.n):
        yield at, sums


def posterior_backward(query: Query, rows: Rows, grads: BasicSums) -> Gradients:
    """The gradients for the query, by differentiating the formulas."""
    return derivatives.backward(query, grads, _blocks(query, rows))


def posterior_double_backward(
    query: Query, rows: Rows, grads: BasicSums, grad_grads: Gradients
) -> tuple[Gradients, BasicSums]:
    """The gradients of <grad_grads, posterior_backward> for the query and for grads."""
    return derivatives.double_backward(query, grads, grad_grads, _blocks(query, rows))


def posterior_backward_rows(query: Query, rows: Rows, grads: BasicSums) -> Tensor:
    """The gradient for floating-point rows [N, D]."""
    center, query = center_of(rows), query.detach()
    values = rows.detach().values(slice(None))
    total = torch.zeros_like(values)
    for at in query_blocks(query.x.shape[0], rows.n):
        with recording():
            leaf = values.clone().requires_grad_()
            part = _wide(query, at)
            sums = _block_sums(part, Rows(leaf, conditions=rows.conditions), center)
            total += derivatives.vjp(sums[:5], [leaf], [g[at].to(F64) for g in grads[:5]])[0]
    return (rows.scale * total).to(rows.data.dtype)


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    b = x.shape[0]
    distance = torch.full((b, k), torch.nan, dtype=F64, device=x.device)
    index = torch.arange(k, device=x.device).repeat(b, 1)
    for at in query_blocks(b, rows.n):
        q = x[at].to(F64)
        one = torch.ones(q.shape[0], dtype=F64, device=x.device)
        r2 = empty_squares(q, rows.data, one)
        for where, y in row_blocks(rows):
            r2[:, where] = direct_squares(q, y, one)
        # A stable sort, for the ties; topk promises no order.
        # A row that is NaN is as far as can be, as the kernels have it.
        r2 = torch.where(torch.isnan(r2), torch.inf, r2)
        value, order = torch.sort(r2, dim=1, stable=True)
        known = ~torch.isnan(q).any(1, keepdim=True)
        distance[at] = torch.where(known, value[:, :k], math.nan)
        index[at] = torch.where(known, order[:, :k], index[at])
    return distance, index
