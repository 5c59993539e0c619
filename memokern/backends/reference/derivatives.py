"""Derivatives of the reference's formulas, taken by PyTorch itself, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from memokern.calls import BasicSums, Gradients, Query, Sums
from memokern.util.torch_internals import recording

_F64 = torch.float64
BIAS = 4  # the place of the gradient for the bias, which is one for all queries

# Which queries, and their sums as a function of these queries, x in float64.
SumsOf = Callable[[Query], Sums]
Block = tuple[slice, SumsOf]


def vjp(
    values: Sequence[Tensor], inputs: list[Tensor], grads: Sequence[Tensor], again: bool = False
) -> list[Tensor]:
    """sum <grads, d values / d inputs>; an output or an input that plays no part gives zeros."""
    live = [(v, g) for v, g in zip(values, grads, strict=True) if v.requires_grad]
    got = torch.autograd.grad(
        [v for v, _ in live], inputs, [g for _, g in live], create_graph=again, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(got, inputs, strict=True)]


def backward(query: Query, grads: BasicSums, blocks: Iterable[Block]) -> Gradients:
    """Gradients for the query, of the sums that the blocks give, but for the residual."""
    out = _zeros(query)
    for at, sums in blocks:
        with recording():
            part = query.take(at)
            leaves = _leaves(part)
            values = sums(_query(leaves, part))[:5]
            parts = vjp(values, leaves, [g[at].detach().to(_F64) for g in grads[:5]])
        _put(out, at, parts, query)
    return out._replace(x=out.x.to(query.x.dtype))


def double_backward(
    query: Query, grads: BasicSums, grad_grads: Gradients, blocks: Iterable[Block]
) -> tuple[Gradients, BasicSums]:
    """Gradients of <grad_grads, backward(...)> for the query and for grads."""
    out = _zeros(query)
    tails = BasicSums(*(torch.zeros_like(g, dtype=_F64) for g in grads[:5]))
    for at, sums in blocks:
        with recording():
            part = query.take(at)
            leaves = _leaves(part)
            seeds = [g[at].detach().to(_F64).clone().requires_grad_() for g in grads[:5]]
            first = vjp(sums(_query(leaves, part))[:5], leaves, seeds, again=True)
            wanted = [g if i == BIAS else g[at] for i, g in _given(grad_grads, query)]
            inner = sum(
                ((g * gg).sum() for g, gg in zip(first, wanted, strict=True)),
                start=query.x.new_zeros((), dtype=_F64),
            )
            parts = vjp((inner,), [*leaves, *seeds], [torch.ones_like(inner)])
        _put(out, at, parts[: len(leaves)], query)
        for total, tail in zip(tails, parts[len(leaves) :], strict=True):
            total[at] = tail
    heads = out._replace(x=out.x.to(query.x.dtype))
    return heads, tails._replace(mean=tails.mean.to(grads.mean.dtype))


def _zeros(query: Query) -> Gradients:
    """Zeros for every gradient, that of x in float64."""
    return Gradients(
        *(
            query.sigma.new_zeros(0) if v is None else torch.zeros_like(v, dtype=_F64)
            for v in query.tensors
        )
    )


def _given(values: Gradients, query: Query) -> list[tuple[int, Tensor]]:
    """The gradients for what the query has, with their places."""
    every = zip(values, query.tensors, strict=True)
    return [(i, g) for i, (g, v) in enumerate(every) if v is not None]


def _put(out: Gradients, at: slice, parts: list[Tensor], query: Query) -> None:
    """The gradients of some queries into `out`; those for the bias are added up."""
    for (i, total), part in zip(_given(out, query), parts, strict=True):
        if i == BIAS:
            total.add_(part)
        else:
            total[at] = part


def _leaves(part: Query) -> list[Tensor]:
    """What some queries can be differentiated in, and the bias, which is everyone's."""
    tensors = [part.x.to(_F64), *part.tensors[1:]]
    return [v.detach().clone().requires_grad_() for v in tensors if v is not None]


def _query(leaves: list[Tensor], like: Query) -> Query:
    """The query `like` with these leaves."""
    rest = iter(leaves)
    x, sigma, alpha, temperature, bias, c, h = (
        None if v is None else next(rest) for v in like.tensors
    )
    assert x is not None and sigma is not None and alpha is not None and temperature is not None
    condition = like.condition
    if condition is not None and c is not None and h is not None:
        condition = condition._replace(c=c, h=h)
    return like._replace(
        x=x, sigma=sigma, alpha=alpha, temperature=temperature, bias=bias, condition=condition
    )
