"""The launchers of the dense sweep: in one pass where a tile's sums fit the registers, else in
chunks of rows."""

from __future__ import annotations

from memokern.backends.triton.core import machine
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.posterior import chunked, finish, one_pass, planner
from memokern.backends.triton.posterior.queries import KernelQueries, prepare
from memokern.calls import Query, Rows, State, Sums


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep, normalised."""
    q, data = prepare(query, rows)
    sums = finish.empty_sums(q)
    sweep(q, data, sums)
    kind = query.x.dtype
    return sums._replace(mean=sums.mean.to(kind), residual=sums.residual.to(kind))


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, not normalised."""
    q, data = prepare(query, rows)
    state = finish.empty_state(q)
    sweep(q, data, state)
    return state


def sweep(q: KernelQueries, data: KernelRows, into: Sums | State) -> None:
    """Write the results of :func:`finish.empty_sums` or :func:`finish.empty_state`."""
    b, d = q.x.shape
    if b == 0:
        return
    size = (b, data.n, d, data.data.dtype, machine.of(q.x.device), q.weighting)
    plan = planner.one_pass(*size, data.unaligned)
    if plan is not None:
        one_pass.launch(q, data, plan, into)
    else:
        chunked.launch(q, data, planner.chunked(*size), into)
