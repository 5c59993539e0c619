"""The state of a sweep, and Triton's merge held to the laws of :func:`memokern.calls.merge`."""

from __future__ import annotations

import math

import pytest
import torch
from triton_interpreter import DEVICE

pytest.importorskip("triton")

from memokern.backends.protocol import get
from memokern.backends.triton import BACKEND
from memokern.backends.triton.core.state import merge_states
from memokern.backends.triton.posterior import planner
from memokern.calls import Query, Rows, State, Sums, empty_state, merge, settled, to_sums

F32, F64 = torch.float32, torch.float64
ROW_TYPES = [F32, torch.bfloat16, torch.float16, torch.uint8]
REFERENCE = get("reference")


def moved(value, device: torch.device):
    """A call object with its tensors on a device."""
    return type(value)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in value))


def state_of(query: Query, rows: Rows) -> State:
    return moved(BACKEND.posterior_state(moved(query, DEVICE), moved(rows, DEVICE)), "cpu")


def sums_of(query: Query, rows: Rows) -> Sums:
    return moved(BACKEND.posterior(moved(query, DEVICE), moved(rows, DEVICE)), "cpu")


def joined(a: State, b: State) -> State:
    return moved(merge_states(moved(a, DEVICE), moved(b, DEVICE)), "cpu")


def call(b: int, n: int, d: int, dtype: torch.dtype, sigma: float) -> tuple[Query, Rows]:
    """Queries near rows, two of which are equal, their biases too; one row is left out."""
    g = torch.Generator().manual_seed(b + n + d)
    values = torch.randn(n, d, generator=g)
    scale, shift = 1.0, 0.0
    if dtype == torch.uint8:
        values, scale, shift = (127.5 + 40 * values).clamp(0, 255), 1 / 40, -3.0
    rows = Rows(values.to(dtype), scale, shift)
    rows.data[n // 2] = rows.data[0]
    y = rows.data.to(F64) * scale + shift
    x = 0.9 * y[torch.arange(b) % n] + sigma * torch.randn(b, d, dtype=F64, generator=g)
    bias = torch.randn(n, dtype=F64, generator=g)
    bias[n // 2], bias[n // 3] = bias[0], -math.inf
    columns = [torch.full((b,), v, dtype=F64) for v in (sigma, 0.9, 1.3)]
    return Query(x.to(F32), *columns, bias), rows


def close(got, want, tol: float = 1e-4) -> None:
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), e.to(F64), rtol=tol, atol=tol, equal_nan=True)


# --- the state of a sweep -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("d", [7, 270])
def test_a_state_is_what_the_sums_are_made_of(d: int, weighting: str, dtype: torch.dtype) -> None:
    for sigma in (0.8, 0.0):
        query, rows = call(3, 40, d, dtype, sigma)
        query = query._replace(weighting=weighting)
        state, want = state_of(query, rows), sums_of(query, rows)
        assert state.acc.dtype == F32 and all(v.dtype == F64 for v in state[:6])
        close(to_sums(state, query), want)
        wide = query._replace(x=query.x.to(F64))
        close(to_sums(state, query), to_sums(REFERENCE.posterior_state(wide, rows), wide))
        # The keys are distances at sigma = 0, 0 elsewhere, and 1 where "log" hits no row.
        r2 = (
            query.x.to(F64)[:, None] - 0.9 * (rows.data.to(F64) * rows.scale + rows.shift)
        ).square()
        nearest = r2.sum(2)[:, ~torch.isneginf(query.bias)].amin(1)
        limit = nearest if sigma == 0 else torch.zeros(3, dtype=F64)
        torch.testing.assert_close(
            state.key, torch.ones(3, dtype=F64) if weighting == "log" else limit
        )


@pytest.mark.parametrize("d,sigma", [(7, 0.0), (7, 1e-20), (7, 3.0), (270, 0.0), (270, 0.1)])
def test_halves_make_the_whole(d: int, sigma: float) -> None:
    """At every sigma, 0 included, where only one half may have the nearest row."""
    query, rows = call(3, 60, d, F32, sigma)
    parts = []
    for at in (slice(0, 25), slice(25, 60)):
        part = query._replace(bias=query.bias[at]), rows._replace(data=rows.data[at])
        parts.append(settled(state_of(*part), query))
    want = to_sums(settled(state_of(query, rows), query), query)
    for got in (joined(*parts), merge(*parts)):
        close(to_sums(got, query), want, 1e-5)


