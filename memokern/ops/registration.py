"""The library of operations, and what their registrations share: autograd and vmap.

The dispatcher hands a tensor with a forward-mode tangent, or one inside ``torch.func.grad``, to the
autograd kernel of an operation, which would silently lose the tangent: it raises instead. The
functions of :mod:`memokern.ops` notice these transforms first and answer them through the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memokern.util.torch_internals import has_tangent

LIBRARY = torch.library.Library("memokern", "DEF")
OPS = torch.ops.memokern


def define(name: str, arguments: str, returns: str, run: Callable[..., Any]) -> None:
    """An operation whose one implementation serves every device."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")


def fake(name: str, function: Callable[..., Any]) -> None:
    """What the results of an operation look like, without values."""
    torch.library.register_fake(f"memokern::{name}", function, lib=LIBRARY)


def below_autograd(name: str, args: Sequence[Any]) -> Any:
    """The operation, with nothing recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(OPS, name)(*args)


def differentiable(name: str, function: Any) -> None:
    """Derivatives by a torch.autograd.Function with the operation's arguments."""

    def call(*args: Any) -> Any:
        _no_forward_mode(name, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return function.forward(*args)  # nothing to record: that would cost more than a small call

    LIBRARY.impl(name, call, "Autograd")


def not_differentiable(name: str) -> None:
    """No derivative, and an error where one is asked for."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, args: tuple[Any, ...], *tensors: Tensor) -> Any:
            out = below_autograd(name, args)
            return tuple(out) if isinstance(out, list) else out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"{name} has no further derivative; evaluate it without create_graph"
            )

    def call(*args: Any) -> Any:
        flat: list[Tensor] = []
        for arg in args:
            several = arg if isinstance(arg, list | tuple) else [arg]
            flat.extend(v for v in several if isinstance(v, Tensor))
        _no_forward_mode(name, flat)
        out = Refused.apply(args, *flat)
        return list(out) if isinstance(out, tuple) else out

    LIBRARY.impl(name, call, "Autograd")


def _no_forward_mode(name: str, args: Sequence[Any]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and has_tangent(arg):
            raise RuntimeError(
                f"torch.ops.memokern.{name} carries no forward-mode tangent: use memokern.jvp for"
                " the Jacobian-vector product of the mean, or memokern.posterior, which answers"
                " forward mode and torch.func through the reference"
            )


def vmap(name: str, per_query: frozenset[int] = frozenset(), shared_outputs: int = 0) -> None:
    """Fold a mapped axis into the batch where only these arguments, which have a value for each
    query, are mapped; else loop. The last `shared_outputs` results are the same for all queries."""
    op = getattr(OPS, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
        mapped = [d is not None for d in in_dims]
        if size and per_query and all(i in per_query for i, m in enumerate(mapped) if m):
            folded = list(moved)
            for i in per_query:
                if moved[i] is None:
                    continue
                value = moved[i] if mapped[i] else moved[i].expand(size, *moved[i].shape)
                folded[i] = value.flatten(0, 1)
            outs = op(*folded)
            each = len(outs) - shared_outputs
            unfolded = [v.unflatten(0, (size, -1)) for v in outs[:each]]
            dims = (0,) * each + (None,) * shared_outputs
            return (*unfolded, *outs[each:]), dims
        results = [
            op(*(a[i] if m else a for a, m in zip(moved, mapped, strict=True))) for i in range(size)
        ]
        outs = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return outs, (0,) * len(outs)

    torch.library.register_vmap(f"memokern::{name}", rule, lib=LIBRARY)
