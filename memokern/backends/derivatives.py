"""Derivatives of the reference's formulas, taken by PyTorch itself, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_F64 = torch.float64

# x [B, D], sigma, alpha, temperature [B], bias [N] or None.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
# Which queries, and the five sums [b, D], [b], ... as a function of their inputs, x in float64.
Sums = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
Block = tuple[slice, Sums]


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd on, also inside an operation that the dispatcher called below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def vjp(
    values: tuple[Tensor, ...], inputs: list[Tensor], grads: list[Tensor], again: bool = False
) -> list[Tensor]:
    """sum <grads, d values / d inputs>; an output or an input that plays no part gives zeros."""
    live = [(v, g) for v, g in zip(values, grads, strict=True) if v.requires_grad]
    got = torch.autograd.grad(
        [v for v, _ in live], inputs, [g for _, g in live], create_graph=again, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(got, inputs, strict=True)]


def backward(
    inputs: Inputs, grads: list[Tensor], blocks: Iterable[Block]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the inputs, of the sums that the blocks give."""
    x, _, _, _, bias = inputs
    heads, grad_bias = _zeros(inputs)
    for at, sums in blocks:
        with recording():
            leaves = _leaves(at, inputs)
            parts = vjp(_values(sums, leaves), leaves, [g[at].detach().to(_F64) for g in grads])
        for total, part in zip(heads, parts, strict=False):
            total[at] = part
        if bias is not None:
            grad_bias += parts[4]
    return heads[0].to(x.dtype), heads[1], heads[2], heads[3], grad_bias


def double_backward(
    inputs: Inputs, grads: list[Tensor], grad_grads: list[Tensor], blocks: Iterable[Block]
) -> list[Tensor]:
    """Gradients of <grad_grads, backward(...)> for the inputs, bias last, then for grads."""
    x, _, _, _, bias = inputs
    heads, grad_bias = _zeros(inputs)
    tails = [torch.zeros_like(g, dtype=_F64) for g in grads]
    for at, sums in blocks:
        with recording():
            leaves = _leaves(at, inputs)
            cot = [g[at].detach().to(_F64).clone().requires_grad_() for g in grads]
            first = vjp(_values(sums, leaves), leaves, cot, again=True)
            wanted = [gg if i == 4 else gg[at] for i, gg in enumerate(grad_grads)]
            inner = sum(
                ((g * gg).sum() for g, gg in zip(first, wanted, strict=False)),
                start=x.new_zeros((), dtype=_F64),
            )
            parts = vjp((inner,), [*leaves, *cot], [torch.ones_like(inner)])
        for total, part in zip(heads, parts[:4], strict=True):
            total[at] = part
        if bias is not None:
            grad_bias += parts[4]
        for total, part in zip(tails, parts[len(leaves) :], strict=True):
            total[at] = part
    tails[0] = tails[0].to(grads[0].dtype)
    return [heads[0].to(x.dtype), *heads[1:], grad_bias, *tails]


def _zeros(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    x, sigma, _, _, bias = inputs
    heads = [torch.zeros_like(x, dtype=_F64)] + [torch.zeros_like(sigma) for _ in range(3)]
    return heads, sigma.new_zeros(0) if bias is None else torch.zeros_like(bias)


def _leaves(at: slice, inputs: Inputs) -> list[Tensor]:
    """The inputs of some queries, and the bias, which is everyone's."""
    x, sigma, alpha, temperature, bias = inputs
    parts = [x[at].to(_F64), sigma[at], alpha[at], temperature[at]]
    if bias is not None:
        parts.append(bias)
    return [part.detach().clone().requires_grad_() for part in parts]


def _values(sums: Sums, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    x, sigma, alpha, temperature, *bias = leaves
    return sums(x, sigma, alpha, temperature, bias[0] if bias else None)
