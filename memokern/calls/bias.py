"""The bias that a query has of its own, in plain PyTorch: what a condition adds to each logit, and
a row left out."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.calls.arguments import Condition, Query, Rows

# Of a temporary: 32 MiB in float64.
_ELEMENTS = 1 << 22


def condition_squares(c: Tensor, conditions: Tensor) -> Tensor:
    """|c_b - c_n|^2 [B, N] by direct differences, a block of rows at a time."""
    step = max(1, _ELEMENTS // max(1, c.numel()))
    return torch.cat([(c[:, None] - part).square().sum(-1) for part in conditions.split(step)], 1)


def condition_bias(conditions: Tensor, condition: Condition) -> Tensor:
    """What a condition adds to each logit [B, N], as :class:`.Condition` says, of conditions
    [N, K]. Differentiable in c and h to any order; memory O(B N)."""
    c, h, a = condition
    with torch.no_grad():
        over = condition_squares(c, conditions) - (c - a).square().sum(-1, keepdim=True)
        over = torch.where(over > 0, over, 0 * over)  # NaN stays
    # Less a constant it is linear in c: so are its derivatives made.
    zero, moved = h[:, None] == 0, c - c.detach()
    if moved.requires_grad:
        origin = conditions[:1]  # of what a large offset would lose
        along = moved @ (conditions - origin).T - (moved * (a - origin)).sum(-1, keepdim=True)
        over = over - torch.where(torch.isinf(1 / h[:, None] / h[:, None]), 0.0, 2 * along)
    width = torch.where(zero, 1.0, h[:, None])
    # What is infinite has no weight and no derivative.
    far = torch.isinf((over / width / width).detach()) | (zero & (over.detach() > 0))
    value = -0.5 * (torch.where(far, 0.0, over) / width) / width
    return torch.where(far, -torch.inf, value)


def with_own_bias(query: Query, rows: Rows) -> Query:
    """The same query, with all that it adds to the logits as a bias: [B, N] where that differs from
    query to query."""
    bias = query.bias
    if query.condition is not None:
        assert rows.conditions is not None
        part = condition_bias(rows.conditions, query.condition)
        bias = part if bias is None else bias + part
    if query.leave_out is not None:
        out = query.leave_out[:, None] == torch.arange(rows.n, device=query.x.device)
        bias = query.sigma.new_zeros(()) if bias is None else bias
        bias = torch.where(out, -torch.inf, bias)
    return query._replace(bias=bias, condition=None, leave_out=None)
