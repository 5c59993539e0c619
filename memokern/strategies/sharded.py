"""Queries of rows that lie on several ranks: each sweeps its own, and two collectives join what
they found.

For each block of queries, after its sweep,

1. every rank tells the others its key, m and four sums per query: an all-gather, 48 B + 8 bytes;
2. the accumulators, relative to the joint key and m, are summed: an all-reduce of 2 B D numbers.

While a block is exchanged, the next one is swept. Before the first exchange the ranks compare what
they were asked, in a message that travels while they sweep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memokern.calls import Query, State, by_key, joint_key, rescaled
from memokern.data.sharded import ShardedSet
from memokern.ops.flat import tensors
from memokern.strategies.exchange import Collect, Layout, joined
from memokern.strategies.local import Dense, no_state
from memokern.util.ranks import Asked, checksum
from memokern.util.torch_internals import traced, under_transform
from memokern.util.version import VERSION

# Queries that are swept, and exchanged, together.
BLOCK = 256
UNTRANSFORMED = (
    "rows on several ranks have no torch.func transform, forward mode or compiled graph: use"
    " backward() or torch.autograd.grad, uncompiled"
)
SUMS = slice(2, 6)  # s, s_v, s_bias, s_sq of a State


def ask(operation: str, query: Query, data: ShardedSet, **more: Any) -> tuple[Asked, Layout]:
    """Tells the other ranks of the call. With split queries also waits for how many each has."""
    if under_transform(*tensors(query, data.as_rows())) or traced(query.x):
        error = RuntimeError(UNTRANSFORMED)
        data.ranks.refuse(operation, error)
        raise error
    split = data.queries == "split"
    given = [v is not None and v.requires_grad for v in query.tensors]
    facts: dict[str, Any] = {
        "version": f"{VERSION}, torch {torch.__version__}",
        "weighting": query.weighting,
        "gradients": [*given] if torch.is_grad_enabled() else None,
        "x": str(query.x.dtype) if split else checksum(query.x),
        "bias": query.bias is not None,
        "own": [query.condition is not None, query.leave_out is not None],
        **more,
    }
    if not split:
        facts |= {k: checksum(getattr(query, k)) for k in ("sigma", "alpha", "temperature")}
        if query.condition is not None:
            facts |= {
                "condition": checksum(query.condition.c),
                "bandwidth": checksum(query.condition.h),
            }
    asked = data.ranks.ask(operation, {**facts, "_b": len(query.x)})
    if not split:
        return asked, Layout(data.ranks, operation)
    counts = tuple(int(facts["_b"]) for facts in asked.result())
    return asked, Layout(data.ranks, operation, counts)


def layout_of(data: ShardedSet, count: int, operation: str) -> Layout:
    """Whose queries are whose, of which this rank has so many; one small collective where they are
    split."""
    if data.queries != "split":
        return Layout(data.ranks, operation)
    counts = data.ranks.gather(torch.tensor([count], device="cpu"), operation)[:, 0].tolist()
    return Layout(data.ranks, operation, tuple(counts))


def collected(query: Query, data: ShardedSet, layout: Layout) -> Query:
    """The queries of all ranks, as one; the rows that they leave out by their place here."""
    condition = query.condition
    given = [query.x, query.sigma, query.alpha, query.temperature]
    given += [] if condition is None else [condition.c, condition.h]
    x, s, a, t, *rest = Collect.apply(layout, *given)
    if condition is not None:
        (anchor,) = layout.gathered([condition.a])
        condition = condition._replace(c=rest[0], h=rest[1], a=anchor)
    left_out = query.leave_out
    if left_out is not None:
        left_out = data.local_numbers(layout.gathered([left_out])[0])
    return query._replace(
        x=x, sigma=s, alpha=a, temperature=t, condition=condition, leave_out=left_out
    )


def state(query: Query, data: ShardedSet, asked: tuple[Asked, Layout], local: Dense) -> State:
    """The state of this rank's queries over the rows of all. local: the state over its own."""
    sent, layout = asked
    every = collected(query, data, layout)
    b = len(every.x)
    blocks: list[_Block] = []
    # Rows that are read from a file are read once for all queries; all ranks have as many blocks.
    size = max(b, 1) if data.streams else BLOCK
    starts = range(0, max(b, 1), size)
    try:
        for i, start in enumerate(starts):
            part = every.take(slice(start, start + size))
            found, error = _swept(part, data, local)
            if i == 0:
                sent.result()
            blocks.append(_Block(found, error, by_key(part), layout))
            for block in blocks:
                block.advance()
        while any(not block.done for block in blocks):
            for block in blocks:
                block.advance()
    except BaseException:
        for block in blocks:  # what is on its way ends before its memory does
            block.abandon()
        raise
    heads = [torch.cat([block.head[i] for block in blocks])[layout.own] for i in range(2)]
    totals = [torch.cat(v) for v in zip(*(block.totals for block in blocks), strict=True)]
    partials = [torch.cat(v) for v in zip(*(block.partials for block in blocks), strict=True)]
    return State._make([*heads, *joined(layout, totals, partials), blocks[0].center])


