"""The posterior of queries over the rows that each asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from memokern import ops, sweep
from memokern.calls import RowLists
from memokern.conditional.groups import Group, groups, rows_of
from memokern.conditional.wanted import Label, Wanted, label_numbers
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.results import Certificate, Posterior
from memokern.util.torch_internals import traced
from memokern.validate import Asked, log_total

# Queries per label up to which lists of rows are faster than a sweep for each label, and how many
# rows may be listed together.
LISTED, MOST_LISTED = 2, 1 << 24


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
    if (
        not apart
        and wanted.label_alone
        and asked.query.weighting == "gaussian"
        and not options["certificate"]
    ):
        listed = by_lists(x, data, asked, wanted.label)
        if listed is not None:
            return listed
    batch = asked.batch
    found = groups(data, batch, wanted, sweep.why_in_groups(asked, data, index) is None)
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


def by_lists(x: Tensor, data: TrainingSet, asked: Asked, label: Label) -> Posterior | None:
    """The same for labels alone, by one sweep over a list of rows for each query, where there are
    about as many labels as queries: a sweep for each label would take longer. None elsewhere."""
    batch, query = asked.batch, asked.query
    if math.prod(batch) < 2 or data.labels is None or traced(query.x):
        return None
    labels = label_numbers(label, batch, data.device, data.label_count)
    if labels.dim() == 0:
        return None
    known, which = labels.reshape(-1).unique(return_inverse=True)
    if len(which) > LISTED * len(known):
        return None
    chosen = [rows_of(data, one)[0] for one in known.tolist()]
    lists = [torch.arange(data.n, device=x.device)[v] for v in chosen]
    counts = torch.tensor([len(v) for v in lists], device=x.device)[which]
    if int(counts.sum()) > MOST_LISTED:
        return None
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    index = torch.cat([lists[i] for i in which.tolist()])
    sums = ops.posterior_listed(query, asked.data.rows, RowLists(start, index))
    totals = torch.stack(
        [x.new_zeros((), dtype=torch.float64) + _total(query.bias, v) for v in lists]
    )
    columns: dict[str, Any] = {
        name: v.reshape(x.shape if v.dim() == 2 else batch)
        for name, v in zip(sums._fields, sums, strict=True)
    }
    return Posterior(
        x=x,
        sigma=asked.sigma,
        alpha=asked.alpha,
        temperature=asked.temperature,
        n=int(counts.max()),
        dim=asked.data.rows.dim,
        log_weight_total=totals[which].reshape(batch),
        **columns,
    )


def _total(bias: Tensor | None, rows: Tensor) -> Tensor | float:
    return log_total(None if bias is None else bias[rows], len(rows))


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
