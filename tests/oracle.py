"""The truth of every test of an operation: its definition in float64, by direct differences.

Nothing here comes from a backend. A query at a time, the rows that it can reach are selected,
distances are sums of squared differences, and everything is made of PyTorch operations, so that
autograd gives the derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import Gradients, Query, RowLists, Rows, State, Sums

F64 = torch.float64


def values(rows: Rows) -> Tensor:
    """y_n [N, D] in float64: the numbers that a training set shows, rounded to float32."""
    kind = rows.data.dtype if rows.data.dtype == F64 else torch.float32
    value = rows.data.to(kind)
    value = value * torch.tensor(rows.scale, dtype=kind) + torch.tensor(rows.shift, dtype=kind)
    return value.to(F64)


def squares(x: Tensor, y: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
    """|x_b - alpha_b y_n|^2 [B, N]."""
    alpha = torch.as_tensor(alpha, dtype=F64).expand(len(x))
    pairs = [(q - a * y).square().sum(1) for q, a in zip(x.to(F64), alpha, strict=True)]
    return torch.stack(pairs) if pairs else y.new_zeros(0, len(y))


def logits(query: Query, rows: Rows) -> Tensor:
    """t = l / T [B, N] of the gaussian weighting with sigma > 0, -inf where the bias is."""
    r2 = squares(query.x, values(rows), query.alpha)
    bias = 0.0 if query.bias is None else query.bias
    return (-r2 / (2 * query.sigma[:, None] ** 2) + bias) / query.temperature[:, None]


class _Weighed(NamedTuple):
    """What one query makes of the rows that have weight.

    Values y [M, D], biases and exponents v = (l - base) / T [M] of these rows, and which of all
    rows they are. base: the logit of the nearest row without its bias, beside which a bias and the
    differences of logits would be lost to rounding. At a limit (sigma = 0, or so small that the
    nearest row's logit overflows; an exact hit of "log") v is bias / T alone, and base is 0 or
    infinite. key: of the state.
    """

    y: Tensor
    bias: Tensor
    v: Tensor
    where: Tensor
    key: float
    base: Tensor


class _Reachable(NamedTuple):
    """Values, biases and numbers of the rows whose bias is not -inf."""

    y: Tensor
    bias: Tensor
    where: Tensor


def _reachable(y: Tensor, bias: Tensor | None) -> _Reachable:
    if bias is None:
        return _Reachable(y, torch.zeros(len(y), dtype=F64), torch.arange(len(y)))
    where = (~torch.isneginf(bias)).nonzero()[:, 0]
    return _Reachable(y[where], bias[where], where)


def _weigh(query: Query, rows: _Reachable) -> _Weighed:
    """Of one query, x [1, D]."""
    y, b, where = rows
    r2 = (query.x[0].to(F64) - query.alpha[0] * y).square().sum(1)
    zero = torch.zeros((), dtype=F64)
    if not len(y):
        return _Weighed(y, b, b, where, math.inf, zero)
    sigma, temperature, least = query.sigma[0], query.temperature[0], r2.detach().amin()
    if query.weighting == "gaussian":
        width = sigma.item()
        limit = width == 0 or math.isinf(least / width / width / temperature.item())
        key, end = float(least), -math.inf if least > 0 else 0.0
    else:
        limit, key, end = bool(least == 0), 0.0, math.inf
    if limit:
        at = r2.detach() == least
        return _Weighed(y[at], b[at], b[at] / temperature, where[at], key, zero + end)
    if query.weighting == "gaussian":
        logit = -(r2 - least) / sigma / sigma / 2 + b
        return _Weighed(y, b, logit / temperature, where, 0.0, -least / sigma / sigma / 2)
    dim = y.shape[1]
    logit = -dim / 2 * torch.log(r2 / least) + b
    return _Weighed(y, b, logit / temperature, where, 1.0, -dim / 2 * torch.log(least / dim))


def bias(query: Query, rows: Rows) -> Tensor | None:
    """All that one query, x [1, D], adds to the logits [N], or None."""
    total = query.bias
    if query.condition is not None:
        c, h, a = (v[0] for v in query.condition)
        over = (c - rows.conditions).square().sum(1) - (c - a).square().sum()
        part = torch.where(over > 0, -math.inf, 0.0) if h == 0 else -over / h / h / 2
        total = part if total is None else total + part
    if query.leave_out is not None and query.leave_out[0] >= 0:
        total = torch.zeros(rows.n, dtype=F64) if total is None else total
        out = torch.arange(rows.n) == query.leave_out[0]
        total = torch.where(out, -math.inf, total)
    return total


def _each(query: Query, rows: Rows, lists: RowLists | None) -> Iterator[tuple[Query, _Weighed]]:
    y = values(rows)
    reachable = _reachable(y, query.bias)
    for i in range(len(query.x)):
        one = query.take(slice(i, i + 1))
        if lists is None:
            yield one, _weigh(one, _reachable(y, bias(one, rows)) if query.own_bias else reachable)
            continue
        some = lists.index[lists.start[i] : lists.start[i + 1]]
        listed = _reachable(y[some], None if query.bias is None else query.bias[some])
        yield one, _weigh(one, listed._replace(where=some[listed.where]))


def _sums_of_one(query: Query, found: _Weighed) -> tuple[Tensor, ...]:
    temperature = query.temperature[0]
    nan = torch.full((query.x.shape[1],), math.nan, dtype=F64)
    if not torch.isfinite(query.x).all():
        return nan, nan[0], nan[0], nan[0], nan[0], nan
    if not len(found.v):
        return nan, torch.full((), -math.inf, dtype=F64), nan[0], nan[0], nan[0], nan
    w = torch.softmax(found.v, 0)
    # A weight of 0 leaves its logit out, which may be -inf.
    mean_v = torch.where(w > 0, w * torch.where(w > 0, found.v, 0.0), 0.0).sum()
    return (
        w @ found.y,
        temperature * torch.logsumexp(found.v, 0) + found.base,
        temperature * mean_v + found.base,
        (w * found.bias).sum(),
        w.square().sum(),
        w @ (query.alpha[0] * found.y - query.x[0].to(F64)),
    )


def sums(query: Query, rows: Rows, lists: RowLists | None = None) -> Sums:
    """Over all rows, or over those listed; differentiable in the query and in the rows."""
    parts = [_sums_of_one(*pair) for pair in _each(query, rows, lists)]
    if not parts:
        empty = torch.zeros(0, dtype=F64)
        none = torch.zeros(query.x.shape, dtype=F64)
        return Sums._make([none, *[empty] * 4, none])
    return Sums(*(torch.stack(column) for column in zip(*parts, strict=True)))


def weights(query: Query, rows: Rows) -> Tensor:
    """softmax(l / T) [B, N] of finite queries."""
    out = torch.zeros(len(query.x), rows.n, dtype=F64)
    for i, (_, found) in enumerate(_each(query, rows, None)):
        out[i, found.where] = torch.softmax(found.v, 0)
    return out


def state(query: Query, rows: Rows, center: Tensor) -> State:
    """The settled state by its definition, its accumulator about this center."""
    parts = []
    for one, found in _each(query, rows, None):
        if not torch.isfinite(one.x).all():
            lost = [math.nan] * (4 + 2 * rows.dim)
            parts.append(torch.tensor([0.0, 0.0, *lost], dtype=F64))
        elif not len(found.v):
            none = [0.0] * (4 + 2 * rows.dim)
            parts.append(torch.tensor([math.inf, -math.inf, *none], dtype=F64))
        else:
            top = found.v.amax()
            m = top + (found.base / one.temperature[0] if torch.isfinite(found.base) else 0.0)
            e = torch.exp(found.v - top)
            below = torch.where(e > 0, found.v - top, 0.0)
            each = [e.sum(), (e * below).sum(), (e * found.bias).sum(), e.square().sum()]
            key = torch.tensor([found.key], dtype=F64)
            pull = e @ (one.alpha[0] * found.y - one.x[0].to(F64))
            parts.append(torch.cat([key, torch.stack([m, *each]), e @ (found.y - center), pull]))
    table = torch.stack(parts) if parts else torch.zeros(0, 6 + 2 * rows.dim, dtype=F64)
    acc, residual = table[:, 6 : 6 + rows.dim], table[:, 6 + rows.dim :]
    return State(*table[:, :6].unbind(1), acc, residual, center)


def reach(query: Query, rows: Rows, lists: RowLists | None = None) -> Tensor:
    """The distances that matter to each query [B]: the root of sum w |x - alpha y|^2."""
    out = []
    for one, found in _each(query, rows, lists):
        w = torch.softmax(found.v, 0)
        r2 = (one.x[0].to(F64) - one.alpha[0] * found.y).square().sum(1)
        out.append((w * r2).sum().sqrt())
    return torch.stack(out) if out else torch.zeros(0, dtype=F64)


def settled(state: State, query: Query) -> State:
    """The same state, with key 0 wherever sigma > 0.

    A sweep treats a sigma so small that r^2 / sigma^2 nearly overflows as 0. Whether it does may
    differ from part to part of the data; here the squared distance that it kept as a key becomes
    what it is, a part of the logit, so that such parts can be merged.
    """
    if query.weighting != "gaussian":
        return state
    pull = -0.5 * (state.key / query.sigma) / query.sigma / query.temperature
    fits = (query.sigma > 0) & torch.isfinite(pull)
    return state._replace(
        key=torch.where(fits, 0.0, state.key), m=torch.where(fits, state.m + pull, state.m)
    )


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2, ascending, ties to the lower index."""
    distance, order = torch.sort(squares(x, values(rows)), dim=1, stable=True)
    return distance[:, :k], order[:, :k]


# --- derivatives --------------------------------------------------------------------------------


def leaves(query: Query) -> list[Tensor]:
    """x in float64, sigma, alpha, temperature, and bias, condition and bandwidth where there are
    such, to differentiate."""
    tensors = [query.x.to(F64), *(v for v in query.tensors[1:] if v is not None)]
    return [v.detach().clone().requires_grad_() for v in tensors]


def query_of(tensors: Sequence[Tensor], like: Query) -> Query:
    """The query of such leaves."""
    x, sigma, alpha, temperature, *rest = tensors
    bias = None if like.bias is None else rest.pop(0)
    condition = None if like.condition is None else like.condition._replace(c=rest[0], h=rest[1])
    return like._replace(
        x=x, sigma=sigma, alpha=alpha, temperature=temperature, bias=bias, condition=condition
    )


def _gradients(total: Tensor, inputs: Sequence[Tensor], again: bool = False) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(v) for v in inputs]
    found = torch.autograd.grad(total, inputs, create_graph=again, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=True)]


