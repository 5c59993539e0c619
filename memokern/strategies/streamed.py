"""Queries of rows that are read chunk by chunk: states merge, nearest rows are kept, and a gradient
takes a second pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memokern import ops
from memokern.calls import Condition, Query, RowLists, Rows, State, Sums, by_key, merge, rescaled
from memokern.data.streamed import StreamedSet
from memokern.index.index import Index, evenly_spaced_rows
from memokern.strategies.costs import Costs
from memokern.strategies.pruned_nearest import (
    Neighbours,
    merged,
    nearest_in_chunk,
    project,
    share_within,
)
from memokern.util import memory
from memokern.util.mapped import ask_rows, at_random

# Rows of a file that are listed are copied up to so many bytes; beyond, used where they are mapped.
KEPT_BYTES = 1 << 28
# Queries and rows that show how many rows a query may read, and which share of a file all queries
# together may read here and there: a disk that reads in order is several times as fast.
SAMPLE_QUERIES, SAMPLE_ROWS, MOST_READ = 64, 4096, 1 / 64
# Of a query, those that can have a gradient, as arguments of :class:`_Streamed`.
GIVEN = ("x", "sigma", "alpha", "temperature", "bias", "c", "h")


def of_chunk(query: Query, rows: Rows, data: StreamedSet, first: int) -> tuple[Query, Rows]:
    """The query of one chunk's rows, and these with what belongs to each."""
    here = slice(first, first + rows.n)
    bias = None if query.bias is None else query.bias[here]
    left_out = query.leave_out
    if left_out is not None:
        place = left_out - first
        left_out = torch.where((place >= 0) & (place < rows.n), place, -1)
    if query.condition is not None:
        assert data.conditions is not None
        rows = rows._replace(conditions=data.conditions[here])
    return query._replace(bias=bias, leave_out=left_out), rows


def state(query: Query, data: StreamedSet) -> State:
    """The state over all rows, in one pass; differentiable once, by a second one."""
    given = dict(zip(GIVEN, query.tensors, strict=True))
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given.values()):
        return State(*_Streamed.apply(query.detach(), data, *given.values()))
    return _forward(query, data)


def _forward(query: Query, data: StreamedSet) -> State:
    total: State | None = None
    with torch.no_grad():
        scale = by_key(query)
        for first, rows in data.chunks():
            found = ops.posterior_state(*of_chunk(query, rows, data, first))
            total = found if total is None else merge(total, found, scale)
    assert total is not None  # there is a row
    return total


def some_rows(data: StreamedSet) -> AbstractContextManager[None]:
    """While it is open, what is used of a file's rows is read, and nothing around it."""
    return at_random(data.as_rows().data) if data.in_file else nullcontext()


def listed(query: Query, rows: Rows, lists: RowLists, data: StreamedSet) -> Sums:
    """The sums over lists of rows. The rows are read, of a file those alone and many at a time, and
    stay in memory for this call and its gradient; of a file only while they are few."""
    some, place = lists.index.unique(return_inverse=True)
    size = rows.dim * rows.data.element_size()
    if data.in_file and len(some) * size > KEPT_BYTES:
        with some_rows(data):
            ask_rows(rows.data, some[: memory.available() // (4 * size)])
            return ops.posterior_listed(query, rows, lists)
    bias = None if query.bias is None else query.bias[some]
    few = rows._replace(data=data.stored(some), center=data.center64, sq_norms=data.sq_norms[some])
    return ops.posterior_listed(query._replace(bias=bias), few, lists._replace(index=place))


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Query, data: StreamedSet, *given: Tensor | None) -> Any:
        found = _forward(query, data)
        ctx.query, ctx.data, ctx.head = query, data, (found.key, found.m, found.center)
        ctx.mark_non_differentiable(found.key, found.m, found.center)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, data = ctx.query, ctx.data
        key, m, center = ctx.head
        scale = by_key(query)
        needed = dict(zip(GIVEN, ctx.needs_input_grad[2:], strict=True))
        total: dict[str, Tensor] = {}
        with torch.enable_grad():
            for first, rows in data.chunks():
                mine, rows = of_chunk(query, rows, data, first)
                leaves = _leaves(mine, needed)
                found = ops.posterior_state(_with(mine, leaves), rows)
                share = rescaled(found, key, m, scale, center)
                parts = torch.autograd.grad(
                    share[2:8], list(leaves.values()), grads[2:8], allow_unused=True
                )
                for (name, leaf), part in zip(leaves.items(), parts, strict=True):
                    part = torch.zeros_like(leaf) if part is None else part
                    if name == "bias":
                        total.setdefault(name, torch.zeros_like(query.bias))
                        total[name][first : first + rows.n] = part
                    else:
                        total[name] = part if name not in total else total[name] + part
        return (None, None, *(total.get(name) for name in GIVEN))


def _leaves(query: Query, needed: dict[str, bool]) -> dict[str, Tensor]:
    """Copies of what needs a gradient."""
    given = zip(GIVEN, query.tensors, strict=True)
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in given
        if value is not None and needed[name]
    }


def _with(query: Query, leaves: dict[str, Tensor]) -> Query:
    condition = query.condition
    if condition is not None:
        c, h = leaves.get("c", condition.c), leaves.get("h", condition.h)
        condition = Condition(c, h, condition.a)
    plain: dict[str, Any] = {k: v for k, v in leaves.items() if k not in ("c", "h")}
    return query._replace(**plain, condition=condition)


def nearest(
    x: Tensor,
    data: StreamedSet,
    k: int,
    index: Index | None = None,
    costs: Costs | None = None,
    unit: float = 1.0,
) -> Neighbours:
    """The k smallest squared distances [B, k] and the rows, in one pass; ties to the lower row.
    Given an index, of each chunk only the rows that it cannot exclude, as
    :func:`.pruned_nearest.nearest` has it; without one, of rows that are multiplied by a unit."""
    best: Neighbours | None = None
    with torch.no_grad():
        x_only = x.detach()
        p = None if index is None else project(x_only, index)
        for first, rows in data.chunks():
            few = min(k, rows.n)
            if index is None or p is None:
                some = rows if unit == 1 else rows.in_units(unit)
                sq, at = ops.nearest(x_only, some, few)
            else:
                known = best[0][:, -1] if best is not None and best[0].shape[1] == k else None
                sq, at = nearest_in_chunk(x_only, p, (first, rows), index, few, costs, known)
            best = merged(best, (sq, at + first), k)
    assert best is not None
    return with_gradient(x, data, *best, unit), best[1]


def reads_most(x: Tensor, data: StreamedSet, k: int, index: Index) -> bool:
    """Whether these queries, each with its own rows of a file, would read as much as a pass over
    all: what some queries and some rows show."""
    b = len(x)
    with torch.no_grad():
        asked = x.detach()[evenly_spaced_rows(b, SAMPLE_QUERIES).to(x.device)]
        some = evenly_spaced_rows(data.n, SAMPLE_ROWS).to(x.device)
        share = share_within(project(asked, index), index, data.sq_norms, some, k)
        # A share that the sample does not show may be half a row of it.
        share = share.clamp(min=0.5 / len(some))
        return b > 0 and float(share.mean()) * b > MOST_READ


def with_gradient(x: Tensor, data: StreamedSet, sq: Tensor, row: Tensor, unit: float) -> Tensor:
    """The squared distances, through which gradients reach x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return sq
    y = data.gather(row).flatten(2).to(torch.float64) * unit
    again = (x[:, None].to(torch.float64) - y).square().sum(2)
    return again + torch.where(sq == again, 0.0, sq - again).detach()  # both may be infinite
