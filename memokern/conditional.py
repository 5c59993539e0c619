"""Queries that ask for some of the rows: those with a label, those whose conditions are near, or
all but one.

Queries that ask for the same rows share a sweep. What they ask for becomes a part of the rows (a
label) and a bias per row (a condition, a row left out), which every backend, regulariser and
strategy has; so nothing of size N x B is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern.data.storage import chunks
from memokern.data.training_set import TrainingSet
from memokern.results import Certificate, Posterior
from memokern.util.torch_internals import traced
from memokern.validate import PerQuery, broadcastable

Label = int | Tensor | Sequence[int | None] | None
# The label of queries that use all rows: the null class of guidance.
EVERY_ROW = -1
# The least logarithm of a density that is kept where the true one is no float64.
LOWEST = -1e300


@dataclass(frozen=True)
class Wanted:
    """What queries ask for beside their noise level; :func:`memokern.posterior` describes each."""

    label: Label = None
    condition: Tensor | None = None
    bandwidth: PerQuery | None = None
    leave_out: int | Tensor | None = None

    def __bool__(self) -> bool:
        return not (self.label is None and self.condition is None and self.leave_out is None)


class Group(NamedTuple):
    """Queries that ask for the same rows.

    at: which queries, [b] int64 into the flat batch. data: the rows that they may see. index: which
    of all rows these are. bias: [n] float64 or None, what their condition adds to each logit, less
    the largest. shift: [] float64, that largest one.
    """

    at: Tensor
    data: TrainingSet
    chosen: Tensor | slice
    bias: Tensor | None
    shift: Tensor | None

    def total_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of these rows, with their part of one for all rows."""
        if bias is None:
            return self.bias
        part = bias[self.chosen]
        return part if self.bias is None else part + self.bias


# --- labels -------------------------------------------------------------------------------------


def label_numbers(label: Label, batch: Sequence[int], data: TrainingSet) -> Tensor:
    """Labels as integers [] or [*batch]: given so, with None for -1, or one-hot
    [*batch, L], L the largest label + 1, where a query of zeros is -1.

    Raises: TypeError, ValueError for anything else.
    """
    if isinstance(label, list | tuple):
        label = [EVERY_ROW if v is None else v for v in label]
    labels = torch.as_tensor(label, device=data.device)
    if labels.is_floating_point() and labels.shape == (*batch, count_labels(data) or -1):
        total = labels.sum(-1)
        if not bool(((labels == 0) | (labels == 1)).all()) or bool((total > 1).any()):
            raise ValueError("expected label as integers, or one-hot with one 1 or none per query")
        return torch.where(total == 0, EVERY_ROW, labels.argmax(-1))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected label as integers, got {labels.dtype}")
    if labels.dim() and labels.shape != tuple(batch):
        raise ValueError(
            f"expected label as one integer or one per query {tuple(batch)}, got"
            f" {tuple(labels.shape)}"
        )
    return labels


def count_labels(data: TrainingSet) -> int:
    """1 more than the largest label; 0 without labels."""
    labels = data.labels
    return 0 if labels is None or labels.is_meta else max(0, int(labels.max()) + 1)


def _rows_of(data: TrainingSet, label: int) -> tuple[Tensor | slice, TrainingSet]:
    """Which rows have a label, and those rows; all for the null class."""
    labels = data.labels
    if label == EVERY_ROW and (labels is None or not bool((labels == label).any())):
        return slice(None), data
    return data.of_label(label)


# --- conditions ---------------------------------------------------------------------------------


def squares(conditions: Tensor, c: Tensor) -> Tensor:
    """|c - c_n|^2 [N] of conditions [N, K], by direct differences; twice differentiable in c, for
    which nothing of size N x K is kept but the conditions."""
    at = c.detach()
    exact = torch.cat([(part - at).square().sum(1) for part in chunks(conditions)])
    if not c.requires_grad:
        return exact
    moved = c - at  # 0, and has c's gradient
    along = torch.mv(conditions, moved) - (at * moved).sum()
    return exact - 2 * along + moved.square().sum()