def _swept(query: Query, data: ShardedSet, local: Dense) -> tuple[State, Exception | None]:
    """This rank's state; where its sweep fails an empty one, and why."""
    rows = data.as_rows()
    try:
        return local(query), None
    except Exception as error:
        return no_state(query, rows), error


class _Block:
    """The exchange of some queries' states, step by step: each is begun on every rank in the same
    order, and finished when it is needed."""

    def __init__(
        self, mine: State, error: Exception | None, by_key: Tensor, layout: Layout
    ) -> None:
        self.error, self.by_key, self.layout = error, by_key, layout
        self.center = torch.zeros_like(mine.center)
        self.head: tuple[Tensor, Tensor]
        self.totals: list[Tensor] = []
        self.partials: list[Tensor] = []
        self.done = False
        self._waits: Callable[[], Any] | None = None
        self._steps = self._exchange(mine)
        next(self._steps)

    def advance(self) -> None:
        """Waits for what was begun, and begins the next exchange."""
        if not self.done:
            self.done = next(self._steps, True)

    def abandon(self) -> None:
        """Waits for what was begun, whatever becomes of it."""
        if self._waits is not None:
            with contextlib.suppress(RuntimeError):
                self._waits()

    def _begin(self, waits: Callable[[], Any]) -> Callable[[], Any]:
        self._waits = waits

        def once() -> Any:
            self._waits = None
            return waits()

        return once

    def _exchange(self, mine: State) -> Iterator[bool]:
        ranks, operation = self.layout.ranks, self.layout.operation
        failed = torch.full((1,), float(self.error is not None), device=mine.m.device)
        told = torch.cat([*(v.detach() for v in mine[:6]), failed.to(mine.m.dtype)])
        wait = self._begin(ranks.begin_gather(told, operation))
        yield False
        every = wait()
        raise_where_failed(every[:, -1], self.error, self.layout)
        key_r, m_r, s_r, *others = every[:, :-1].reshape(ranks.size, 6, -1).unbind(1)
        key, m = joint_key(key_r, m_r, s_r, self.by_key)
        thin = mine.center.new_zeros((*mine.m.shape, 0))
        totals = [torch.zeros_like(m) for _ in range(4)]
        for rank in range(ranks.size):
            columns = [key_r[rank], m_r[rank], s_r[rank], *(v[rank] for v in others)]
            part = State._make([*columns, thin, thin, thin[0] if len(thin) else mine.center[:0]])
            share = rescaled(part, key, m, self.by_key, part.center)
            totals = [a + v for a, v in zip(totals, share[SUMS], strict=True)]
        partial = rescaled(mine, key, m, self.by_key, self.center)
        wait = self._begin(ranks.begin_sum([partial.acc, partial.residual], operation))
        yield False
        self.totals = [*totals, *wait()]
        self.partials = [*partial[SUMS], partial.acc, partial.residual]
        self.head = key, m
        yield True


