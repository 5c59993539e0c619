"""A posterior from arguments to result: the way of small calls, pruned rows, or all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Condition, Query, RowLists, Rows, Segments, Sums, to_sums
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.index.index import Index
from memokern.ops.flat import tensors
from memokern.results import Posterior
from memokern.strategies import costs, own_bias, parted, pruned, segments
from memokern.strategies.certificate import Certificate, nothing_dropped
from memokern.strategies.local import How
from memokern.strategies.small_call import small_call, small_posterior
from memokern.util.torch_internals import traced, under_transform, undispatched
from memokern.validate import Asked, PerQuery, checked, log_total, one_of

METHODS = ("auto", "dense", "pruned")


class Own(NamedTuple):
    """What each of B queries asks for, beside its numbers, that the others do not: fields of a
    :class:`.Query`; or the rows that count for it, with the gaussian weighting: a list, or where
    :func:`.segments.swept` a segment."""

    condition: Condition | None = None
    leave_out: Tensor | None = None
    lists: RowLists | None = None
    segments: Segments | None = None

    def __bool__(self) -> bool:
        return any(field is not None for field in self)

    def repeated(self, times: int) -> Own:
        """The same for so many copies of the queries, one after the other."""
        condition, leave_out, lists, of = self
        if condition is not None:
            c, h, a = condition
            condition = Condition(c.repeat(times, 1), h.repeat(times), a.repeat(times, 1))
        if lists is not None:
            start, index = lists
            count = (start[1:] - start[:-1]).repeat(times)
            start = torch.cat([start[:1], count.cumsum(0)])
            lists = RowLists(start, index.repeat(times))
        if of is not None:
            of = Segments(*(v.repeat(times) for v in of))
        leave_out = None if leave_out is None else leave_out.repeat(times)
        return Own(condition, leave_out, lists, of)


NOTHING = Own()


def posterior(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    bias: Tensor | None = None,
    own: Own = NOTHING,
    *,
    weighting: str = "gaussian",
    method: str = "auto",
    certificate: bool = False,
    tol: float | None = None,
    precision: str = "auto",
) -> Posterior:
    """:func:`memokern.posterior` of float32 or float64 queries; with something of each query's own,
    a dense sweep, whatever the method."""
    if isinstance(data, PartedSet):
        options = {"weighting": weighting, "precision": precision}
        how = How(method, tol, dropped=[] if certificate else None)
        return _parted(x, data, (sigma, alpha, temperature), bias, own, how, options)
    index = index_for(data, method)
    _check_tol(tol)
    if weighting == "gaussian" and not certificate and not own:
        short = small_call(x, data, sigma, alpha, temperature, bias, method, precision)
        if short is not None:
            total = log_total(short.log_weights, short.rows.n)
            return _result(x, short.rows, total, small_posterior(short))
    asked = checked(x, data, sigma, alpha, temperature, bias, weighting, precision)
    query, rows, batch = asked.query, asked.data.rows, asked.batch
    bounds, total = None, log_total(query.bias, rows.n)
    if own.segments is not None:
        sums = segments.posterior(query, rows, own.segments)
        total = segments.log_total(query.bias, own.segments).reshape(batch)
    elif own.lists is not None:
        sums = ops.posterior_listed(query, rows, own.lists)
        total = _listed_total(query.bias, own.lists).reshape(batch)
    elif own:
        query = query._replace(condition=own.condition, leave_out=own.leave_out)
        if own.condition is not None and isinstance(data, TrainingSet):
            rows = rows._replace(conditions=data.conditions)
        sums = ops.posterior(query, rows)
        total = _own_total(query, rows).reshape(batch)
    elif index is None or not _selects_rows(asked):
        sums = ops.posterior(query, rows)
    else:
        pruned.warn_of_gradients(sigma=sigma, alpha=alpha, temperature=temperature)
        sums, bounds = pruned.posterior(
            query, rows, index,
            eps=pruned.weight_allowed(query, rows, index, tol),
            costs=costs.costs_of(query.x, rows.data) if method == "auto" else None,
            certificate=certificate,
        )  # fmt: skip
        bounds = None if bounds is None else bounds.reshape(batch)
    if certificate and bounds is None:
        bounds = nothing_dropped(asked.sigma, rows.n)
    found = _result(x, rows, total, _shaped(x, asked, sums), bounds)
    if own.segments is not None:
        return replace(found, n=int((own.segments.end - own.segments.first).max()))
    return found if own.lists is None else replace(found, n=_longest(own.lists))


def _check_tol(tol: float | None) -> None:
    if tol is not None and not (isinstance(tol, float | int) and 0 < tol < math.inf):
        raise ValueError(f"expected tol as a finite number > 0, or None, got {tol!r}")


def _parted(
    x: Tensor,
    data: PartedSet,
    numbers: tuple[PerQuery, PerQuery, PerQuery],
    bias: Tensor | None,
    own: Own,
    how: How,
    options: dict[str, Any],
) -> Posterior:
    """The same for rows that no process has in memory as a whole."""

    def check() -> Asked:
        index_for(data, how.method)
        _check_tol(how.tol)
        return checked(x, data, *numbers, bias, **options)

    asked = parted.together(data, "posterior", check)
    query = asked.query._replace(condition=own.condition, leave_out=own.leave_out)
    if how.method != "dense" and data.index is not None:
        pruned.warn_of_gradients(sigma=numbers[0], alpha=numbers[1], temperature=numbers[2])
    sums = to_sums(parted.state(query, data, how), query)
    bounds = None
    if how.dropped is not None:
        bounds = parted.certificate(query, sums, data, how.dropped).reshape(asked.batch)
    if own:
        total: Tensor | float = parted.own_total(query, data).reshape(asked.batch)
    else:
        total = parted.total(query.bias, data)
    found = _result(x, asked.data.rows, total, _shaped(x, asked, sums), bounds)
    return replace(found, n=data.n)


def _shaped(x: Tensor, asked: Asked, sums: Sums) -> tuple[Tensor, ...]:
    """What :func:`_result` takes, in the shape of the batch."""
    mean, *stats, residual = sums
    if mean.shape != x.shape:
        mean, residual = mean.reshape(x.shape), residual.reshape(x.shape)
    if len(asked.batch) != 1:
        stats = [v.reshape(asked.batch) for v in stats]
    return mean, residual, asked.sigma, asked.alpha, asked.temperature, *stats


def _result(
    x: Tensor,
    rows: Rows,
    log_weight_total: Tensor | float,
    found: tuple[Tensor, ...],
    bounds: Certificate | None = None,
) -> Posterior:
    mean, residual, sigma, alpha, temperature, log_z, mean_logit, mean_bias, weight_sq = found
    return Posterior(
        x=x,
        mean=mean,
        residual=residual,
        log_z=log_z,
        mean_logit=mean_logit,
        mean_bias=mean_bias,
        weight_sq=weight_sq,
        sigma=sigma,
        alpha=alpha,
        temperature=temperature,
        n=rows.n,
        dim=rows.dim,
        log_weight_total=log_weight_total,
        certificate=bounds,
    )


def _own_total(query: Query, rows: Rows) -> Tensor:
    """log sum exp of each query's biases [B]: log_z of a sweep that sees no distance, over rows of
    one number, which all are 0."""
    one = torch.ones_like(query.sigma)
    nowhere = query._replace(
        x=torch.zeros_like(one)[:, None], sigma=one, alpha=one, temperature=one,
        weighting="gaussian",
    )  # fmt: skip
    zeros = one.new_zeros(1, 1).expand(rows.n, 1)
    return ops.posterior(nowhere, Rows(zeros, conditions=rows.conditions)).log_z


def _listed_total(bias: Tensor | None, lists: RowLists) -> Tensor:
    """log sum exp of the biases of each query's rows [B]."""
    start, index = lists
    count = start[1:] - start[:-1]
    if bias is None:
        return count.to(torch.float64).log()
    each = torch.arange(len(count), device=start.device).repeat_interleave(count)
    own = bias[index]
    top = (
        own.detach()
        .new_full((len(count),), -torch.inf)
        .scatter_reduce(0, each, own.detach(), "amax")
    )
    top = torch.where(torch.isneginf(top), 0.0, top)
    power = (own - top[each]).exp()
    mass = torch.zeros_like(top).index_add(0, each, power)
    none = mass == 0  # whose derivative would be 0 / 0
    return torch.where(none, -torch.inf, torch.where(none, 1.0, mass).log() + top)


