"""The posterior of queries over the rows that each asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from memokern import sweep
from memokern.conditional.groups import Group, groups
from memokern.conditional.lists import Allowed
from memokern.conditional.wanted import Wanted
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.index.index import Index
from memokern.ops.flat import tensors
from memokern.results import Certificate, Posterior
from memokern.strategies import segments
from memokern.util.torch_internals import traced, under_transform
from memokern.validate import Asked


def posterior(
    x: Tensor,
    data: TrainingSet | Tensor,
    asked: Asked,
    bias: Tensor | None,
    wanted: Wanted,
    options: dict[str, Any],
) -> Posterior:
    """The posterior of queries x [*batch, *shape], over the rows that each asks for.

    asked: the call as if all rows counted. options: keywords of :func:`memokern.sweep.posterior`.
    """
    index = sweep.index_for(data, options["method"])
    if not isinstance(data, TrainingSet):
        if data.requires_grad:
            raise ValueError("leave_out has no gradient for rows: pass rows.detach()")
        data = TrainingSet(data, check=False)
    apart = isinstance(data, PartedSet)
    batch = asked.batch
    together = sweep.why_in_groups(asked, data, index) is None
    allowed = allowed_for(asked, options["weighting"], options["certificate"], index)
    found = groups(data, batch, wanted, together, allowed)
    s, a, t = asked.sigma, asked.alpha, asked.temperature
    if not found:  # no queries
        return sweep.posterior(x, data, s, a, t, bias, **options)

    def of_group(x: Tensor, s: Tensor, a: Tensor, t: Tensor, group: Group) -> Posterior:
        rows, part = group.data, group.total_bias(bias)
        dense = rows.index is None and not apart
        mine = {**options, "method": "dense"} if dense else options
        return sweep.posterior(x, rows, s, a, t, part, group.own, **mine)

    if len(found) == 1:
        return of_group(x, s, a, t, found[0])
    flat, parts, order = x.reshape(-1, *data.shape), [], []
    s, a, t = (v.reshape(-1) for v in (s, a, t))
    for group in found:
        at = group.at
        parts.append(of_group(flat[at], s[at], a[at], t[at], group))
        order.append(group.at)
    return replace(joined(parts, torch.argsort(torch.cat(order)), batch), x=x)


def allowed_for(asked: Asked, weighting: str, certificate: bool, index: Index | None) -> Allowed:
    """The ways that are open to queries of different labels: sums over lists of rows have one
    weighting, and neither a transform nor a compiler can make the lists; sweeps over segments
    have no derivatives, and are the CPU kernels'."""
    every = tensors(asked.query, asked.data.rows)
    if certificate or under_transform(*every) or traced(*every):
        return Allowed()
    return Allowed(
        weighting == "gaussian", segments.swept(asked.query, asked.data.rows), index is not None
    )


def put_back(values: list[Tensor], back: Tensor, batch: Sequence[int], axis: int) -> Tensor:
    """Tensors of parts of the queries as one, in the queries' order and with their shape in the
    place of `axis`; arguments as :func:`joined`."""
    every = torch.cat(values, axis).index_select(axis, back)
    return every.reshape((*every.shape[:axis], *batch, *every.shape[axis + 1 :]))


def joined(parts: list[Posterior], back: Tensor, batch: Sequence[int], axis: int = 0) -> Posterior:
    """The posteriors of parts of the queries as one.

    back: [B], where each query is among the parts', one after the other. batch: the shape that the
    queries get. axis: that of the queries, where there are axes before it. n is that of the part
    with the most rows.
    """

    def join(values: list[Tensor]) -> Tensor:
        return put_back(values, back, batch, axis)

    bounds = [p.certificate for p in parts if p.certificate is not None]
    certificate = None
    if bounds:
        every = [field.name for field in fields(Certificate)]
        certificate = Certificate(**{v: join([getattr(c, v) for c in bounds]) for v in every})
    names = [field.name for field in fields(Posterior)]
    tensors = [v for v in names if isinstance(getattr(parts[0], v), Tensor)]
    per_query: dict[str, Any] = {
        v: join([getattr(p, v) for p in parts]) for v in tensors if v != "log_weight_total"
    }
    return replace(
        parts[0],
        n=max(part.n for part in parts),
        certificate=certificate,
        log_weight_total=join([torch.zeros_like(p.sigma) + p.log_weight_total for p in parts]),
        **per_query,
    )