def condition_bias(conditions: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """What a condition adds to each logit, -|c - c_n|^2 / (2 h^2), less the largest of them [N],
    and that largest one []. At h = 0 the limit: 0 where the row's condition is c, else -inf.

    Raises: ValueError at h = 0 where no row has the condition.
    """
    r2 = squares(conditions, c)
    least = r2.detach().argmin()
    over = r2 - r2[least]
    zero = h == 0
    if not traced(h, c) and bool(zero):
        if float(r2[least].detach()) > 0:
            raise ValueError(
                "at bandwidth 0 only rows with exactly the query's condition count, and no row has"
                f" it: the nearest is {math.sqrt(float(r2[least])):.3g} away; use a bandwidth > 0"
            )
        return torch.where(over == 0, 0.0, -torch.inf).to(r2.dtype), torch.zeros_like(h)
    width = torch.where(zero, 1.0, h)
    value = -0.5 * (over / width) / width
    # What is infinite has no weight and no derivative.
    far = torch.isinf(value.detach()) | (zero & (over > 0))
    value = -0.5 * (torch.where(far, 0.0, over) / width) / width
    shift = (-0.5 * (r2[least] / width) / width).clamp(min=LOWEST)
    return torch.where(far, -torch.inf, value), torch.where(zero, 0.0, shift)


def _checked_condition(
    wanted: Wanted, batch: Sequence[int], data: TrainingSet
) -> tuple[Tensor, Tensor] | None:
    """The condition [B, K] and the bandwidth [B], float64."""
    condition, bandwidth = wanted.condition, wanted.bandwidth
    if condition is None:
        if bandwidth is not None:
            raise ValueError("bandwidth is that of a condition: give condition= too")
        return None
    if data.conditions is None:
        raise ValueError(
            "this training set has no conditions: make it with conditions= [N, K], one for each row"
        )
    if bandwidth is None:
        raise ValueError("condition needs a bandwidth >= 0, in the units of the conditions")
    k = data.conditions.shape[1]
    c = torch.as_tensor(condition, device=data.device)
    if c.is_complex() or c.dtype == torch.bool:
        raise TypeError(f"expected condition as real numbers, got {c.dtype}")
    c = c.to(torch.float64)
    one = c.numel() == k and tuple(c.shape[:1]) != tuple(batch[:1])
    if k == 1 and tuple(c.shape) == tuple(batch):
        c = c[..., None]
    elif one or tuple(c.shape[: len(batch)]) != tuple(batch):
        c = c.reshape(-1) if c.numel() == k else c
        if c.shape != (k,):
            raise ValueError(
                f"expected condition [{k}] or one per query {[*batch, k]}, got"
                f" {list(torch.as_tensor(condition).shape)}"
            )
        c = c.expand(*batch, k)
    c = c.reshape(*batch, -1)
    if c.shape[-1] != k:
        raise ValueError(f"expected condition of {k} numbers, as the rows', got {c.shape[-1]}")
    h = broadcastable("bandwidth", bandwidth, batch, data.device).expand(tuple(batch))
    if not traced(c, h):
        if not bool(torch.isfinite(c).all()):
            raise ValueError("expected a finite condition, got NaN or inf")
        good = (h >= 0) & (h < math.inf)
        if not bool(good.all()):
            raise ValueError(f"expected bandwidth finite and >= 0, got {float(h[~good][0])}")
    return c.reshape(-1, k), h.reshape(-1)


def _checked_left_out(
    leave_out: int | Tensor | None, batch: Sequence[int], data: TrainingSet
) -> Tensor | None:
    """The number of the row that each query leaves out [B] int64, -1 for none."""
    if leave_out is None:
        return None
    found = torch.as_tensor(leave_out, device=data.device)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"expected leave_out as row numbers (integers), got {found.dtype}")
    if found.dim() and tuple(found.shape) != tuple(batch):
        got = tuple(found.shape)
        raise ValueError(
            f"expected leave_out as one row or one per query {tuple(batch)}, got {got}"
        )
    if found.numel() and not -1 <= int(found.min()) <= int(found.max()) < data.n:
        raise ValueError(
            f"expected leave_out in 0..{data.n - 1}, or -1 for none, got"
            f" {int(found.min())}..{int(found.max())}"
        )
    return found.to(torch.int64).expand(tuple(batch)).reshape(-1)


# --- groups -------------------------------------------------------------------------------------


