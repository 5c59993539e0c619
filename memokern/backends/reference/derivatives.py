"""Derivatives of the reference's formulas, taken by PyTorch itself, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from memokern.calls import BasicSums, Gradients, Query, Sums
from memokern.util.torch_internals import recording

_F64 = torch.float64

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
            leaves = _leaves(at, query)
            values = sums(_query(leaves, query))[:5]
            parts = vjp(values, leaves, [g[at].detach().to(_F64) for g in grads[:5]])
        _put(out, at, parts)
    return out._replace(x=out.x.to(query.x.dtype))


def double_backward(
    query: Query, grads: BasicSums, grad_grads: Gradients, blocks: Iterable[Block]
) -> tuple[Gradients, BasicSums]:
    """Gradients of <grad_grads, backward(...)> for the query and for grads."""
    out = _zeros(query)
    tails = BasicSums(*(torch.zeros_like(g, dtype=_F64) for g in grads[:5]))
    for at, sums in blocks:
        with recording():
            leaves = _leaves(at, query)
            seeds = [g[at].detach().to(_F64).clone().requires_grad_() for g in grads[:5]]
            first = vjp(sums(_query(leaves, query))[:5], leaves, seeds, again=True)
            # The gradient for the bias is one for all queries.
            wanted = [*(g[at] for g in grad_grads[:4]), grad_grads.bias]
            inner = sum(
                ((g * gg).sum() for g, gg in zip(first, wanted, strict=False)),
                start=query.x.new_zeros((), dtype=_F64),
            )
            parts = vjp((inner,), [*leaves, *seeds], [torch.ones_like(inner)])
        _put(out, at, parts[: len(leaves)])
        for total, part in zip(tails, parts[len(leaves) :], strict=True):
            total[at] = part
    heads = out._replace(x=out.x.to(query.x.dtype))
    return heads, tails._replace(mean=tails.mean.to(grads.mean.dtype))


def _zeros(query: Query) -> Gradients:
    """Zeros for every gradient, that of x in float64."""
    bias = query.sigma.new_zeros(0) if query.bias is None else torch.zeros_like(query.bias)
    each = [torch.zeros_like(query.sigma) for _ in range(3)]
    return Gradients._make([torch.zeros_like(query.x, dtype=_F64), *each, bias])


def _put(out: Gradients, at: slice, parts: list[Tensor]) -> None:
    """The gradients of some queries into `out`; those for the bias are added up."""
    for total, part in zip(out[:4], parts, strict=False):
        total[at] = part
    if len(parts) == 5:
        out.bias.add_(parts[4])


def _leaves(at: slice, query: Query) -> list[Tensor]:
    """What some queries can be differentiated in, and the bias, which is everyone's."""
    part = query.take(at)
    tensors = [part.x.to(_F64), part.sigma, part.alpha, part.temperature]
    if query.bias is not None:
        tensors.append(query.bias)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _query(leaves: list[Tensor], like: Query) -> Query:
    x, sigma, alpha, temperature, *bias = leaves
    return Query(
        x, sigma, alpha, temperature, bias[0] if bias else None, like.weighting, like.precision
    )
