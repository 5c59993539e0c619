"""Evaluations of parts of the queries, each on rows of its own, as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from memokern import conditional
from memokern.regularizers.base import Query
from memokern.regularizers.prediction import Prediction


def joined(parts: list[Prediction], back: Tensor, whole: Query, n: int) -> Prediction:
    """The prediction for all queries.

    Args:
        parts: of flat queries, one after the other. back: [B], where each query is in that order.
        whole: the queries [*batch, *shape] as they were asked. n: the number of all rows.
    """
    batch = whole.sigma.shape

    def join(values: list[Tensor], axis: int) -> Tensor:
        return conditional.put_back(values, back, batch, axis)

    # A regulariser may have replicated the queries along first axes; their own axis comes last.
    axis = parts[0].posterior.sigma.dim() - 1
    posterior = conditional.joined([part.posterior for part in parts], back, batch, axis)
    asked = ("x", "sigma", "alpha", "temperature")
    queries = [part.query for part in parts]
    query: dict[str, Any] = {v: join([getattr(q, v) for q in queries], axis) for v in asked}
    return replace(
        parts[0],
        x=whole.x,
        sigma=whole.sigma,
        alpha=whole.alpha,
        x0=join([p.x0 for p in parts], 0),
        residual=join([p.residual for p in parts], 0),
        posterior=replace(posterior, n=n),
        query=replace(queries[0], bias=whole.bias, **query),
    )