@pytest.mark.parametrize(
    ("d", "weighting", "sigma"),
    [(7, "gaussian", 0.8), (7, "gaussian", 0.0), (7, "log", 0.8), (270, "gaussian", 0.8),
     (270, "gaussian", 0.0)],
)  # fmt: skip
def test_rows_that_have_no_weight_and_queries_that_are_lost(
    d: int, weighting: str, sigma: float
) -> None:
    query, rows = call(2, 40, d, F32, sigma)
    query.x[1, 2] = math.nan
    some = query._replace(weighting=weighting)
    nothing = some._replace(bias=torch.full((40,), -math.inf, dtype=F64))
    for asked in (some, nothing):
        state, sums = state_of(asked, rows), sums_of(asked, rows)
        want = REFERENCE.posterior_state(asked, rows)
        assert all(torch.equal(a.isnan(), e.isnan()) for a, e in zip(state, want, strict=True))
        assert state.key[1] == state.m[1] == 0 and state.acc[1].isnan().all()
        close(sums, REFERENCE.posterior(asked, rows))
    assert state.key[0] == math.inf and state.m[0] == -math.inf
    assert not any(v[0].any() for v in (*state[2:6], state.acc))
    assert sums.log_z[0] == -math.inf and sums.log_z[1].isnan()
    assert all(v.isnan().all() for v in (sums.mean, *sums[2:]))


def test_no_queries_and_several_blocks(monkeypatch) -> None:
    query, rows = call(17, 40, 20, torch.bfloat16, 2.0)
    none = state_of(query.take(slice(0, 0)), rows)
    assert none.acc.shape == (0, 20) and none.key.shape == (0,)
    want = to_sums(state_of(query, rows), query)
    monkeypatch.setattr(planner, "WORKSPACE", 1)
    monkeypatch.setattr(planner, "FEW_QUERIES", 17)  # tiles of 16 queries: two blocks
    for one_pass in (planner.one_pass, lambda *_: None):
        monkeypatch.setattr(planner, "one_pass", one_pass)
        close(to_sums(state_of(query, rows), query), want, 2e-5)


# --- the monoid ---------------------------------------------------------------------------------


def some_state(seed: int, center: torch.Tensor, kind: torch.Tensor) -> State:
    """Queries of every kind: 0 and 1, at sigma = 0 with two distances; 2, lost; 3, without rows
    that have weight; 4, with sigma > 0, some of which are negligible beside others."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    b = len(kind)
    s = normal(b).abs() + 0.1
    key = torch.where(kind == 0, 1.0, torch.where(kind == 1, 2.0, 0.0)).to(F64)
    m = -1000 * normal(b).abs()
    sums = [s, -s * normal(b).abs(), normal(b), s.square() * 0.5]
    acc = normal(b, len(center)).to(F32)
    lost, none = kind == 2, kind == 3
    key, m = torch.where(lost, 0.0, key), torch.where(lost, 0.0, m)
    sums = [torch.where(lost, math.nan, torch.where(none, 0.0, v)) for v in sums]
    acc = torch.where(lost[:, None], math.nan, torch.where(none[:, None], 0.0, acc)).to(F32)
    key, m = torch.where(none, math.inf, key), torch.where(none, -math.inf, m)
    return State(key, m, *sums, acc, center)


def states() -> list[State]:
    g = torch.Generator().manual_seed(0)
    center = torch.randn(130, dtype=F64, generator=g)
    other = center + 0.1 * torch.randn(130, dtype=F64, generator=g)
    each = torch.arange(25)  # every kind with every other
    kinds = (each // 5, each % 5, torch.randint(0, 5, (25,), generator=g))
    about = (center, other, center)
    return [some_state(i, c, k) for i, (c, k) in enumerate(zip(about, kinds, strict=True))]


def about(state: State, center: torch.Tensor) -> State:
    """The same state about another center."""
    return merge(empty_state(len(state.key), center, F32), state)


def test_the_merge_is_that_of_pytorch() -> None:
    a, b, c = states()
    for left, right in ((a, b), (b, a), (a, c), (b, c)):
        got, want = joined(left, right), merge(left, right)
        close(got[:6], want[:6], 1e-12)
        close([got.acc], [want.acc], 1e-6)
        assert torch.equal(got.center, left.center)


def test_the_merge_is_associative() -> None:
    a, b, c = states()
    one, other = joined(joined(a, b), c), joined(a, joined(b, c))
    close(one[:6], other[:6], 1e-12)
    close([one.acc], [other.acc], 1e-5)


def test_the_merge_is_commutative() -> None:
    a, b, _ = states()
    one, other = joined(a, b), about(joined(b, a), a.center)
    close(one[:6], other[:6], 1e-12)
    close([one.acc], [other.acc], 1e-5)


def test_the_merge_has_a_neutral_element() -> None:
    a, b, _ = states()
    nothing = empty_state(len(a.key), a.center, F32)
    for got in (joined(a, nothing), joined(nothing, a)):
        for v, e in zip(got, a, strict=True):
            assert torch.equal(v.nan_to_num(7.0), e.nan_to_num(7.0))
    got = joined(nothing, b)
    close([got.acc], [about(b, a.center).acc], 1e-6)
    both = joined(nothing, nothing)
    assert (both.key == math.inf).all() and (both.m == -math.inf).all() and not both.s.any()
