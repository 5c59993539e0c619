"""Evaluations of parts of the queries, each on rows of its own, as one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from memokern.regularizers.base import Query
from memokern.regularizers.prediction import Prediction
from memokern.results import Certificate

BOUNDS = [field.name for field in fields(Certificate)]


def joined(parts: list[Prediction], back: Tensor, whole: Query, n: int) -> Prediction:
    """The prediction for all queries.

    Args:
        parts: of flat queries, one after the other. back: [B], where each query is in that order.
        whole: the queries [*batch, *shape] as they were asked. n: the number of all rows.
    """
    batch = whole.sigma.shape

    def join(values: list[Tensor], axis: int) -> Tensor:
        every = torch.cat(values, axis).index_select(axis, back)
        return every.reshape(*every.shape[:axis], *batch, *every.shape[axis + 1 :])

    # A regulariser may have replicated the queries along first axes; their own axis comes last.
    axis = parts[0].posterior.sigma.dim() - 1

    def of_each(values: list[Any], *names: str) -> dict[str, Any]:
        return {name: join([getattr(v, name) for v in values], axis) for name in names}

    asked = ("x", "sigma", "alpha", "temperature")
    sums = ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq")
    posteriors = [part.posterior for part in parts]
    bounds = [p.certificate for p in posteriors if p.certificate is not None]
    queries = [part.query for part in parts]
    posterior = replace(
        posteriors[0],
        n=n,
        certificate=Certificate(**of_each(bounds, *BOUNDS)) if bounds else None,
        log_weight_total=join(
            [torch.zeros_like(p.sigma) + p.log_weight_total for p in posteriors], axis
        ),
        **of_each(posteriors, *asked, *sums),
    )
    return replace(
        parts[0],
        x=whole.x,
        sigma=whole.sigma,
        alpha=whole.alpha,
        x0=join([p.x0 for p in parts], 0),
        residual=join([p.residual for p in parts], 0),
        posterior=posterior,
        query=replace(queries[0], bias=whole.bias, **of_each(queries, *asked)),
    )
