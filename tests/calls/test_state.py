"""States of parts of the data join to that of the whole: the laws of `merge`, which is written
three times, held to the same cases."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from memokern import calls
from memokern.calls import Query, Rows, State, empty_state
from tests import compiled, harness, oracle
from tests.cases import F64, normal, query_of

Merge = Callable[[State, State], State]


def in_triton(a: State, b: State) -> State:
    """Its accumulators are float32."""
    from memokern.backends.triton.core.state import merge_states

    short = (s._replace(acc=s.acc.float(), residual=s.residual.float()) for s in (a, b))
    return harness.moved(merge_states(*(harness.moved(s, harness.DEVICE) for s in short)),
                         harness.CPU)  # fmt: skip


def in_cpp(isa: str, a: State, b: State) -> State:
    """The kernels join the six numbers of one query; accumulators are scaled by what they say."""
    states, accs = [], []
    for i in range(len(a.s)):
        mine, other = (torch.stack([v[i] for v in s[:6]]) for s in (a, b))
        factors = compiled.merge(isa, mine, other)
        moved = other[2] * (b.center - a.center)
        each = torch.stack([a.acc[i], b.acc[i] + moved])
        pulls = torch.stack([a.residual[i], b.residual[i]])
        both = (
            torch.where(factors[:, None] == 0, 0.0, factors[:, None] * v) for v in (each, pulls)
        )
        accs.append(torch.stack([v.sum(0) for v in both]))
        states.append(mine)
    table = torch.stack(states)
    return State(*table.unbind(1), *torch.stack(accs, 1), a.center)


MERGES: dict[str, Merge] = {"pytorch": calls.merge}
if "cpu" in harness.INSTALLED:
    MERGES |= {f"cpp:{isa}": functools.partial(in_cpp, isa) for isa in compiled.isas()}
if "triton" in harness.INSTALLED:
    MERGES["triton"] = in_triton
every_merge = pytest.mark.parametrize("name", MERGES)


@dataclass(frozen=True)
class Parts:
    """Queries, and 12 rows in three parts."""

    sigma: float
    weighting: str = "gaussian"
    biased: bool = False
    left_out: tuple[int, ...] = ()
    hit: int | None = None  # a row that the first query is, and that a later row repeats
    lost: bool = False

    def problem(self) -> tuple[Query, Rows, list[slice]]:
        data, x = normal(12, 4, seed=1), normal(3, 4, seed=2)
        if self.hit is not None:
            data[9] = data[self.hit]
            x[0] = data[self.hit]
        if self.lost:
            x[2, 1] = math.nan
        bias = normal(12, seed=3) if self.biased or self.left_out else None
        for n in self.left_out:
            bias[n] = -math.inf
        at = [slice(0, 3), slice(3, 7), slice(7, 12)]
        return query_of(x, self.sigma, 0.9, 1.3, bias, self.weighting), Rows(data), at


PARTS = {
    "noise": Parts(0.7, biased=True),
    "little-noise": Parts(0.02),
    "one-part-left-out": Parts(0.7, left_out=(3, 4, 5, 6)),
    "nothing-left": Parts(0.7, left_out=tuple(range(12))),
    "zero": Parts(0.0, biased=True),
    "zero-ties-over-the-boundary": Parts(0.0, biased=True, hit=1),
    "zero-part-left-out": Parts(0.0, left_out=(0, 1, 2)),
    "overflow": Parts(1e-200, biased=True, hit=1),
    "log": Parts(1.0, "log", biased=True),
    "log-hits-in-two-parts": Parts(1.0, "log", biased=True, hit=4),
    "log-hit-left-out": Parts(1.0, "log", left_out=(4, 9), hit=4),
    "lost": Parts(0.7, lost=True),
    "lost-at-zero": Parts(0.0, lost=True),
}
every_case = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())


def _states(parts: Parts) -> tuple[list[State], State]:
    """Of the parts, each about a center of its own, and of the whole about the first one's."""
    query, rows, at = parts.problem()
    centers = normal(3, 4, seed=7)
    each = [
        oracle.state(
            query._replace(bias=None if query.bias is None else query.bias[where]),
            rows._replace(data=rows.data[where]),
            center,
        )
        for where, center in zip(at, centers, strict=True)
    ]
    return each, oracle.state(query, rows, centers[0])


def _same(got: State, want: State, name: str) -> None:
    """Within the rounding of a few operations; states about different centers are moved first."""
    acc = got.acc.to(F64)
    acc = torch.where(got.s[:, None] == 0, acc, acc + got.s[:, None] * (got.center - want.center))
    close = {"rtol": 1e-13, "atol": 1e-13, "equal_nan": True}
    for field, a, e in zip(State._fields[:6], got[:6], want[:6], strict=True):
        torch.testing.assert_close(a, e, **close, msg=lambda m, f=field: f"{f}: {m}")
    close = close | ({"rtol": 1e-6, "atol": 1e-6} if name == "triton" else {})
    torch.testing.assert_close(acc, want.acc.to(F64), **close)
    torch.testing.assert_close(got.residual.to(F64), want.residual.to(F64), **close)


@every_merge
@every_case
@pytest.mark.one_of(2)
def test_parts_join_to_the_whole_in_any_grouping_and_order(parts: Parts, name: str) -> None:
    merge, ((a, b, c), whole) = MERGES[name], _states(parts)
    for joined in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(c, merge(b, a)),
        merge(merge(c, a), b),
    ):
        _same(joined, whole, name)
    _same(merge(a, b), merge(b, a), name)


