"""Ctrl-C, and what other signals raise, ends a call that takes long.

Python runs the handler of a signal when its main thread comes back to the interpreter. A timer
counts how often that is: twice within one call only if the kernel lets it happen on the way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import memokern
from memokern import ops
from memokern.calls import BasicSums, Query, RowLists, Rows, Sums
from tests.harness import backend_of

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers"),
    pytest.mark.skipif(
        backend_of("cpu").unavailable() is not None, reason="there are no compiled kernels"
    ),
]
F64 = torch.float64
COLUMNS = ("sigma", "alpha", "temperature")


class Stopped(BaseException):
    """As KeyboardInterrupt, it is no Exception."""


@pytest.fixture
def at_second_signal() -> Iterator[None]:
    """Raises Stopped when the timer's handler runs for the second time."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled in the main thread")
    count = 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise Stopped

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def rows() -> Rows:
    y = torch.rand(3000, 8192, generator=torch.Generator().manual_seed(0))
    return Rows(y, center=torch.full((8192,), 0.5, dtype=F64), sq_norms=y.sub(0.5).square().sum(1))


def _query(rows: Rows) -> Query:
    columns = [torch.full((rows.n,), v, dtype=F64) for v in (10.0, 1.0, 1.0)]
    return Query(rows.data, *columns)


def _sums(query: Query) -> BasicSums:
    return BasicSums(query.x, *(torch.ones_like(query.sigma) for _ in range(4)))


def _listed(rows: Rows) -> None:
    lists = RowLists(torch.arange(rows.n + 1) * 300, torch.arange(300).repeat(rows.n))
    backend_of("cpu").posterior_listed(_query(rows), rows, lists)


def _listed_backward(rows: Rows) -> None:
    lists = RowLists(torch.arange(rows.n + 1) * 100, torch.arange(100).repeat(rows.n))
    query = _query(rows)
    backend_of("cpu").posterior_listed_backward(query, rows, lists, _sums(query), _sums(query))


def _few_features(_: Rows) -> None:
    y = torch.rand(40_000, 2)
    memokern.posterior(y, y, 1.0)


def _gradient(rows: Rows) -> None:
    x = rows.data[:1].clone().requires_grad_()
    held = rows._replace(data=rows.data.half())
    many = x.expand(rows.n, -1)
    one = torch.ones(rows.n, dtype=F64)
    sums = ops.posterior(Query(many, 10 * one, one, one), held)
    sums.log_z.sum().backward()


CALLS: dict[str, Callable[[Rows], object]] = {
    "posterior": lambda rows: backend_of("cpu").posterior(_query(rows), rows),
    "few features": _few_features,
    "nearest": lambda rows: backend_of("cpu").nearest(rows.data, rows, 50),
    "listed": _listed,
    "listed_backward": _listed_backward,
    "backward": lambda rows: backend_of("cpu").posterior_backward(
        _query(rows), rows, _sums(_query(rows)), _sums(_query(rows))
    ),
    "through PyTorch": _gradient,
    "reference": lambda rows: backend_of("reference").nearest(rows.data[:30], rows, 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_signal_ends_a_call_on_its_way(name: str, rows: Rows, at_second_signal: None) -> None:
    with pytest.raises(Stopped):
        CALLS[name](rows)


def test_a_handler_that_returns_changes_nothing(rows: Rows) -> None:
    """Signals are handled on the way, and the result is that of an undisturbed call. A call of
    another thread handles none."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled in the main thread")
    query = _query(rows)._replace(x=rows.data[:500].clone())
    query = query._replace(**{name: getattr(query, name)[:500] for name in COLUMNS})
    found: list[Sums] = []
    count = 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1

    def sweep() -> None:
        found.append(backend_of("cpu").posterior(query, rows))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    sweep()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert count >= 2
    thread = threading.Thread(target=sweep)
    thread.start()
    thread.join()
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
