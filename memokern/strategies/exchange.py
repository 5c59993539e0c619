"""What ranks exchange for one sweep, so that gradients flow through it.

Two linear maps, each the other's adjoint, so that derivatives of every order are made of them:

:class:`Collect`: what each rank gave of its queries -> the same of all queries, on every rank.
:class:`SpreadSum`: what each rank found for all queries -> the sum, of each rank's own queries.

With replicated queries all queries are each rank's own: Collect changes nothing, and its derivative
sums over the ranks what each one's rows add to the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern.util.ranks import Ranks


class Layout(NamedTuple):
    """Whose queries are whose. counts: how many of all queries each rank gave; None where they are
    replicated."""

    ranks: Ranks
    operation: str
    counts: tuple[int, ...] | None = None

    @property
    def own(self) -> slice:
        """This rank's among all queries."""
        if self.counts is None:
            return slice(None)
        first = sum(self.counts[: self.ranks.rank])
        return slice(first, first + self.counts[self.ranks.rank])

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Values [b, \\*] of each rank's queries as those of all [B, \\*], in one collective."""
        if self.counts is None:
            return [v.view_as(v) for v in tensors]
        counts = self.counts
        flat = [v.detach()[:, None].flatten(1).contiguous() for v in tensors]
        packed = torch.cat([v.view(torch.uint8) for v in flat], 1)
        pad = packed.new_zeros(max(counts) - len(packed), packed.shape[1])
        every = self.ranks.gather(torch.cat([packed, pad]), self.operation)
        rows = torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])
        widths = [v.shape[1] * v.element_size() for v in flat]
        parts = zip(rows.split(widths, 1), tensors, strict=True)
        return [
            part.contiguous().view(v.dtype).reshape((len(rows), *v.shape[1:])) for part, v in parts
        ]


class Collect(torch.autograd.Function):
    """:class:`SpreadSum`'s adjoint."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *tensors: Tensor) -> Any:
        ctx.layout = layout
        return tuple(layout.gathered(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        summed = iter(
            SpreadSum.apply(
                ctx.layout, None, *[g for g, need in zip(grads, needed, strict=True) if need]
            )
        )
        return (None, *(next(summed) if need else None for need in needed))


class SpreadSum(torch.autograd.Function):
    """:class:`Collect`'s adjoint. Totals that are known already, of all queries, are not summed
    anew."""

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, totals: Sequence[Tensor] | None, *partials: Tensor
    ) -> Any:
        ctx.layout = layout
        if totals is None:
            kinds = [f"{v.dtype} {list(v.shape)}" for v in partials]
            name = f"gradient of {layout.operation}"
            layout.ranks.agree(name, {"gradients": kinds})
            totals = layout.ranks.sum(partials, name)
        return tuple(v[layout.own] for v in totals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, *Collect.apply(ctx.layout, *grads))


def joined(
    layout: Layout, totals: Sequence[Tensor], partials: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The totals of each rank's own queries, through which gradients reach the partial sums."""
    if not any(v.requires_grad for v in partials):
        return tuple(v[layout.own] for v in totals)
    out: tuple[Tensor, ...] = SpreadSum.apply(layout, totals, *partials)
    return out
