"""What a sweep says of each row: its weights, their sum over queries, a row drawn by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memokern import ops, sweep, validate
from memokern.calls import Query, Rows, by_key
from memokern.conditional import Label, Wanted, groups
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.strategies import parted
from memokern.strategies.dense import weights as dense_weights
from memokern.util.stack import Stack
from memokern.validate import Asked, PerQuery, checked

# 1 GiB of float64.
MAX_DENSE_WEIGHTS = 1 << 27
# Weights at once where log_z is infinite and has no gradient.
BLOCK = 1 << 22


def _checked(x: Tensor, data: TrainingSet | Tensor, *given: Any) -> Asked:
    """:func:`memokern.validate.checked`; of rows that are apart, with all their processes."""
    if not isinstance(data, PartedSet):
        return checked(x, data, *given)

    def check() -> Asked:
        parted.require_replicated(data, "what is found for each row")
        return checked(x, data, *given)

    return parted.together(data, "arguments", check)


def weights(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    weighting: str = "gaussian",
) -> Tensor:
    r"""softmax(l / T) itself [\*batch, N] float64, for small problems: it is what the other
    functions never build.

    Raises: ValueError beyond 2^27 weights (1 GiB); otherwise as :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> memokern.weights(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]), 0.5).tolist()
        [[0.5, 0.5]]
    """
    asked = _checked(validate.computable(x), data, sigma, alpha, temperature, bias, weighting)
    if isinstance(data, PartedSet):
        found = list(parted.weights(asked.query, data))
        none = [asked.sigma.new_zeros(asked.sigma.numel(), 0)]
        return torch.cat(found or none, 1).reshape(*asked.batch, data.n_here)
    b, n = math.prod(asked.batch), asked.data.rows.n
    if b * n > MAX_DENSE_WEIGHTS:
        raise ValueError(
            f"weights of {b} queries on {n} rows are more than {MAX_DENSE_WEIGHTS} numbers;"
            " posterior() gives their mean, entropy and ess in O(B D)"
        )
    return dense_weights(asked.query, asked.data.rows).reshape(*asked.batch, n)


def row_weights(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    label: Label = None,
    condition: Tensor | None = None,
    bandwidth: PerQuery | None = None,
    leave_out: int | Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    r"""The sum over all queries of each row's weight, sum_b w_bn, [N] float64: how often each row
    is copied, and the gradient of semidiscrete optimal transport. Its total is the number of
    queries.

    Args, Raises: as :func:`posterior`. At sigma = 0 the nearest row's weight is 1; ties share.
        ValueError for label, condition or leave_out of rows that are apart (streamed, sharded).

    Numerics: as :func:`posterior`. Not differentiable.

    Cost: a sweep and its gradient; O(N) memory, streamed over the queries.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0], [1.0]])
        >>> memokern.row_weights(torch.tensor([[0.0], [9.0]]), rows, 0.5)
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    x = validate.computable(x).detach()
    wanted = _wanted(data, label, condition, bandwidth, leave_out)
    asked = _checked(x, data, sigma, alpha, temperature, bias)
    if isinstance(data, PartedSet):
        return parted.row_weights(asked.query.detach(), data, BLOCK)
    if wanted is None:
        return _summed(asked.query.detach(), asked.data.rows.detach())
    total = torch.zeros(asked.data.rows.n, dtype=torch.float64, device=x.device)
    for _, chosen, query, rows in _groups(x, data, asked, wanted, bias):
        total[chosen] += _summed(query, rows)
    return total


