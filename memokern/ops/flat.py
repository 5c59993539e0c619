"""Call objects as the flat arguments that ``torch.library`` needs, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memokern.calls import Blocks, Condition, LogitBounds, Query, Rows

# The first arguments of every operation but `nearest`; the tensors among them come first.
PREFIX = (
    "Tensor x, Tensor rows, Tensor sigma, Tensor alpha, Tensor temperature, Tensor? bias,"
    " Tensor? condition, Tensor? bandwidth, Tensor? anchor, Tensor? leave_out, Tensor? center,"
    " Tensor? sq_norms, Tensor? conditions, float scale, float shift, str weighting, str precision"
)
WIDTH, TENSORS = 17, 13
CONDITIONS = 12
# Those of them that have a value for each query.
PER_QUERY = frozenset({0, 2, 3, 4, 6, 7, 8, 9})

SUMS = "Tensor mean, Tensor log_z, Tensor mean_logit, Tensor mean_bias, Tensor weight_sq"
SUM_GRADS = (
    "Tensor grad_mean, Tensor grad_log_z, Tensor grad_mean_logit, Tensor grad_mean_bias,"
    " Tensor grad_weight_sq"
)
SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def flat(query: Query, rows: Rows) -> tuple[Any, ...]:
    """The arguments of :data:`PREFIX`."""
    condition = (None,) * 3 if query.condition is None else query.condition
    return (
        query.x,
        rows.data,
        query.sigma,
        query.alpha,
        query.temperature,
        query.bias,
        *condition,
        query.leave_out,
        rows.center,
        rows.sq_norms,
        rows.conditions,
        rows.scale,
        rows.shift,
        query.weighting,
        query.precision,
    )


def flat_bounds(bounds: LogitBounds) -> tuple[Any, ...]:
    """The arguments of `bound_scan` beyond those of :data:`PREFIX`."""
    blocks = bounds.blocks or (None, None, None, None, None, 0.0)
    return (*bounds[:10], *blocks, bounds.reading)


def bounds_of(args: tuple[Any, ...]) -> LogitBounds:
    """The bounds in the arguments of `bound_scan`."""
    *tensors, dims, first_band, eps, most_listed = args[WIDTH : WIDTH + 10]
    *given, reading = args[WIDTH + 10 :]
    blocks = None if given[0] is None else Blocks._make(given)
    levels = [tuple(dims), tuple(first_band)]
    return LogitBounds._make([*tensors, *levels, eps, most_listed, blocks, reading])


def query_of(args: tuple[Any, ...]) -> Query:
    """The query in the arguments of an operation."""
    given = args[6:9]
    if any(v is None for v in given):
        if not all(v is None for v in given):
            raise ValueError("condition, bandwidth and anchor belong together: give all or none")
        condition = None
    else:
        condition = Condition(*given)
    x, _, sigma, alpha, temperature, bias = args[:6]
    return Query(x, sigma, alpha, temperature, bias, args[15], args[16], condition, args[9])


def rows_of(args: tuple[Any, ...]) -> Rows:
    """The rows in the arguments of an operation."""
    return Rows(args[1], args[13], args[14], *args[10:13])


def tensors(query: Query, rows: Rows) -> tuple[Tensor | None, ...]:
    """What may carry a gradient or be mapped over."""
    return rows.data, *query.tensors
