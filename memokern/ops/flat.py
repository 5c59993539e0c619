"""Call objects as the flat arguments that ``torch.library`` needs, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memokern.calls import Query, Rows

# The first arguments of every operation but `nearest`; the tensors among them come first.
PREFIX = (
    "Tensor x, Tensor rows, Tensor sigma, Tensor alpha, Tensor temperature, Tensor? bias,"
    " Tensor? center, Tensor? sq_norms, float scale, float shift, str weighting, str precision"
)
WIDTH, TENSORS = 12, 8
# Those of them that have a value for each query.
PER_QUERY = frozenset({0, 2, 3, 4})

SUMS = "Tensor mean, Tensor log_z, Tensor mean_logit, Tensor mean_bias, Tensor weight_sq"
SUM_GRADS = (
    "Tensor grad_mean, Tensor grad_log_z, Tensor grad_mean_logit, Tensor grad_mean_bias,"
    " Tensor grad_weight_sq"
)
FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def flat(query: Query, rows: Rows) -> tuple[Any, ...]:
    """The arguments of :data:`PREFIX`."""
    return (
        query.x,
        rows.data,
        query.sigma,
        query.alpha,
        query.temperature,
        query.bias,
        rows.center,
        rows.sq_norms,
        rows.scale,
        rows.shift,
        query.weighting,
        query.precision,
    )


def query_of(args: tuple[Any, ...]) -> Query:
    """The query in the arguments of an operation."""
    return Query(args[0], args[2], args[3], args[4], args[5], args[10], args[11])


def rows_of(args: tuple[Any, ...]) -> Rows:
    """The rows in the arguments of an operation."""
    return Rows(args[1], args[8], args[9], args[6], args[7])


def tensors(query: Query, rows: Rows) -> tuple[Tensor | None, ...]:
    """What may carry a gradient or be mapped over."""
    return query.x, rows.data, query.sigma, query.alpha, query.temperature, query.bias
