"""Queries of training sets that no process holds in memory as a whole: which strategy answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from memokern import ops
from memokern.calls import Query, Rows, State, Sums, by_key, rescaled, to_sums
from memokern.data.parted import PartedSet
from memokern.data.sharded import ShardedSet
from memokern.data.streamed import StreamedSet
from memokern.data.training_set import TrainingSet
from memokern.strategies import costs, dense, local, pruned_nearest, sharded, streamed, units
from memokern.strategies.certificate import Certificate, Dropped, certify_parts
from memokern.strategies.local import How
from memokern.util.ranks import checksum
from memokern.util.stack import Stack
from memokern.validate import log_total

T = TypeVar("T")


def together(data: PartedSet, operation: str, check: Callable[[], T]) -> T:
    """What `check` gives; where it raises on one rank, the others raise in the same call."""
    if is_compiling() and isinstance(data, ShardedSet):  # whose messages no graph can hold
        raise RuntimeError(sharded.UNTRANSFORMED)
    try:
        return check()
    except Exception as error:
        if isinstance(data, ShardedSet):
            data.ranks.refuse(operation, error)
        raise


def is_split(data: PartedSet) -> bool:
    """Whether each rank has queries of its own."""
    return isinstance(data, ShardedSet) and data.queries == "split"


def compare(data: PartedSet, given: dict[str, Tensor | None]) -> None:
    """ValueError on every rank unless all were given the same; of split queries, as much of it."""
    if isinstance(data, ShardedSet):
        told: dict[str, Any] = {name: checksum(value) for name, value in given.items()}
        if is_split(data):
            told = {name: value is not None for name, value in given.items()}
        data.ranks.agree("what queries ask for", told)


def labels_of_all(data: PartedSet, labels: Tensor) -> list[int]:
    """The labels that queries of any rank ask for, ascending."""
    assert isinstance(data, ShardedSet)
    layout = sharded.layout_of(data, len(labels), "label")
    found: list[int] = layout.gathered([labels])[0].unique().tolist()
    return found


def numbers_within(
    rows: Tensor, index: Tensor | slice, chosen: ShardedSet, data: TrainingSet
) -> Tensor:
    """The numbers in a subset of rows that have these numbers in the whole; -1 for others, and for
    -1. index: which of the rows here are in the subset."""
    if isinstance(index, slice):
        return rows
    assert isinstance(data, ShardedSet)
    layout = sharded.layout_of(data, len(rows), "leave_out")
    place = data.local_numbers(layout.gathered([rows])[0])
    found = torch.zeros_like(place)
    if len(index):
        at = torch.searchsorted(index, place.contiguous()).clamp(max=len(index) - 1)
        found = torch.where((index[at] == place) & (place >= 0), at + chosen.first + 1, 0)
    return data.ranks.sum([found], "leave_out")[0][layout.own] - 1


def state(query: Query, data: PartedSet, how: How, operation: str = "posterior") -> State:
    """The state of queries over all rows; the query's bias is that of the rows here."""
    if isinstance(data, ShardedSet):
        how = how._replace(radius=data.radius)
        told = {"method": how.method, "tol": how.tol, "certificate": how.dropped is not None}
        asked = sharded.ask(operation, query, data, **told)
        return sharded.state(query, data, asked, lambda part: _of_part(part, data, how))
    return _here(query, data, how)


def _of_part(query: Query, data: ShardedSet, how: How) -> State:
    if not data.n_here:
        how.note(Dropped.none(query.sigma, 0))
        return local.no_state(query, data.as_rows())
    return _here(query, data.part, how)


