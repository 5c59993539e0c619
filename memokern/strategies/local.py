"""The state of queries over the rows that this process has: by an index, from a file or iterable
chunk by chunk, or in one sweep over memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Query, RowLists, Rows, State, Sums, empty_state
from memokern.data.streamed import StreamedSet
from memokern.data.training_set import TrainingSet
from memokern.index.index import Index
from memokern.ops.flat import tensors
from memokern.strategies import costs, pruned, streamed
from memokern.strategies.certificate import Dropped
from memokern.util.torch_internals import traced, under_transform


class How(NamedTuple):
    """Which way to go. method, tol: as :func:`memokern.posterior`. radius: that of the ball in
    which all rows lie, of all parts; None for the index's own. dropped: where to note, sweep by
    sweep, what the rows left out may weigh; None for nowhere."""

    method: str = "dense"
    tol: float | None = None
    radius: float | None = None
    dropped: list[Dropped] | None = None

    def note(self, dropped: Dropped) -> None:
        """Notes it where it is wanted."""
        if self.dropped is not None:
            self.dropped.append(dropped)


Dense = Callable[[Query], State]
Listed = Callable[[Query, Rows, RowLists], Sums]


def no_state(query: Query, rows: Rows) -> State:
    """The state of no rows, of which every rank records a gradient that others record."""
    kind = torch.float64 if query.computes_in_float64(rows) else torch.float32
    center = torch.zeros(rows.dim, dtype=torch.float64, device=query.x.device)
    state = empty_state(len(query.x), center, kind)
    needed = [v for v in query.tensors if v is not None and v.requires_grad]
    if not (needed and torch.is_grad_enabled()):
        return state
    nothing = torch.zeros_like(state.s)
    for v in needed:
        if v.shape[:1] == nothing.shape:
            flat = v[:, None].flatten(1)
            # Not 0 times v, which may be infinite.
            flat = torch.where(torch.ones_like(flat, dtype=torch.bool), 0.0, flat)
            nothing = nothing + flat.sum(1)
    thin = nothing[:, None].to(kind)
    return state._replace(
        s=state.s + nothing, s_v=state.s_v + nothing, s_bias=state.s_bias + nothing,
        s_sq=state.s_sq + nothing, acc=state.acc + thin, residual=state.residual + thin,
    )  # fmt: skip


def state_by_index(
    query: Query,
    rows: Rows,
    index: Index | None,
    how: How,
    dense: Dense,
    listed: Listed = ops.posterior_listed,
    looking: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> State:
    """The state of all rows, of which an index may prove most to weigh nothing. dense: sweeps over
    all of them; listed: over lists of them. looking: open while the bounds are used, for which some
    rows are evaluated."""
    every, none = tensors(query, rows), Dropped.none(query.sigma, rows.n)
    if (
        index is None
        or how.method == "dense"
        or query.own_bias
        or query.weighting != "gaussian"
        or under_transform(*every)
        or traced(*every)
    ):
        how.note(none)
        return dense(query)
    eps = pruned.weight_allowed(query, rows, index, None)
    if how.tol is not None:
        radius = index.y_max if how.radius is None else how.radius
        eps = min(eps, how.tol / (2 * radius)) if radius > 0 else eps
    measured = costs.costs_of(query.x, rows.data) if how.method == "auto" else None
    with looking():
        chosen = pruned.choose(query, rows, index, eps, measured)
    if chosen is None:
        how.note(none)
        return dense(query)
    scan, swept = chosen
    # At sigma = 0, and nearly there, sums that are normalised cannot be merged.
    kept = (~swept).nonzero()[:, 0]
    if not len(kept):
        how.note(none)
        return dense(query)
    lists = pruned.lists_of(scan, ~swept)
    near = query.take(kept)
    sums = listed(near, rows, lists)
    merges = torch.isfinite(sums.log_z)
    if not bool(merges.all()):
        kept = kept[merges]
        near, sums = near.take(merges), Sums(*(v[merges] for v in sums))
    center = torch.zeros(rows.dim, dtype=torch.float64, device=query.x.device)
    kind = torch.float64 if query.computes_in_float64(rows) else torch.float32
    rest = torch.ones_like(swept)
    rest[kept] = False
    if how.dropped is not None:
        how.note(Dropped.by_scan(scan, rest, rows.n))
    mine = _state_of(sums, near, center, kind)
    if len(kept) == len(query.x):
        return mine
    at = rest.nonzero()[:, 0]
    other = dense(query.take(at))
    acc = (other.acc + other.s[:, None] * other.center).to(other.acc.dtype)
    other = other._replace(acc=acc, center=center)
    back = torch.argsort(torch.cat([kept, at]))
    pairs = zip(mine[:8], other[:8], strict=True)
    return State._make([*(torch.cat(pair)[back] for pair in pairs), center])


def _state_of(sums: Sums, query: Query, center: Tensor, kind: torch.dtype) -> State:
    """A state from normalised sums of queries with sigma > 0, whose log_z is finite: s is 1."""
    v = sums.log_z / query.temperature
    m = v.detach()
    s = (v - m).exp()
    return State(
        torch.zeros_like(m),
        m,
        s,
        s * (sums.mean_logit / query.temperature - m),
        s * sums.mean_bias,
        s.square() * sums.weight_sq,
        (s[:, None] * (sums.mean - center)).to(kind),
        (s[:, None] * sums.residual).to(kind),
        center,
    )


def state(query: Query, data: TrainingSet, how: How) -> State:
    """The state of queries over a set's rows in this process."""
    rows = data.as_rows()
    if isinstance(data, StreamedSet):
        source = data
        if under_transform(*tensors(query, rows)):
            raise RuntimeError(
                "rows that are read chunk by chunk have no forward mode and no torch.func transform"
                " but vmap: use backward() or torch.autograd.grad"
            )

        def dense(query: Query) -> State:
            return streamed.state(query, source)

        def listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
            return streamed.listed(query, rows, lists, source)

        def looking() -> AbstractContextManager[None]:
            return streamed.some_rows(source)

        return state_by_index(query, rows, data.index, how, dense, listed, looking)
    if query.condition is not None:
        rows = rows._replace(conditions=data.conditions)
    return state_by_index(
        query, rows, data.index, how, lambda query: ops.posterior_state(query, rows)
    )