@every_merge
@every_case
def test_the_empty_state_is_neutral(parts: Parts, name: str) -> None:
    merge, ((a, *_), _) = MERGES[name], _states(parts)
    empty = empty_state(3, a.center, F64)
    for joined in (merge(a, empty), merge(empty, a)):
        for got, want in zip(joined[:6], a[:6], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        _same(joined, a, name)
    nothing = merge(empty, empty)
    assert all(torch.equal(u.to(F64), v) for u, v in zip(nothing, empty, strict=True))


def _of_kinds(seed: int, kinds: Tensor) -> State:
    """Queries of each kind: 0 and 1, at sigma = 0 with two distances; 2, lost; 3, without rows that
    have weight; 4, with sigma > 0, where much is negligible beside the other state's."""
    b, center = len(kinds), normal(130, seed=seed)
    s = normal(b, seed=seed + 1).abs() + 0.1
    lost, none = kinds == 2, kinds == 3
    key = torch.where(kinds == 0, 1.0, torch.where(kinds == 1, 2.0, 0.0)).to(F64)
    m = -1000 * normal(b, seed=seed + 2).abs()
    sums = [s, -s * normal(b, seed=seed + 3).abs(), normal(b, seed=seed + 4), 0.5 * s.square()]
    acc = normal(b, 130, seed=seed + 5)
    gone = [torch.where(lost, math.nan, torch.where(none, 0.0, v)) for v in sums]
    acc = torch.where(lost[:, None], math.nan, torch.where(none[:, None], 0.0, acc))
    key = torch.where(none, math.inf, torch.where(lost, 0.0, key))
    m = torch.where(none, -math.inf, torch.where(lost, 0.0, m))
    return State(key, m, *gone, acc, acc.flip(1), center)


@every_merge
def test_every_kind_with_every_other(name: str) -> None:
    """The laws, and that each merge is the one in PyTorch."""
    merge, each = MERGES[name], torch.arange(25)
    drawn = torch.randint(0, 5, (25,), generator=torch.Generator().manual_seed(0))
    a, b, c = (_of_kinds(10 * i, kinds) for i, kinds in enumerate((each // 5, each % 5, drawn)))
    for left, right in ((a, b), (b, a), (a, c), (b, c)):
        _same(merge(left, right), calls.merge(left, right), name)
        assert torch.equal(merge(left, right).center, left.center)
    _same(merge(merge(a, b), c), merge(a, merge(b, c)), name)
    _same(merge(a, b), merge(b, a), name)


@every_merge
def test_only_the_smallest_key_counts(name: str) -> None:
    """At sigma = 0 it is the squared distance: what is farther is left out, whatever it sums."""
    (near, far, _), _ = _states(Parts(0.0, biased=True))
    near, far = (s._replace(key=torch.full((3,), v, dtype=F64)) for s, v in ((near, 0.5), (far, 2)))
    far = far._replace(acc=torch.full_like(far.acc, math.inf))
    for joined in (MERGES[name](near, far), MERGES[name](far, near)):
        for got, want in zip(joined[:6], near[:6], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
    _same(MERGES[name](near, far), near, name)


@every_case
def test_sums_of_the_joined_state_are_those_of_all_rows(parts: Parts) -> None:
    query, rows, _ = parts.problem()
    each, _ = _states(parts)
    got = calls.to_sums(functools.reduce(calls.merge, each), query)
    want = oracle.sums(query, rows)
    for field, a, e in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}"
        )


def test_no_queries() -> None:
    none = empty_state(0, torch.zeros(4, dtype=F64), torch.float32)
    joined = calls.merge(none, none)
    assert joined.acc.shape == (0, 4) and all(v.shape == (0,) for v in joined[:6])
    sums = calls.to_sums(joined, query_of(torch.zeros(0, 4), 1.0))
    assert sums.mean.shape == (0, 4)


@pytest.mark.parametrize("sigma", [0.5, 1e-150, 1e-160, 0.0])
def test_settled_states_can_be_joined_where_the_parts_saw_different_limits(sigma: float) -> None:
    """A sweep may treat a sigma so small that r^2 / sigma^2 nearly overflows as 0: then its key is
    the squared distance, which is what `settled` puts back into the logit."""
    query, rows = query_of(torch.zeros(1, 2, dtype=F64), sigma), Rows(normal(4, 2, seed=1))
    want = oracle.state(query, rows, torch.zeros(2, dtype=F64))
    r2 = oracle.squares(query.x, rows.data)[0]
    at = r2 == r2.min()
    one = torch.ones(1, dtype=F64)
    limit = State(
        r2.min()[None],
        0 * one,
        one,
        0 * one,
        0 * one,
        one,
        rows.data[at],
        rows.data[at] - query.x,
        torch.zeros(2, dtype=F64),
    )
    got = oracle.settled(limit, query)
    if sigma == 0.5:  # the other rows have weight, of which this state does not know
        torch.testing.assert_close(got.m, want.m)
    else:
        _same(got, want, "pytorch")
    log = query._replace(weighting="log")
    assert oracle.settled(limit, log) is limit


def test_derivatives_flow_through_a_merge() -> None:
    """Into both, but not into m and key; a factor of 0 times infinity is no NaN."""
    (a, b, _), _ = _states(Parts(0.0, biased=True))
    leaves: list[Tensor] = []
    for state in (a, b):
        leaves += [v.clone().requires_grad_() for v in (*state[2:6], state.acc, state.residual)]
    joined = calls.merge(
        State(a.key, a.m, *leaves[:6], a.center), State(b.key, b.m, *leaves[6:], b.center)
    )
    grads = torch.autograd.grad(sum(v.sum() for v in joined[2:8]), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.autograd.gradcheck(
        lambda *v: calls.merge(State(a.key, a.m, *v[:6], a.center), b)[2:8], tuple(leaves[:6])
    )