def _summed(query: Query, rows: Rows) -> Tensor:
    """The sums of the weights [N]."""
    total = torch.zeros(rows.n, dtype=torch.float64, device=query.x.device)
    zero = query.sigma == 0
    for at in zero.nonzero()[:, 0].split(max(1, BLOCK // rows.n)):
        total += dense_weights(query.take(at), rows).sum(0)
    rest = query.take((~zero).nonzero()[:, 0])
    if len(rest.x):
        with torch.enable_grad():
            b = torch.zeros_like(total) if rest.bias is None else rest.bias.clone()
            sums = ops.posterior(rest._replace(bias=b.requires_grad_()), rows)
            total += torch.autograd.grad(sums.log_z.sum(), b)[0]  # d log_z / d b_n is w_n
    return total


def _wanted(data: TrainingSet | Tensor, *given: Any) -> Wanted | None:
    """Which rows queries ask for: label, condition, bandwidth, leave_out."""
    if all(v is None for v in given):
        return None
    if isinstance(data, PartedSet):
        raise ValueError(
            "label, condition and leave_out are not taken for what is found for each row where the"
            " rows are apart (streamed or sharded): ask those rows alone (where, subset), or in"
            " memory"
        )
    return Wanted(*given)


def _groups(
    x: Tensor, data: TrainingSet | Tensor, asked: Asked, wanted: Wanted, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | slice, Query, Rows]]:
    """Queries that share a sweep: which, of which rows, and what is asked of them."""
    if not isinstance(data, TrainingSet):
        data = TrainingSet(data.detach(), check=False)
    together = sweep.why_in_groups(asked, data, None) is None
    flat = x.reshape(-1, *data.shape)
    s, a, t = (v.detach().reshape(-1) for v in (asked.sigma, asked.alpha, asked.temperature))
    bias = None if bias is None else bias.detach()
    for group in groups(data, asked.batch, wanted, together):
        at = group.at
        part = checked(flat[at], group.data, s[at], a[at], t[at], group.total_bias(bias))
        condition, leave_out = group.own[:2]
        rows = part.data.rows.detach()
        if condition is not None:
            rows = rows._replace(conditions=group.data.conditions)
        query = part.query._replace(condition=condition, leave_out=leave_out).detach()
        yield at, group.chosen, query, rows


def draw(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    label: Label = None,
    condition: Tensor | None = None,
    bandwidth: PerQuery | None = None,
    leave_out: int | Tensor | None = None,
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The number of one row for each query, drawn by the posterior weights, [\*batch] int64: a
    sample of the clean data given x.

    Two uniform numbers per query choose, the first one a stretch of about sqrt(N) rows, the second
    one a row in it, both by their cumulative weights. The numbers come from the CPU, so that a seed
    gives the same rows on every device, backend and number of threads, but for a number that lies
    within rounding of where two stretches meet (of 25,000 queries none differed between the
    compiled kernels, on one thread or two, and the reference). The largest of l_n / T plus a Gumbel
    number for each row would have the same law, and differ as rarely, where two sums are as near
    each other as logits are rounded; it takes N random numbers for each query in place of two.

    Args, Raises: as :func:`posterior`. generator: of the CPU; None is PyTorch's own. As temperature
        falls to 0 the row is the one with the largest logit; at sigma = 0 the nearest, or one of
        those that tie, by their bias.

    Numerics: weights of stretches as :func:`posterior`, those within in float64.

    Cost: one sweep, in sqrt(N) parts; O(B sqrt(N)) memory.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0], [1.0], [5.0]])
        >>> memokern.draw(torch.full((4, 1), 4.9), rows, 0.1).tolist()
        [2, 2, 2, 2]
    """
    x = validate.computable(x).detach()
    wanted = _wanted(data, label, condition, bandwidth, leave_out)
    asked = _checked(x, data, sigma, alpha, temperature, bias)
    query, rows = asked.query.detach(), asked.data.rows.detach()
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"expected a generator of the CPU, got one of {generator.device}")
    u = torch.rand(len(query.x), 2, dtype=torch.float64, generator=generator, device="cpu")
    u = 1 - u.to(query.x.device)  # above 0, so that no row without weight is drawn
    if isinstance(data, PartedSet):
        return parted.draw(query, data, u, max(16, math.isqrt(data.n))).reshape(asked.batch)
    if wanted is None:
        return _drawn(query, rows, u).reshape(asked.batch)
    found = torch.empty(len(u), dtype=torch.int64, device=u.device)
    for at, chosen, part, some in _groups(x, data, asked, wanted, bias):
        every = torch.arange(rows.n, device=u.device)[chosen]
        found[at] = every[_drawn(part, some, u[at])]
    return found.reshape(asked.batch)


def _drawn(query: Query, rows: Rows, u: Tensor) -> Tensor:
    """A row [B] for each query, by its two numbers u [B, 2]."""
    size = max(16, math.isqrt(rows.n))
    found_of = Stack(query.sigma.new_empty(2, len(query.x)), -(-rows.n // size))
    for start in range(0, rows.n, size):
        found_of.add(parted.key_and_mass(*_stretch(query, rows, slice(start, start + size))))
    keys, masses = found_of.stacked().permute(1, 2, 0)
    stretch = _chosen(keys, masses, u[:, 0], by_key(query))
    found = torch.full_like(stretch, -1)
    for k in stretch.unique().tolist():
        at = (stretch == k).nonzero()[:, 0]
        part, some = _stretch(query.take(at), rows, slice(k * size, (k + 1) * size))
        within = dense_weights(part, some).cumsum(1)
        place = (within < (u[at, 1] * within[:, -1])[:, None]).sum(1).clamp(max=some.n - 1)
        found[at] = k * size + place
    return found


def _stretch(query: Query, rows: Rows, at: slice) -> tuple[Query, Rows]:
    """A stretch of the rows, and the query of them."""
    if query.leave_out is not None:
        out = query.leave_out - at.start
        query = query._replace(
            leave_out=torch.where((out >= 0) & (out < at.stop - at.start), out, -1)
        )
    conditions = None if rows.conditions is None else rows.conditions[at]
    rows = rows._replace(conditions=conditions)
    norms = None if rows.sq_norms is None else rows.sq_norms[at]
    bias = None if query.bias is None else query.bias[at]
    return query._replace(bias=bias), rows._replace(data=rows.data[at], sq_norms=norms)


def _chosen(key: Tensor, mass: Tensor, u: Tensor, by_key: Tensor) -> Tensor:
    """The stretch [B] whose share of the weight holds u, of keys and log masses [B, K]: as
    :func:`memokern.merge` weighs them."""
    gap = key - key.amin(1, keepdim=True)
    pull = torch.where(gap == 0, 0.0, gap * by_key[:, None])
    share = torch.softmax(torch.where(torch.isinf(key), -torch.inf, mass - pull), 1).cumsum(1)
    return (share < (u * share[:, -1])[:, None]).sum(1).clamp(max=key.shape[1] - 1)