def groups(data: TrainingSet, batch: Sequence[int], wanted: Wanted) -> list[Group]:
    """The queries of a flat batch by what they ask for, in ascending order of that.

    A gradient for condition or bandwidth, and a transform or compiler, which has no values to
    compare, give each query a group of its own.

    Raises: TypeError, ValueError for what does not fit; RuntimeError on the meta device.
    """
    if data.rows.is_meta:
        raise RuntimeError(
            "labels and conditions choose rows by their values, and rows on the meta device have"
            " none: load a state first, or leave them out"
        )
    b = math.prod(batch)
    labels = None if wanted.label is None else label_numbers(wanted.label, batch, data)
    given, left_out = _checked_condition(wanted, batch, data), None
    left_out = _checked_left_out(wanted.leave_out, batch, data)
    keys = []
    if labels is not None:
        keys.append(labels.expand(tuple(batch)).reshape(-1, 1).to(torch.float64))
    if left_out is not None:
        keys.append(left_out[:, None].to(torch.float64))
    apart = False
    if given is not None:
        keys += [given[0], given[1][:, None]]
        apart = traced(*given) or any(v.requires_grad for v in given)
    if b == 0:
        return []
    whole = torch.arange(b, device=data.device)
    if apart or b == 1:
        members = list(whole.split(1))
    else:
        _, which = torch.unique(torch.cat(keys, 1), dim=0, return_inverse=True)
        order = torch.argsort(which, stable=True)
        members = list(order.split(torch.bincount(which).tolist()))
    found = []
    for at in members:
        first = int(at[0])
        index: Tensor | slice = slice(None)
        rows, bias, shift = data, None, None
        if labels is not None:
            one = labels if labels.dim() == 0 else labels.reshape(-1)[first]
            index, rows = _rows_of(data, int(one))
        if given is not None:
            assert rows.conditions is not None
            bias, shift = condition_bias(rows.conditions, given[0][first], given[1][first])
        if left_out is not None and int(left_out[first]) >= 0:
            bias = _without(int(left_out[first]), index, rows.n, bias, data)
        found.append(Group(at, rows, index, bias, shift))
    return found


def _without(
    row: int, index: Tensor | slice, n: int, bias: Tensor | None, data: TrainingSet
) -> Tensor | None:
    """The bias of the n rows at `index`, without one of all rows."""
    place = row
    if isinstance(index, Tensor):
        hit = (index == row).nonzero()
        if not len(hit):
            return bias  # a row of another label, which these queries do not see
        place = int(hit[0, 0])
    if n == 1:
        raise ValueError(f"row {row} is the only one that its query could see, and is left out")
    out = torch.zeros(n, dtype=torch.float64, device=data.device) if bias is None else bias.clone()
    out[place] = -torch.inf
    return out


def posterior(
    call: Callable[..., Posterior],
    x: Tensor,
    data: TrainingSet | Tensor,
    numbers: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    wanted: Wanted,
) -> Posterior:
    """The posterior of queries x [*batch, *shape], over the rows that each asks for.

    call: (x [b, *shape], data, sigma, alpha, temperature, bias) -> their posterior. numbers: sigma,
    alpha, temperature [*batch].
    """
    if not isinstance(data, TrainingSet):
        if data.requires_grad:
            raise ValueError("leave_out has no gradient for rows: pass rows.detach()")
        data = TrainingSet(data, check=False)
    batch = numbers[0].shape
    flat, each = x.reshape(-1, *data.shape), [v.reshape(-1) for v in numbers]
    found = groups(data, batch, wanted)
    if not found:  # no queries
        return call(flat, data, *each, bias)
    parts = []
    for group in found:
        at = group.at
        part = call(flat[at], group.data, *(v[at] for v in each), group.total_bias(bias))
        parts.append(part if group.shift is None else shifted(part, group.shift))
    back = torch.argsort(torch.cat([group.at for group in found]))
    return replace(joined(parts, back, batch), x=x)


def shifted(found: Posterior, shift: Tensor) -> Posterior:
    """The posterior where `shift` is added to every logit and bias."""
    return replace(
        found,
        log_z=found.log_z + shift,
        mean_logit=found.mean_logit + shift,
        mean_bias=found.mean_bias + shift,
        log_weight_total=found.log_weight_total + shift,
    )


PER_QUERY = (
    "x",
    "mean",
    "log_z",
    "mean_logit",
    "mean_bias",
    "weight_sq",
    "sigma",
    "alpha",
    "temperature",
)


def joined(parts: list[Posterior], back: Tensor, batch: Sequence[int], axis: int = 0) -> Posterior:
    """The posteriors of parts of the queries as one.

    back: [B], where each query is among the parts', one after the other. batch: the shape that the
    queries get. axis: that of the queries, where there are axes before it. n is that of the part
    with the most rows.
    """

    def join(values: list[Any]) -> Tensor:
        every = torch.cat(values, axis).index_select(axis, back)
        return every.reshape(*every.shape[:axis], *batch, *every.shape[axis + 1 :])

    bounds = [p.certificate for p in parts if p.certificate is not None]
    certificate = None
    if bounds:
        names = [field.name for field in fields(Certificate)]
        certificate = Certificate(**{v: join([getattr(c, v) for c in bounds]) for v in names})
    per_query: dict[str, Any] = {v: join([getattr(p, v) for p in parts]) for v in PER_QUERY}
    return replace(
        parts[0],
        n=max(part.n for part in parts),
        certificate=certificate,
        log_weight_total=join([torch.zeros_like(p.sigma) + p.log_weight_total for p in parts]),
        **per_query,
    )
