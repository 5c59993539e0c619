"""What sweeps and lists of rows cost on this machine, measured once for each kind of call."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Query, RowLists, Rows
from memokern.util import env

# Numbers of queries for which a sweep is timed.
QUERIES = (1, 4, 16, 64)
# Numbers in the rows that are timed.
ELEMENTS = 1 << 22
# Seconds after which timing ends, and the most turns.
ENOUGH, MOST_TURNS = 0.15, 12


class Costs(NamedTuple):
    """Seconds on this machine: of a sweep, N D (row + B query); of M listed rows, M D listed; of
    any call of an operation, call.

    A sweep's time is no straight line: a line is that of calls with a certain number of queries.
    """

    row: float
    query: float
    listed: float
    call: float

    def dense(self, b: int, n: int, dim: int) -> float:
        """The dense sweep's time for b queries."""
        return n * dim * (self.row + b * self.query)


class Timed(NamedTuple):
    """What was timed: sweeps of as many queries as :data:`QUERIES` says, for each number of the
    rows; listed and call as in :class:`Costs`."""

    sweeps: tuple[float, ...]
    listed: float
    call: float

    def sweep(self, b: int) -> float:
        """A sweep of b queries, between two that were timed, or beyond the last as from it on."""
        last = next((i for i, size in enumerate(QUERIES) if size >= b), len(QUERIES) - 1)
        last = max(1, last)
        low, high = QUERIES[last - 1], QUERIES[last]
        first = self.sweeps[last - 1]
        return first + (self.sweeps[last] - first) * (b - low) / (high - low)

    def costs(self, b: int) -> Costs:
        """For calls of b queries: what a sweep of one costs is right, and what one of all does."""
        most = max(b, QUERIES[1])
        one, all_of_them = self.sweep(1), self.sweep(most)
        # Differences of timings: never below a hundredth of what they are differences of.
        query = max(all_of_them - one, 0.01 * all_of_them) / (most - 1)
        return Costs(max(one - query, 0.0), query, self.listed, self.call)


@functools.lru_cache(maxsize=256)
def _costs(b: int, *key: Any) -> Costs:
    return _measured(*key).costs(b)


@functools.cache
def _measured(
    device: torch.device,
    rows_dtype: torch.dtype,
    dtype: torch.dtype,
    dim: int,
    threads: int,
    backend: str,
) -> Timed:
    """Timings of such rows and queries; threads are for the cache."""
    elements = ELEMENTS >> 6 if backend == "reference" else ELEMENTS  # it would take a minute
    return _sample(str(device), rows_dtype, dtype, dim, elements)


@torch.no_grad()
def _sample(
    device: str, rows_dtype: torch.dtype, dtype: torch.dtype, dim: int, elements: int
) -> Timed:
    """Sweeps of synthetic rows of so many numbers, and lists of them, timed."""
    b, n, count = QUERIES[-1], max(64, elements // dim), 64
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(n, dim, generator=g, device="cpu") * 255).to(rows_dtype).to(device)
    x = torch.rand(b, dim, generator=g, device="cpu").to(device, dtype)
    ones = torch.ones(b, dtype=torch.float64, device=device)
    # As where pruning is worth a thought: of all rows few have weight, but those of a list do.
    # |x - y|^2 is spread by some 20,000 sqrt(D), and sigma^2 is a hundredth of it, or all.
    spread = 20_000 * dim**0.5
    many = Query(x, (spread / 100) ** 0.5 * ones, ones, ones)
    some = [many.take(torch.arange(size, device=device)) for size in QUERIES]
    noisy = many._replace(sigma=spread**0.5 * ones)
    one = noisy.take(torch.arange(1, device=device))
    norms = torch.linalg.vector_norm(rows.to(torch.float64), dim=1).square()
    data = Rows(rows, center=ones.new_zeros(dim), sq_norms=norms)
    listed = torch.randint(n, (b * count,), generator=g, device="cpu").sort().values.to(device)
    start = torch.arange(0, b * count + 1, count, device=device)
    wait = _waiting(device)
    (call,) = _seconds(
        [lambda: ops.posterior_listed(one, data, RowLists(start[:2] // count, listed[:1]))], wait
    )
    sweeps = [functools.partial(ops.posterior, q, data) for q in some]
    lists, *swept = _seconds(
        [lambda: ops.posterior_listed(noisy, data, RowLists(start, listed)), *sweeps], wait
    )
    per_listed = max(lists - call, 0.01 * lists) / (b * count * dim)
    sweep = tuple(max(took - call, 0.01 * took) / (n * dim) for took in swept)
    return Timed(sweep, per_listed, call)


def _waiting(device: str) -> Callable[[], None]:
    """Waits for what a device was given to do."""
    if device == "cpu":
        return lambda: None
    return functools.partial(torch.accelerator.synchronize, torch.device(device))


def _seconds(calls: list[Callable[[], object]], wait: Callable[[], None]) -> list[float]:
    """The shortest of a few runs of each, after a first one, each waited for: a GPU's work goes on
    after the call. They take turns, so that what disturbs the machine for a while disturbs all."""
    best, spent = [math.inf] * len(calls), 0.0
    for turn in range(1 + MOST_TURNS):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            wait()
            took = time.perf_counter() - began
            if turn > 0:
                best[i], spent = min(best[i], took), spent + took
        if spent > ENOUGH:
            break
    return best


def costs_of(x: Tensor, rows: Tensor) -> Costs:
    """What sweeps of these queries and lists cost here, measured at the first call for such rows
    and queries."""
    return _costs(
        len(x), x.device, rows.dtype, x.dtype, rows.shape[1], torch.get_num_threads(), env.backend()
    )