def raise_where_failed(flags: Tensor, error: Exception | None, layout: Layout) -> None:
    """Raises where a rank's own part of the work failed: its error there, elsewhere that it did."""
    if error is not None:
        raise error
    bad = (flags != 0).nonzero()[:, 0].tolist()
    if bad:
        raise RuntimeError(
            f"{layout.ranks}: rank {bad[0]} failed in {layout.operation!r}; its own error says why"
        )


def log_total(bias: Tensor | None, data: ShardedSet) -> Tensor:
    """log sum exp of the biases of all rows []; each rank has those of its own."""
    layout = Layout(data.ranks, "log weights")
    mine = torch.full((), -torch.inf, dtype=torch.float64, device=data.device)
    if bias is None:
        return torch.full_like(mine, float(data.n)).log()
    if len(bias):
        mine = torch.logsumexp(bias, 0)
    every = data.ranks.gather(mine, layout.operation)
    top = every.max()
    if bool(torch.isneginf(top)):
        raise ValueError(
            "bias and log weights together leave no row of any rank: all sums are -inf"
        )
    if not len(bias):
        mine = bias.sum()  # of no numbers, but its gradient is recorded where others' are
        share = torch.zeros_like(mine) + mine
    else:
        share = torch.where(torch.isneginf(mine), 0.0, (mine - top).exp())
    (total,) = joined(layout, [(every - top).exp().sum()[None]], [share[None]])
    return top + total[0].log()


# --- nearest ------------------------------------------------------------------------------------


def nearest(
    x: Tensor, data: ShardedSet, k: int, local: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The k smallest squared distances [B, k] and the rows' numbers among all; ties to the lower
    one. local: those among this rank's rows. One all-gather of 16 B k bytes."""
    one = x.new_ones(len(x), dtype=torch.float64)
    sent, layout = ask("nearest", Query(x, one, one, one), data, k=k)
    (every,) = Collect.apply(layout, x)
    b, mine = len(every), min(k, data.n_here)
    sq = torch.full((b, k), torch.inf, dtype=torch.float64, device=x.device)
    row = torch.full((b, k), -1, dtype=torch.int64, device=x.device)
    error: Exception | None = None
    if mine:
        try:
            found, at = local(every, mine)
            pad = sq[:, mine:]
            sq = torch.cat([found, torch.where(found[:, :1].isnan(), torch.nan, pad)], 1)
            row = torch.cat([at + data.first, row[:, mine:]], 1)
        except Exception as raised:
            error = raised
    elif x.requires_grad:
        sq = sq + torch.where(torch.ones_like(every, dtype=torch.bool), 0.0, every).sum(1)[:, None]
    sent.result()
    failed = sq.new_full((b + 1, 1), float(error is not None))  # with B = 0 too
    told = torch.cat([sq.detach(), row.to(torch.float64)], 1)
    told = torch.cat([told, told.new_zeros(1, 2 * k)])
    found_by = data.ranks.gather(torch.cat([told, failed], 1), "nearest")
    raise_where_failed(found_by[:, -1, -1], error, layout)
    all_sq, all_row = found_by[:, :b, : 2 * k].split(k, 2)
    # [B, ranks k]; sorted stably, ties stay in the order of ranks, which is that of the rows.
    flat_sq, flat_row = (v.transpose(0, 1).reshape(b, -1) for v in (all_sq, all_row))
    lost = flat_sq.isnan().any(1, keepdim=True)
    flat_sq = torch.where(lost, torch.nan, flat_sq)
    flat_row = torch.where(lost, torch.arange(flat_sq.shape[1], device=x.device) % k, flat_row)
    total, order = flat_sq.sort(dim=1, stable=True)
    total, order = total[:, :k], order[:, :k]
    here = order.div(k, rounding_mode="floor") == data.ranks.rank
    partial = torch.where(here, sq.gather(1, torch.where(here, order % k, 0)), 0.0)
    (out,) = joined(layout, [total], [partial])
    return out, flat_row.gather(1, order).to(torch.int64)[layout.own]
