"""The sweep over a list of rows for each query, in plain float64 PyTorch.

Pairs (query, row) are held as two flat lists, in the order of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memokern.backends.reference import derivatives
from memokern.backends.reference.blocks import (
    ELEMENTS,
    F64,
    gaussian_logit,
    joined,
    nan_for_inf,
    nan_where_lost,
)
from memokern.calls import (
    BasicSums,
    Gradients,
    Query,
    RowLists,
    Rows,
    State,
    Sums,
    to_sums,
    without,
)

_NOTHING = -800.0  # e^v is 0 in float64 below it, and the row's part in any sum or derivative


def _block_sums(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums of float64 queries over their listed rows, differentiable in the query. Logits are
    relative to that of the nearest row, as in the dense sweep, which comes in last."""
    b, start, index = len(query.x), lists.start, lists.index
    each = torch.arange(b, device=query.x.device)
    q = each.repeat_interleave(start.diff())
    y = rows.values(index)
    r2 = (nan_for_inf(query.x)[q] - query.alpha[q, None] * y).square().sum(1)
    bias = None if query.bias is None else query.bias[index]

    def largest(value: Tensor) -> Tensor:
        """Of each query's list, -inf for an empty one."""
        return torch.full_like(query.sigma, -torch.inf).scatter_reduce(0, q, value, "amax")

    def total(value: Tensor) -> Tensor:
        return value.new_zeros((b, *value.shape[1:])).index_add(0, q, value)

    def exponent(r2: Tensor, bias: Tensor | None, limit: Tensor) -> Tensor:
        logit = gaussian_logit(r2, query.sigma[q], limit[q])
        return (logit if bias is None else logit + bias) / query.temperature[q]

    with torch.no_grad():
        reachable = torch.ones_like(r2, dtype=torch.bool)
        if bias is not None:
            reachable = ~torch.isneginf(bias)
        nearest = -largest(torch.where(reachable, -r2, -torch.inf))
        place = torch.arange(len(r2), device=r2.device)
        hit = torch.where(reachable & (r2 == nearest[q]), place, len(r2))
        first = torch.full_like(start[1:], len(r2)).scatter_reduce(0, q, hit, "amin")
        # sigma = 0, or so small that even the nearest row's logit overflows.
        width = torch.where(query.sigma == 0, 1.0, query.sigma)
        far = torch.isinf(nearest / width / width / query.temperature)
        limit = far | (query.sigma == 0)
        # Written so that NaN has weight: of a query that is lost the gradients are NaN as well.
        weighs = reachable & (~limit[q] | ~(r2 > nearest[q]))
    # As in the dense sweep, relative to the nearest row, whose own is 0 with derivative 0.
    known = torch.isfinite(nearest)
    least = torch.cat([r2, r2.new_zeros(1)])[torch.where(known, first, len(r2))]
    relative = torch.where(place == first[q], 0.0, r2 - least[q])
    with torch.no_grad():
        v = torch.where(weighs, exponent(relative, bias, limit), -torch.inf)
        m = largest(v)
        weighs = weighs & ~(v - m[q] <= _NOTHING)
        key = torch.where(torch.isneginf(m), torch.inf, torch.where(limit, nearest, 0.0))
    # What is not weighed is left out before it can become 0 times infinity in a derivative.
    kept = None if bias is None else torch.where(weighs, bias, 0.0)
    v = exponent(torch.where(weighs, relative, 1.0), kept, limit)
    v = v + nan_where_lost(query, nearest)[q]
    base = gaussian_logit(least, query.sigma, limit)
    below = torch.where(weighs, v - m[q], 0.0)
    power = torch.where(weighs, below.exp(), 0.0)
    s_bias = torch.zeros_like(power) if kept is None else power * kept
    sums = [total(v) for v in (power, power * below, s_bias, power.square())]
    acc = total(power[:, None] * y)
    difference = query.alpha[q, None] * y - nan_for_inf(query.x)[q]
    residual = total(torch.where(weighs[:, None], power[:, None] * difference, 0.0))
    state = State._make([key, m, *sums, acc, residual, acc.new_zeros(rows.dim)])
    found = to_sums(without(state, ~torch.isfinite(query.x).all(1)), query)
    return found._replace(log_z=found.log_z + base, mean_logit=found.mean_logit + base)


def _blocks(query: Query, rows: Rows, lists: RowLists) -> Iterator[derivatives.Block]:
    """A block of rows at a time; at least one query."""
    offsets, most = lists.start.tolist(), max(1, ELEMENTS // max(1, rows.dim))
    rows = rows.detach()

    def sums_of(part: RowLists) -> derivatives.SumsOf:
        return lambda query: _block_sums(query, rows, part)

    first = 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= most:
            last += 1
        start = lists.start[first : last + 1] - offsets[first]
        yield (
            slice(first, last),
            sums_of(RowLists(start, lists.index[offsets[first] : offsets[last]])),
        )
        first = last


def posterior(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums over the rows listed, each logit by direct differences; differentiable to any order
    in the query."""
    parts = []
    for at, sums in _blocks(query, rows, lists):
        part = query.take(at)
        parts.append(sums(part._replace(x=part.x.to(F64))))
    if not parts:
        empty = [query.sigma.new_empty(0) for _ in range(4)]
        none = query.x.new_empty(query.x.shape)
        return Sums._make([none, *empty, none.clone()])
    return joined(parts, query.x.dtype)


def backward(query: Query, rows: Rows, lists: RowLists, grads: BasicSums) -> Gradients:
    """The gradients for the query, by differentiating the formulas."""
    return derivatives.backward(query, grads, _blocks(query, rows, lists))


def double_backward(
    query: Query, rows: Rows, lists: RowLists, grads: BasicSums, grad_grads: Gradients
) -> tuple[Gradients, BasicSums]:
    """The gradients of <grad_grads, backward> for the query and for grads."""
    return derivatives.double_backward(query, grads, grad_grads, _blocks(query, rows, lists))