def _product(values: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """<values, grads>. An infinite value (log_z at sigma = 0) is a constant: no derivative."""
    total = torch.zeros((), dtype=F64)
    for value, grad in zip(values, grads, strict=False):  # the residual may be left out
        total = total + (torch.where(torch.isfinite(value), value, 0.0) * grad).sum()
    return total


def gradients(
    query: Query, rows: Rows, grads: Sequence[Tensor], lists: RowLists | None = None
) -> Gradients:
    """For the query, given those for the sums; [0] for what the query has not."""
    inputs = leaves(query)
    out = sums(query_of(inputs, query), rows, lists)
    found = iter(_gradients(_product(out, grads), inputs))
    none = torch.zeros(0, dtype=F64)
    return Gradients(*(none if v is None else next(found) for v in query.tensors))


def row_gradient(query: Query, rows: Rows, grads: Sequence[Tensor]) -> Tensor:
    """For the rows [N, D] as they are stored, in float64."""
    data = rows.data.detach().to(F64).requires_grad_()
    out = sums(query, rows._replace(data=data))
    return _gradients(_product(out, grads), [data])[0]


def second(
    query: Query,
    rows: Rows,
    grads: Sequence[Tensor],
    grad_grads: Sequence[Tensor],
    lists: RowLists | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of <grad_grads, gradients(...)>: for the query's tensors, and for grads."""
    inputs = leaves(query)
    seeds = [g.detach().to(F64).clone().requires_grad_() for g in grads]
    first = _gradients(_product(sums(query_of(inputs, query), rows, lists), seeds), inputs, True)
    given = [g for g, v in zip(grad_grads, query.tensors, strict=True) if v is not None]
    found = _gradients(_product(first, given), [*inputs, *seeds])
    return found[: len(inputs)], found[len(inputs) :]
