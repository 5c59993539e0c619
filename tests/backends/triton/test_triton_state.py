"""What the tests of every backend's states leave out: rows without weight, plans, and every kind of
state merged with every other as :func:`memokern.calls.merge` does it."""

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
from memokern.calls import Query, Rows, State, Sums, merge, to_sums

F32, F64 = torch.float32, torch.float64
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
    rows = Rows(torch.randn(n, d, generator=g).to(dtype))
    rows.data[n // 2] = rows.data[0]
    noise = torch.randn(b, d, dtype=F64, generator=g)
    x = 0.9 * rows.data.to(F64)[torch.arange(b) % n] + sigma * noise
    bias = torch.randn(n, dtype=F64, generator=g)
    bias[n // 2], bias[n // 3] = bias[0], -math.inf
    columns = [torch.full((b,), v, dtype=F64) for v in (sigma, 0.9, 1.3)]
    return Query(x.to(F32), *columns, bias), rows


def close(got, want, tol: float = 1e-4) -> None:
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), e.to(F64), rtol=tol, atol=tol, equal_nan=True)


# --- the state of a sweep -------------------------------------------------------------------------


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


def test_the_merge_is_that_of_pytorch() -> None:
    a, b, c = states()
    for left, right in ((a, b), (b, a), (a, c), (b, c)):
        got, want = joined(left, right), merge(left, right)
        close(got[:6], want[:6], 1e-12)
        close([got.acc], [want.acc], 1e-6)
        assert torch.equal(got.center, left.center)