def _longest(lists: RowLists) -> int:
    return int((lists.start[1:] - lists.start[:-1]).max())


def _selects_rows(asked: Asked) -> bool:
    """Whether rows can be selected for these queries: bounds are those of the gaussian weighting,
    and no transform or compiler is at work, which could not follow the choice."""
    every = tensors(asked.query, asked.data.rows)
    if asked.query.weighting != "gaussian":
        return False
    return undispatched(*every) or not (under_transform(*every) or traced(*every))


def why_in_groups(asked: Asked, data: TrainingSet | Tensor, index: Index | None) -> str | None:
    """Why queries that ask for different rows are not answered in one dense sweep, but in one for
    each group that asks for the same; None where they are."""
    if isinstance(data, PartedSet):
        return None
    query, rows = asked.query, asked.data.rows
    reason = own_bias.refusal(query, rows)
    if reason is not None:
        return reason
    if index is not None and _selects_rows(asked) and not pruned.hopeless(query, rows, index):
        return "the data's index selects rows for each of them"
    return None


def index_for(data: TrainingSet | Tensor, method: str) -> Index | None:
    """The index to use, where the method and the data allow for one."""
    one_of("method", method, METHODS)
    index = data.index if isinstance(data, TrainingSet) else None
    if isinstance(data, PartedSet) and (method != "pruned" or data.indexed):
        return None  # each part has its own
    if method == "pruned" and index is None:
        raise ValueError(
            "method='pruned' needs an index of the rows: call build_index() on the TrainingSet"
            " once (a tensor has none), or use method='auto' or 'dense'"
        )
    return None if method == "dense" else index
