"""What sweeps and lists of rows cost on this machine, measured once for each kind of call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Query, RowLists, Rows
from memokern.util import env


class Costs(NamedTuple):
    """Seconds on this machine: of a sweep, N D (row + B query); of M listed rows, M D listed; of
    any call of an operation, call."""

    row: float
    query: float
    listed: float
    call: float

    def dense(self, b: int, n: int, dim: int) -> float:
        """The dense sweep's time for b queries."""
        return n * dim * (self.row + b * self.query)


@functools.cache
def _measured(
    device: str, rows_dtype: torch.dtype, dtype: torch.dtype, dim: int, threads: int, backend: str
) -> Costs:
    """The costs of such rows and queries; threads and backend are for the cache."""
    costs = _sample(device, rows_dtype, dtype, dim, 1 << 17)
    if costs.dense(1, 1 << 22, 1) < 0.05:  # no time at all: as many as in earnest, then
        costs = _sample(device, rows_dtype, dtype, dim, 1 << 22)
    return costs


@torch.no_grad()
def _sample(
    device: str, rows_dtype: torch.dtype, dtype: torch.dtype, dim: int, elements: int
) -> Costs:
    """Sweeps of synthetic rows of so many numbers, and lists of them, timed."""
    b, n, count = 64, max(64, elements // dim), 64
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(n, dim, generator=g, device="cpu") * 255).to(rows_dtype).to(device)
    x = torch.rand(b, dim, generator=g, device="cpu").to(device, dtype)
    ones = torch.ones(b, dtype=torch.float64, device=device)
    # As where pruning is worth a thought: few rows have weight. |x - y|^2 is spread by some 20,000
    # sqrt(D), and sigma^2 is a hundredth of it.
    many = Query(x, (200 * dim**0.5) ** 0.5 * ones, ones, ones)
    one = many.take(torch.zeros(1, dtype=torch.int64, device=device))
    norms = torch.linalg.vector_norm(rows.to(torch.float64), dim=1).square()
    data = Rows(rows, center=ones.new_zeros(dim), sq_norms=norms)
    listed = torch.randint(n, (b * count,), generator=g, device="cpu").sort().values.to(device)
    start = torch.arange(0, b * count + 1, count, device=device)
    wait = _waiting(device)
    dense_one = _seconds(lambda: ops.posterior(one, data), wait)
    dense_many = _seconds(lambda: ops.posterior(many, data), wait)
    call = _seconds(
        lambda: ops.posterior_listed(one, data, RowLists(start[:2] // count, listed[:1])), wait
    )
    lists = _seconds(lambda: ops.posterior_listed(many, data, RowLists(start, listed)), wait)
    # Differences of timings: never below a hundredth of what they are differences of.
    query = max(dense_many - dense_one, 0.01 * dense_many) / (b - 1)
    row = max(dense_one - call - query, 0.0)
    per_listed = max(lists - call, 0.01 * lists) / (b * count * dim)
    return Costs(row / (n * dim), query / (n * dim), per_listed, call)


def _waiting(device: str) -> Callable[[], None]:
    """Waits for what a device was given to do."""
    if device == "cpu":
        return lambda: None
    return functools.partial(torch.accelerator.synchronize, torch.device(device))


def _seconds(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """The shortest of a few runs after a first one, each waited for: a GPU's work goes on after the
    call."""
    call()
    wait()
    best, spent = float("inf"), 0.0
    for _ in range(5):
        began = time.perf_counter()
        call()
        wait()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
        if spent > 0.05:
            break
    return best


def costs_of(x: Tensor, rows: Tensor) -> Costs:
    """What sweeps and lists cost here, measured at the first call for such rows and queries."""
    return _measured(
        str(x.device), rows.dtype, x.dtype, rows.shape[1], torch.get_num_threads(), env.backend()
    )
