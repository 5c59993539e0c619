"""The state that every backend leaves of a part of the rows: right by itself, and joined with those
of the other parts, at every sigma."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from memokern import calls
from memokern.calls import Query, Rows, State, Sums
from tests import cases, compare, harness, oracle
from tests.cases import F32, F64, Case, normal, query_of
from tests.harness import INSTALLED, every_backend, over, sized


def _state(backend: str, query: Query, rows: Rows) -> State:
    """Settled, as the operation gives it."""
    return oracle.settled(harness.posterior_state(backend, query, rows), query)


def _in_parts(backend: str, query: Query, rows: Rows, sizes: list[int]) -> list[State]:
    """Of these many rows each; a bias, conditions and the row left out go with their rows."""
    states, first = [], 0
    for size in sizes:
        at = slice(first, first + size)
        bias = None if query.bias is None else query.bias[at]
        mine = query._replace(bias=bias)
        part = rows._replace(data=rows.data[at], center=None, sq_norms=None)
        if query.own_bias:
            part = part._replace(conditions=rows.conditions[at])
            here = (query.leave_out >= first) & (query.leave_out < first + size)
            mine = mine._replace(leave_out=torch.where(here, query.leave_out - first, -1))
        states.append(_state(backend, mine, part))
        first += size
    return states


def _check(backend: str, state: State, query: Query, rows: Rows, want: Sums, what: object) -> None:
    got = calls.to_sums(state, query)
    compare.sums(got, want, query, rows, compare.unit(backend, query, rows), what)


@functools.lru_cache(maxsize=64)
def _largest(case: Case) -> torch.Tensor:
    query, rows, _ = cases.answered(case)
    return oracle.state(query, rows, torch.zeros(case.d, dtype=F64)).m


@over(cases.states, "group")
@pytest.mark.one_of(2)
def test_normalised_it_is_the_posterior(backend: str, group: list[Case]) -> None:
    for case in group:
        query, rows, want = cases.answered(case)
        state = harness.posterior_state(backend, query, rows)
        _check(backend, state, query, rows, want, str(case))
        assert all(v.dtype == F64 and v.shape == (case.b,) for v in state[:6])
        assert state.acc.shape == (case.b, case.d) and state.center.dtype == F64
        # The definition of its fields: the largest exponent, and sums relative to it.
        assert bool((state.s >= 1 - 1e-5).all()) and bool((state.s <= rows.n * (1 + 1e-5)).all())
        assert bool((state.key == (0 if case.weighting == "gaussian" else 1)).all())
        m = _largest(case)
        assert bool(((state.m - m).abs() <= 1e-4 * (1 + m.abs())).all()), str(case)


@over(cases.states, "group", backends=INSTALLED)
@pytest.mark.one_of(3)
def test_parts_join_to_the_whole(backend: str, group: list[Case]) -> None:
    """One row, the others in two parts of different size; their centers differ."""
    for case in group:
        query, rows, want = cases.answered(case)
        cut = case.n // 3 + 1
        states = _in_parts(backend, query, rows, [1, cut, case.n - cut - 1])
        joined = functools.reduce(calls.merge, states)
        _check(backend, joined, query, rows, want, str(case))
        joined = functools.reduce(calls.merge, states[::-1])
        _check(backend, joined, query, rows, want, str(case))


@pytest.mark.parametrize("sigma", [0.0, 1e-200, 1e-30])
@over(sized((3, 60, 2), (3, 60, 40), triton=((3, 40, 3), (3, 40, 300))), "b", "n", "d")
def test_the_nearest_row_of_all_parts_takes_all(
    backend: str, b: int, n: int, d: int, sigma: float
) -> None:
    """Ties over the boundary share, a hit in one part has all, a part that is left out nothing."""
    data = normal(n, d, dtype=F32)
    data[n - 5] = data[3]
    x = data[:b] + 1e-3 * normal(b, d, seed=1, dtype=F32)
    x[0] = data[3]
    bias = torch.zeros(n, dtype=F64)
    if sigma != 1e-30:  # which the reference loses beside a logit of 1e50
        bias[n - 5] = math.log(3)
    bias[5:10] = -math.inf
    query, rows = query_of(x, sigma, bias=bias), Rows(data)
    states = _in_parts(backend, query, rows, [5, 5, n - 10])
    empty = states[1]
    assert bool((empty.key == math.inf).all()) and bool((empty.m == -math.inf).all())
    assert all(not v.any() for v in (*empty[2:6], empty.acc, empty.residual))
    want = oracle.sums(query, rows)
    for some in (states, states[::-1]):
        got = calls.to_sums(functools.reduce(calls.merge, some), query)
        compare.close(got, cases.narrow(want), 1e-6, 1e-6)
    assert got.weight_sq[0].item() == pytest.approx(0.5 if sigma == 1e-30 else 0.25**2 + 0.75**2)
    alone = calls.to_sums(empty, query)
    assert bool((alone.log_z == -math.inf).all()) and alone.mean.isnan().all()


@every_backend
def test_exact_hits_of_the_log_weighting(backend: str) -> None:
    """Only parts that are hit count."""
    data = normal(20, 3, dtype=F32)
    data[15] = data[2]
    x = torch.cat([data[2:3], data[4:5] + 0.1])
    query = query_of(x, 1.0, 1.0, 1.3, normal(20, seed=1), "log")
    states = _in_parts(backend, query, Rows(data), [6, 8, 6])
    keys = torch.stack([s.key for s in states])
    assert keys.tolist() == [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    got = calls.to_sums(functools.reduce(calls.merge, states), query)
    want = oracle.sums(query, Rows(data))
    assert got.log_z[0] == got.mean_logit[0] == math.inf
    compare.close(got, cases.narrow(want), 1e-4, 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@every_backend
def test_a_lost_query_stays_lost(backend: str, sigma: float, value: float) -> None:
    query, rows = Case(3, 20, 5).problem()
    query = query._replace(sigma=query.sigma * 0 + sigma)
    clean = _in_parts(backend, query, rows, [8, 12])
    query.x[1, 2] = value
    states = _in_parts(backend, query, rows, [8, 12])
    for state in (*states, calls.merge(*states)):
        assert state.key[1] == 0 and state.m[1] == 0
        assert all(v[1].isnan().all() for v in (*state[2:6], state.acc, state.residual))
    keep = torch.tensor([0, 2])
    joined, want = calls.merge(*states), calls.merge(*clean)
    for a, e in zip(joined[:8], want[:8], strict=True):
        assert torch.equal(a[keep], e[keep])


@every_backend
def test_no_queries_and_one_row(backend: str) -> None:
    rows = Rows(normal(1, 3, dtype=F32))
    state = _state(backend, query_of(torch.zeros(0, 3), 0.5), rows)
    assert state.acc.shape == (0, 3) and all(v.shape == (0,) for v in state[:6])
    query = query_of(normal(2, 3, dtype=F32), 0.5)
    state = _state(backend, query, rows)
    torch.testing.assert_close(state.s, torch.ones(2, dtype=F64), rtol=1e-6, atol=0)
    got = calls.to_sums(state, query).mean
    torch.testing.assert_close(got, rows.data.expand(2, 3), rtol=1e-6, atol=1e-6)


@over(sized((4, 5), triton=((1, 5), (1, 300))), "b", "d")
def test_far_offsets(backend: str, b: int, d: int) -> None:
    query, rows = Case(b, 4, d, torch.uint8, sigma=0.5).problem()
    apart = cases.far_apart(rows, harness.device_of(backend))
    compare.equal(_state(backend, query, apart), _state(backend, query, rows))
