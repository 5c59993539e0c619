"""The compiled sweep's State against the reference's, and parts of it joined against the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memokern.backends import protocol
from memokern.calls import WEIGHTINGS, Query, Rows, State, Sums, checks, merge, to_sums
from memokern.calls.checks import ROW_DTYPES
from tests import compare, oracle
from tests.cases import F32, F64, ROW_TYPES, U8, Case, name_of

_C = pytest.importorskip("memokern._C")
CPU, REFERENCE = protocol.get("cpu"), protocol.get("reference")

# Queries, rows, features: each takes another way through the kernels.
WAYS = {
    "direct": (3, 70, 40),
    "packed": (20, 70, 40),
    "grouped": (70, 300, 16),
    "few-features": (300, 90, 3),
    "one-feature": (40, 70, 1),
    "many-features": (9, 40, 700),
}
SIGMAS = (0.0, 1e-200, 1e-16, 0.02, 0.7, 30.0)


def state_of(query: Query, rows: Rows) -> State:
    """As :func:`memokern.ops.posterior_state` returns it."""
    return oracle.settled(CPU.posterior_state(query, rows), query)


def wanted(query: Query, rows: Rows) -> State:
    return oracle.settled(REFERENCE.posterior_state(query, rows), query)


def half(query: Query, rows: Rows, at: slice) -> tuple[Query, Rows]:
    """The same queries, over some of the rows."""
    bias = None if query.bias is None else query.bias[at].contiguous()
    norms = None if rows.sq_norms is None else rows.sq_norms[at]
    return query._replace(bias=bias), rows._replace(data=rows.data[at], sq_norms=norms)


def same(got: Sums, want: Sums, query: Query, rows: Rows) -> None:
    """The same where there is no number, and close to it where there is one."""
    kind = F64 if query.computes_in_float64(rows) else F32
    known, found = [], []
    for a, e in zip(got, want, strict=True):
        assert torch.equal(torch.isnan(a), torch.isnan(e))
        assert torch.equal(a[torch.isinf(a)].double(), e[torch.isinf(e)].double())
        known.append(torch.where(torch.isfinite(e), e, 0.0))
        found.append(torch.where(torch.isfinite(a), a, 0.0))
    compare.sums(Sums(*found), Sums(*known), query, rows, kind, None)


def check(query: Query, rows: Rows) -> None:
    state, want = state_of(query, rows), wanted(query, rows)
    compute = F64 if query.computes_in_float64(rows) else F32
    assert state.acc.dtype == compute and state.acc.shape == query.x.shape
    assert state.center.dtype == F64 and state.center.shape == (rows.dim,)
    assert all(v.dtype == F64 and v.shape == query.sigma.shape for v in state[:6])
    if rows.center is not None:
        assert torch.equal(state.center, rows.center.to(F64))
    torch.testing.assert_close(state.key, want.key, rtol=1e-12, atol=0)
    known = torch.isfinite(want.m)
    assert torch.equal(state.m[~known], want.m[~known])
    off = (state.m - want.m)[known].abs()
    assert (off <= compare.STATS[compute] * (1 + want.m[known].abs())).all()
    sums = to_sums(want, query)
    same(to_sums(state, query), sums, query, rows)
    same(CPU.posterior(query, rows), sums, query, rows)
    cut = rows.n // 3
    if cut:
        parts = [state_of(*half(query, rows, at)) for at in (slice(cut), slice(cut, None))]
        same(to_sums(merge(*parts), query), sums, query, rows)
        same(to_sums(merge(*reversed(parts)), query), sums, query, rows)


def with_hits(query: Query, rows: Rows) -> Query:
    """The same, of which the first query is a row that is there twice."""
    y = rows.values(slice(1))[0]
    rows.data[-1] = rows.data[0]
    x = query.x.clone()
    x[0] = (query.alpha[0] * y).to(x.dtype)
    return query._replace(x=x)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype", ROW_TYPES, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_of(8)
def test_state_of_gaussian_weights(way: str, dtype: torch.dtype, sigma: float) -> None:
    b, n, d = WAYS[way]
    for bias, temperature in ((None, 1.0), ("holes", 1.7)):
        if bias and sigma == 1e-16 and way == "one-feature":
            continue  # equal rows, whose bias is lost beside r^2 / sigma^2 in the reference
        case = Case(b, n, d, dtype, F64 if dtype == F64 else F32, max(sigma, 1e-3), 0.8)
        case = replace(case, bias=bias, temperature=temperature, known=bias is not None)
        query, rows = case.problem()
        check(query._replace(sigma=torch.full_like(query.sigma, sigma)), rows)


@pytest.mark.parametrize("dtype", ROW_TYPES, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_of(2)
def test_state_of_log_weights(way: str, dtype: torch.dtype) -> None:
    b, n, d = WAYS[way]
    for bias in (None, "normal"):
        case = Case(b, n, d, dtype, F64 if dtype == F64 else F32, bias=bias, weighting="log")
        check(*case.problem())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_exact_hits(way: str, weighting: str) -> None:
    """At sigma = 0 and with weighting "log", a row that is hit takes all, and equal ones share."""
    b, n, d = WAYS[way]
    for dtype, x_dtype in ((F32, F32), (U8, F64)):  # of uint8 only a float64 is a value exactly
        case = Case(b, n, d, dtype, x_dtype, bias="normal", weighting=weighting, sigma=1.0)
        query, rows = case.problem()
        query = with_hits(query, rows)._replace(sigma=torch.zeros(b, dtype=F64))
        check(query, rows)
        state = state_of(query, rows)
        assert query.bias is not None
        assert state.key[0] == 0 and state.m[0] == query.bias[[0, -1]].max()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_of(2)
def test_queries_without_weight_or_number(way: str, sigma: float, weighting: str) -> None:
    """Rows that are all left out give the neutral state; a query that is not finite NaN."""
    b, n, d = WAYS[way]
    query, rows = Case(b, n, d, weighting=weighting).problem()
    query = query._replace(sigma=torch.full_like(query.sigma, sigma))
    nothing = query._replace(bias=torch.full((n,), -math.inf, dtype=F64))
    state = state_of(nothing, rows)
    assert (state.key == math.inf).all() and (state.m == -math.inf).all()
    assert not any(v.any() for v in (*state[2:6], state.acc, state.residual))
    sums = CPU.posterior(nothing, rows)
    assert (sums.log_z == -math.inf).all()
    assert all(torch.isnan(v).all() for v in sums._replace(log_z=sums.mean))
    check(nothing, rows)
    x = query.x.clone()
    x[1, 0] = math.nan
    x[2, -1] = -math.inf
    lost = state_of(query._replace(x=x), rows)
    clean = state_of(query, rows)
    for name, a, e in zip(State._fields[:8], lost, clean, strict=False):
        assert torch.equal(a[3:], e[3:]) and torch.equal(a[:1], e[:1]), name
        unknown = a[1:3] == 0 if name in ("key", "m") else torch.isnan(a[1:3])
        assert unknown.all(), name
    check(query._replace(x=x), rows)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_one_row_and_no_query(d: int, weighting: str) -> None:
    for sigma in (0.0, 0.4):
        query, rows = Case(5, 1, d, weighting=weighting).problem()
        query = query._replace(sigma=torch.full_like(query.sigma, sigma))
        check(query, rows)
        none = query.take(slice(0))
        state = state_of(none, rows)
        assert state.acc.shape == (0, d) and all(v.shape == (0,) for v in state[:6])
        assert torch.isfinite(state.center).all()


def test_mixed_types() -> None:
    """float64 queries of float32 rows, and the other way: acc is float64."""
    for rows_dtype, x_dtype in ((F32, F64), (F64, F32)):
        for b, n, d in WAYS.values():
            check(*Case(b, n, d, rows_dtype, x_dtype, 0.3).problem())


def test_every_number_is_written() -> None:
    """New memory is full of NaN here, and only a query that is not finite has any afterwards."""

    def finite(tensors: tuple[Tensor, ...]) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in tensors)

    torch.use_deterministic_algorithms(True)
    try:
        for b, n, d in WAYS.values():
            for sigma in (1e-3, 0.5):
                query, rows = Case(b, n, d, sigma=sigma).problem()
                assert finite(CPU.posterior_state(query, rows))
    finally:
        torch.use_deterministic_algorithms(False)


def test_constants_are_those_of_the_kernels() -> None:
    """Codes and limits that Python and C++ must agree on come from csrc/include/memokern."""
    for name in ("MOST_LEVELS", "BLOCK_ROWS", "PANEL_BLOCKS", "BOX_COORDINATES"):
        assert getattr(checks, name) == getattr(_C, name), name
    assert sorted(_C.WEIGHTINGS) == sorted(WEIGHTINGS)
    assert sorted(_C.ROW_TYPES) == sorted(name_of(t) for t in ROW_DTYPES)
