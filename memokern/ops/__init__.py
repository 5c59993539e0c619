"""The primitive operations: what they compute, and the shortest way to who computes it.

They are registered with PyTorch as ``torch.ops.memokern.*`` (schema, fake, autograd, vmap), with
flat arguments; the functions here take and return the objects of :mod:`memokern.calls`. With rows
y = scale * data + shift, the logits l of the query's weighting and w = softmax(l / T),

:func:`posterior`
    One sweep over all rows: the :class:`memokern.calls.Sums`.
:func:`posterior_state`
    The same, not normalised: a :class:`memokern.calls.State`, to be merged with those of other
    rows; acc is float64 where x or the rows are, else float32.
:func:`nearest`
    The k smallest |x - y_n|^2 [B, k] float64, ascending, ties to the lower index, and the rows
    [B, k] int64.
:func:`bound_scan`
    Which rows can matter to each query (weighting "gaussian"), from the bounds of an index: a
    :class:`memokern.calls.Scan`. A query is given up (level 0) at sigma = 0, where a number is not
    finite, or where more rows are left, or to come as a sample shows, than are worth listing:
    backends may list a few times as many where no sweep would be saved. It has no derivative.
:func:`posterior_listed`
    The sums over the listed rows only, each logit by direct differences in float64 (weighting
    "gaussian"). A query without rows: log_z -inf, the others NaN.

All but bound_scan are differentiable twice, in the query; posterior and posterior_state once in the
rows too, nearest once.
"""

from __future__ import annotations

from torch import Tensor

from memokern.backends.protocol import Backend, Call, choose
from memokern.calls import LogitBounds, Query, RowLists, Rows, Scan, State, Sums
from memokern.ops import dense, listed, neighbours
from memokern.ops.flat import flat, flat_bounds, tensors
from memokern.ops.registration import OPS
from memokern.util.torch_internals import primal, under_transform, undispatched

__all__ = [
    "bound_scan",
    "nearest",
    "posterior",
    "posterior_listed",
    "posterior_state",
]

_REGISTERED = (dense, listed, neighbours)  # by being imported


def _direct(operation: str, query: Query, rows: Rows) -> Backend | None:
    """The backend, where the dispatcher has nothing to do (it takes as long as scanning a thousand
    rows), or would lose a transform that the reference answers."""
    all_tensors = tensors(query, rows)
    own_bias = query.own_bias
    if undispatched(*all_tensors):
        return choose(operation, Call.of(query.x, rows.data, own_bias=own_bias))
    if under_transform(*all_tensors):
        return choose(operation, Call.of(query.x, rows.data, transform=True, own_bias=own_bias))
    return None


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep."""
    backend = _direct("posterior", query, rows)
    if backend is not None:
        return backend.posterior(query, rows)
    return Sums(*OPS.posterior(*flat(query, rows)))


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, not normalised."""
    if under_transform(*tensors(query, rows)):
        call = Call.of(query.x, rows.data, transform=True, own_bias=query.own_bias)
        backend = choose("posterior_state", call)
        return backend.posterior_state(query, rows)
    return State(*OPS.posterior_state(*flat(query, rows)))


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows."""
    if undispatched(x, rows.data):
        return choose("nearest", Call.of(x, rows.data, k)).nearest(x, rows, k)
    out: tuple[Tensor, Tensor] = OPS.nearest(
        x, rows.data, rows.center, rows.sq_norms, rows.scale, rows.shift, k
    )
    return out


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """Which rows can matter: a choice, which has no tangent."""
    backend = _direct("bound_scan", query, rows)
    if backend is not None:
        scan = backend.bound_scan(query, rows, bounds)
        return scan._replace(threshold=primal(scan.threshold))
    start, index, threshold, level = OPS.bound_scan(*flat(query, rows), *flat_bounds(bounds))
    return Scan(RowLists(start, index), threshold, level)


def posterior_listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sweep over listed rows."""
    backend = _direct("posterior_listed", query, rows)
    if backend is not None:
        return backend.posterior_listed(query, rows, lists)
    return Sums(*OPS.posterior_listed(*flat(query, rows), *lists))