def certificate(
    query: Query, sums: Sums, data: PartedSet, dropped: Sequence[Dropped]
) -> Certificate:
    """What the rows that were left out, of all parts, may have contributed; of sums [B] of this
    rank's queries. dropped: what was noted here, block by block of the queries of all ranks."""
    columns = [torch.cat(v) for v in zip(*dropped, strict=True)]
    mine = torch.stack(columns)
    if not isinstance(data, ShardedSet):
        index = data.index
        radius = 0.0 if index is None else index.y_max
        center = data.center64 if index is None else index.center.to(torch.float64)
        return certify_parts(query, sums, Dropped(*mine[:, None]), center, radius)
    own = sharded.layout_of(data, len(query.x), "certificate").own
    every = data.ranks.gather(mine, "certificate")[:, :, own]
    radius = data.radius or 0.0
    return certify_parts(query, sums, Dropped(*every.unbind(1)), data.center64, radius)


def _here(query: Query, data: TrainingSet | None, how: How) -> State:
    """The state over the rows of this process."""
    assert data is not None
    return local.state(query, data, how)


def total(bias: Tensor | None, data: PartedSet) -> Tensor | float:
    """log sum exp of the biases of all rows."""
    if isinstance(data, ShardedSet):
        return sharded.log_total(bias, data)
    return log_total(bias, data.n)


def own_total(query: Query, data: PartedSet) -> Tensor:
    """log sum exp of each query's own biases [B]: log_z of a sweep that sees no distance, over rows
    of one number, which all are 0."""
    one = torch.ones_like(query.sigma)
    nowhere = query._replace(
        x=torch.zeros_like(one)[:, None], sigma=one, alpha=one, temperature=one,
        weighting="gaussian",
    )  # fmt: skip
    rows = Rows(one.new_zeros(1, 1).expand(data.n_here, 1), conditions=data.conditions)

    def sweep(query: Query) -> State:
        return ops.posterior_state(query, rows) if rows.n else local.no_state(query, rows)

    if isinstance(data, ShardedSet):
        asked = sharded.ask("own weights", nowhere, data)
        return to_sums(sharded.state(nowhere, data, asked, sweep), nowhere).log_z
    return to_sums(sweep(nowhere), nowhere).log_z


def nearest(
    x: Tensor, data: PartedSet, k: int, method: str, unit: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The k smallest squared distances [B, k] and the rows' numbers, of queries and rows that are
    multiplied by a unit; x is."""

    def here(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        part = data.part if isinstance(data, ShardedSet) else data
        return _nearest_here(x, part, k, method, unit)

    if isinstance(data, ShardedSet):
        return sharded.nearest(x, data, k, here)
    return here(x, k)


def distances(
    x: Tensor, data: PartedSet, sq: Tensor, row: Tensor, k: int, method: str
) -> tuple[Tensor, Tensor]:
    """What `nearest` found as distances, and the rows; see :func:`.units.distances`."""

    def search(x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        return nearest(x, data, k, method, unit)

    if not isinstance(data, ShardedSet):
        return units.distances(x, data.as_rows(), sq, row, search)
    ranks = data.ranks

    def anywhere(flags: Tensor) -> Tensor:
        return ranks.gather(flags.to(torch.uint8), "nearest").any(0)

    return units.distances(x, data.as_rows(), sq, row, search, anywhere)


def _nearest_here(
    x: Tensor, data: TrainingSet | None, k: int, method: str, unit: float
) -> tuple[Tensor, Tensor]:
    assert data is not None
    rows, index = data.as_rows(), None if method == "dense" else data.index
    if unit != 1:  # of few queries
        rows, index = rows.in_units(unit), None
    if not isinstance(data, StreamedSet):
        if index is None:
            return ops.nearest(x, rows, k)
        measured = costs.costs_of(x, rows.data) if method == "auto" else None
        return pruned_nearest.nearest(x, rows, index, k, measured)
    source = data
    if index is None:
        return streamed.nearest(x, source, k, unit=unit)
    measured = costs.costs_of(x, rows.data) if method == "auto" else None
    if not source.in_file or streamed.reads_most(x, source, k, index):
        return streamed.nearest(x, source, k, index, measured)
    reading = pruned_nearest.Reading(source.stored, lambda: streamed.some_rows(source))
    return pruned_nearest.nearest(
        x, rows, index, k, measured, lambda x: streamed.nearest(x, source, k), reading
    )


def nearest_conditions(c: Tensor, data: PartedSet) -> tuple[Tensor, Tensor]:
    """The squared distance [B] of each condition to the nearest of all rows', and that one
    [B, K]."""
    conditions = data.conditions
    assert conditions is not None
    rows = Rows(conditions)
    if not isinstance(data, ShardedSet):
        sq, at = ops.nearest(c, rows, 1)
        return sq[:, 0], conditions[at[:, 0]]
    sq, at = sharded.nearest(c, data, 1, lambda c, k: ops.nearest(c, rows, k))
    layout = sharded.layout_of(data, len(c), "nearest")
    place = data.local_numbers(layout.gathered([at[:, 0]])[0])
    found = c.new_zeros((len(place), c.shape[1]))
    here = place >= 0
    found[here] = conditions[place[here]]
    return sq[:, 0], data.ranks.sum([found], "nearest")[0][layout.own]


# --- by row -------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Some of the rows here. first: the number of the first among all; here: where they are among
    those here, which is where their biases are."""

    first: int
    here: slice
    rows: Rows

    def of(self, query: Query) -> Query:
        """The query with these rows' biases."""
        return query._replace(bias=None if query.bias is None else query.bias[self.here])


def pieces(data: PartedSet, size: int) -> Iterator[Piece]:
    """The rows here, cut where stretches of `size` of all rows end, and where chunks do; each has
    its values until the next is asked for."""
    part, first = (data.part, data.first) if isinstance(data, ShardedSet) else (data, 0)
    if isinstance(part, StreamedSet):
        for here, rows in part.chunks():
            yield from _cut(rows, first + here, here, size)
    elif part is not None:
        yield from _cut(part.as_rows(), first, 0, size)


def _cut(rows: Rows, first: int, here: int, size: int) -> Iterator[Piece]:
    """Rows whose first is `first` among all and `here` among those here."""
    start = 0
    while start < rows.n:
        end = min(rows.n, start + size - (first + start) % size)
        norms = None if rows.sq_norms is None else rows.sq_norms[start:end]
        part = rows._replace(data=rows.data[start:end], sq_norms=norms)
        yield Piece(first + start, slice(here + start, here + end), part)
        start = end


def weights(query: Query, data: PartedSet) -> Iterator[Tensor]:
    """softmax(l / T) [B, n] float64 of the rows here, piece by piece."""
    every = state(query, data, How(), "weights")
    for piece in pieces(data, max(1, data.n)):
        mine = piece.of(query)
        part = ops.posterior_state(mine, piece.rows)
        share = rescaled(part, every.key, every.m, by_key(query), part.center).s / every.s
        yield torch.where(share == 0, 0.0, share)[:, None] * dense.weights(mine, piece.rows)


def require_replicated(data: PartedSet, what: str) -> None:
    """ValueError where each rank has queries of its own."""
    if is_split(data):
        raise ValueError(
            f"{what} takes queries that all ranks share: shard(..., queries='replicated')"
        )


def row_weights(query: Query, data: PartedSet, block: int) -> Tensor:
    """sum_b w_bn [n] float64 of the rows here."""
    total = torch.zeros(data.n_here, dtype=torch.float64, device=query.x.device)
    zero = query.sigma == 0
    for at in zero.nonzero()[:, 0].split(max(1, block // data.n)):
        parts = [part.sum(0) for part in weights(query.take(at), data)]
        total += torch.cat(parts) if parts else 0.0
    rest = query.take((~zero).nonzero()[:, 0])
    if len(rest.x):
        with torch.enable_grad():
            b = torch.zeros_like(total) if rest.bias is None else rest.bias.clone()
            rest = rest._replace(bias=b.requires_grad_())
            log_z = to_sums(state(rest, data, How(), "row_weights"), rest).log_z
            total += torch.autograd.grad(log_z.sum(), b)[0]  # d log_z / d b_n is w_n
    return total


def draw(query: Query, data: PartedSet, u: Tensor, size: int) -> Tensor:
    """The number of a row for each query [B], by numbers u [B, 2] in (0, 1], of which the first
    chooses a stretch of `size` rows, the second a row in it."""
    ranks = None
    if isinstance(data, ShardedSet):
        ranks = data.ranks
        sent, _ = sharded.ask("draw", query, data)
        sent.result()
        u = ranks.gather(u, "draw")[0]  # those of the first rank
    own, found = list[int](), Stack(query.sigma.new_empty(2, len(query.x)), data.n_here // size + 2)
    for piece in pieces(data, size):
        own.append(piece.first)
        found.add(key_and_mass(piece.of(query), piece.rows))
    firsts, key, mass = _all_pieces(data, own, found.stacked().permute(1, 2, 0))
    gap = key - key.amin(1, keepdim=True)
    pull = torch.where(gap == 0, 0.0, gap * by_key(query)[:, None])
    share = torch.softmax(torch.where(torch.isinf(key), -torch.inf, mass - pull), 1)
    # Stretches of which two ranks have a piece count as one, as they do on one machine.
    stretch = torch.div(firsts, size, rounding_mode="floor")
    of_stretch = share.new_zeros(len(share), -(-data.n // size)).index_add(1, stretch, share)
    upto = of_stretch.cumsum(1)
    chosen = (upto < (u[:, 0] * upto[:, -1])[:, None]).sum(1).clamp(max=upto.shape[1] - 1)
    inside = torch.where(stretch == chosen[:, None], share, 0.0)
    upto = inside.cumsum(1)
    target = u[:, 1] * upto[:, -1]
    at = (upto < target[:, None]).sum(1).clamp(max=len(firsts) - 1)
    left = (target - (upto - inside).gather(1, at[:, None])[:, 0]) / share.gather(1, at[:, None])[
        :, 0
    ]
    row = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    first = firsts[at]
    for piece in pieces(data, size):
        mine = (first == piece.first).nonzero()[:, 0]
        if len(mine):
            within = dense.weights(piece.of(query.take(mine)), piece.rows).cumsum(1)
            place = (within < (left[mine] * within[:, -1])[:, None]).sum(1)
            row[mine] = piece.first + place.clamp(max=piece.rows.n - 1)
    return row if ranks is None else ranks.sum([row], "draw")[0]


def key_and_mass(query: Query, rows: Rows) -> Tensor:
    """The key of each query's state and the log of its mass [2, B]."""
    found = ops.posterior_state(query, rows)
    return torch.stack((found.key, torch.where(found.s > 0, found.m + found.s.log(), -torch.inf)))


def _all_pieces(data: PartedSet, own: list[int], mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pieces of all ranks begin [P], and their keys and log masses [B, P], of those here
    [2, B, P]."""
    device = mine.device
    if not isinstance(data, ShardedSet):
        return torch.tensor(own, device=device), mine[0], mine[1]
    counts = data.ranks.gather(torch.tensor([len(own)], device="cpu"), "draw")[:, 0].tolist()
    most = max(counts)
    firsts = torch.zeros(most, dtype=torch.int64, device="cpu")
    firsts[: len(own)] = torch.tensor(own, dtype=torch.int64, device="cpu")
    starts = data.ranks.gather(firsts, "draw")
    padded = torch.nn.functional.pad(mine, (0, most - mine.shape[2]))
    every = data.ranks.gather(padded, "draw")
    parts = [part[:, :, :count] for part, count in zip(every, counts, strict=True)]
    key, mass = torch.cat(parts, 2)
    begins = torch.cat([v[:count] for v, count in zip(starts, counts, strict=True)])
    return begins.to(device), key, mass
