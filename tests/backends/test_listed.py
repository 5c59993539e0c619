"""Sums over lists of rows, and their gradient, of every backend: against the definition over the
rows listed, and autograd through it."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from memokern.calls import BasicSums, Gradients, Query, RowLists, Rows, Sums
from tests import cases, compare, harness, oracle
from tests.cases import F16, F32, F64, U8, Case, column, normal, query_of, random_like, random_lists
from tests.harness import compiled_backends, every_backend, over, plain_backends, sized


@functools.lru_cache(maxsize=64)
def answered(case: Case) -> tuple[Query, Rows, RowLists, Sums, Sums, Gradients]:
    """A case with lists, its sums, gradients for these and for the query; not to be written to."""
    query, rows = case.problem()
    lists = random_lists(case.n, case.b, case.d)
    sums = oracle.sums(query, rows, lists)
    grads = random_like(cases.basic(sums._replace(mean=query.x)), case.b)
    return query, rows, lists, sums, grads, oracle.gradients(query, rows, grads, lists)


@over(cases.listed, "group")
@pytest.mark.one_of(2)
def test_sums_and_their_gradient(backend: str, group: list[Case]) -> None:
    """All in float64, whatever the types are."""
    for case in group:
        query, rows, lists, want, grads, back = answered(case)
        got = harness.listed(backend, query, rows, lists)
        compare.listed(got, want, query, str(case))
        found = harness.listed_backward(backend, query, rows, lists, got, grads)
        compare.listed_gradients(found, back, want, query, str(case))


@pytest.mark.parametrize("biased", [False, True])
@over(sized(F64, F32, F16, U8, triton=(F32, F16, U8)), "dtype")
def test_as_a_sweep_over_the_listed_rows(backend: str, dtype: torch.dtype, biased: bool) -> None:
    """The dense operation of the same backend on these rows alone: another unit, every type."""
    data = (9 * normal(9, 2, seed=1) + 30).to(dtype)
    rows, lists = Rows(data, 0.1, -3.0), random_lists(9, 3, 2)
    x = normal(3, 2).to(F64 if dtype == F64 else F32)
    query = query_of(x, 0.6, 0.9, 1.2, normal(9, seed=3) if biased else None)
    got = harness.listed(backend, query, rows, lists)
    tol = 1e-11 if compare.unit(backend, query, rows) == F64 else 1e-4
    for b in range(3):
        some = lists.index[lists.start[b] : lists.start[b + 1]]
        one = query.take(slice(b, b + 1))._replace(bias=query.bias[some] if biased else None)
        want = harness.posterior(backend, one, rows._replace(data=data[some]))
        compare.close([v[b : b + 1] for v in got], want, rtol=tol, atol=tol)


def limits() -> tuple[Query, Rows, RowLists]:
    """A hit with ties at a tiny sigma, sigma = 0, a query that is not finite, and an empty list."""
    rows = Rows(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 5.0]]))
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [math.nan, 0.0], [0.0, 0.0]])
    lists = RowLists(torch.tensor([0, 3, 6, 8, 8]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3]))
    bias = torch.tensor([0.0, 0.0, math.log(3), 0.0], dtype=F64)
    return query_of(x, torch.tensor([1e-5, 0.0, 1.0, 1.0]), bias=bias), rows, lists


@every_backend
def test_exact_hits_ties_limits_and_lost_queries(backend: str) -> None:
    query, rows, lists = limits()
    got = harness.listed(backend, query, rows, lists)
    assert torch.equal(got.mean[:2], rows.data[[1, 1]]) and bool(got.mean[2:].isnan().all())
    assert abs(got.log_z[0].item() - math.log(4)) < 1e-15 and got.log_z[3].item() == -math.inf
    assert got.log_z[1].item() == got.mean_logit[1].item() == -math.inf and got.log_z[2].isnan()
    torch.testing.assert_close(got.weight_sq[:2], column(0.0625 + 0.5625, 2))  # 1/4 and 3/4
    want = oracle.sums(query, rows, lists)
    compare.close([v[:2] for v in got[1:5]], [v[:2] for v in want[1:5]], rtol=1e-14, atol=1e-14)
    compare.close([got.residual[:2].to(F64)], [want.residual[:2]], rtol=1e-6, atol=1e-12)
    assert all(v[3].isnan().all() for v in got[2:])


@every_backend
def test_their_gradients(backend: str) -> None:
    query, rows, lists = limits()
    got = harness.listed(backend, query, rows, lists)
    ones = BasicSums(*(torch.ones_like(v) for v in got[:5]))
    back = harness.listed_backward(backend, query, rows, lists, got, ones)
    assert torch.equal(back.x[1], torch.zeros(2)) and back.sigma[1].item() == 0
    assert bool(back.x[2].isnan().all()) and back.bias[0].isnan()
    assert backend.startswith("cpu") or back.bias[3].isnan()  # listed by the lost query alone
    kept = query.take(slice(0, 2))
    two = RowLists(lists.start[:3], lists.index[:6])
    ones = BasicSums(*(v[:2] for v in ones))
    want = oracle.gradients(kept, rows, ones, two)
    for a, e in zip(back[:4], want[:4], strict=True):
        torch.testing.assert_close(a[:2].double(), e)
    torch.testing.assert_close(back.bias[1:3], want.bias[1:3])


@every_backend
def test_exact_hits_at_a_tiny_sigma(backend: str) -> None:
    """Rows a thousand away from the origin: their distances cancel to nothing."""
    rows = Rows(torch.tensor([[1e3, 1.0], [1e3, 2.0], [1e3, 1.0]]))
    query = query_of(torch.tensor([[1e3, 1.0], [1e3, 2.0]]), 1e-5)
    lists = RowLists(torch.tensor([0, 3, 6]), torch.tensor([0, 1, 2, 0, 1, 2]))
    got = harness.listed(backend, query, rows, lists)
    assert torch.equal(got.mean, query.x)
    assert got.weight_sq.tolist() == [0.5, 1.0]
    assert got.log_z.tolist() == [math.log(2), 0.0] and got.mean_logit.tolist() == [0.0, 0.0]


@every_backend
def test_no_queries_and_empty_lists(backend: str) -> None:
    query, rows = Case(3, 10, 4, sigma=1.0, bias="normal").problem()
    lists = RowLists(torch.tensor([0, 3, 3, 8]), random_lists(10, 20, 0).index[:8])
    got = harness.listed(backend, query, rows, lists)
    assert got.mean[1].isnan().all() and got.log_z[1] == -math.inf
    assert torch.isfinite(got.mean[[0, 2]]).all() and torch.isfinite(got.log_z[[0, 2]]).all()
    none = torch.zeros(0, dtype=torch.int64)
    got = harness.listed(backend, query, rows, RowLists(torch.zeros(4, dtype=torch.int64), none))
    assert got.mean.isnan().all() and (got.log_z == -math.inf).all()
    nobody, nothing = query.take(slice(0, 0)), RowLists(none.new_zeros(1), none)
    got = harness.listed(backend, nobody, rows, nothing)
    assert got.mean.shape == (0, 4) and all(v.shape == (0,) for v in got[1:5])
    back = harness.listed_backward(backend, nobody, rows, nothing, got, got)
    assert back.x.shape == (0, 4) and torch.equal(back.bias, torch.zeros(10, dtype=F64))


@every_backend
def test_a_lost_query_leaves_the_others_alone(backend: str) -> None:
    query, rows = Case(3, 9, 2, bias="normal").problem()
    lists = random_lists(9, 3, 2)
    want = harness.listed(backend, query, rows, lists)
    query.x[1, 1] = math.nan
    got = harness.listed(backend, query, rows, lists)
    for g, w in zip(got, want, strict=True):
        assert g[1].isnan().all()
        assert torch.equal(g[[0, 2]], w[[0, 2]])


@every_backend
def test_long_lists_in_parts_and_blocks(backend: str) -> None:
    """More rows than a block of weights holds, and sums in parts."""
    query, rows = Case(2, 1300, 20, U8, sigma=2.0).problem()
    query = query_of(query.x, 30.0, 0.9, 1.3)
    start = torch.tensor([0, 1300, 1300 + 700])
    lists = RowLists(start, torch.cat([torch.arange(1300), torch.arange(300, 1000)]))
    got = harness.listed(backend, query, rows, lists)
    compare.listed(got, oracle.sums(query, rows, lists), query, "long")


@every_backend
def test_far_offsets(backend: str) -> None:
    query, rows = Case(2, 4, 70, U8, sigma=0.5, alpha=0.9, temperature=1.1).problem()
    lists = RowLists(torch.tensor([0, 2, 4]), torch.tensor([0, 3, 1, 3]))
    found = []
    for stored in (rows, cases.far_apart(rows, harness.device_of(backend))):
        got = harness.listed(backend, query, stored, lists)
        found.append([*got, *harness.listed_backward(backend, query, stored, lists, got, got)])
    compare.equal(*found)


@compiled_backends
def test_lists_that_are_none_are_errors(backend: str) -> None:
    query, rows = Case(2, 10, 4).problem()
    for start, index in (([0, 2, 1], [0]), ([0, 1, 2], [0, 10]), ([0, 1, 2], [0, -1])):
        lists = RowLists(torch.tensor(start), torch.tensor(index))
        with pytest.raises(ValueError, match=r"start|index"):
            harness.listed(backend, query, rows, lists)
    lists = RowLists(torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"sigma must (have shape|be float64) \[2\]"):
        harness.listed(backend, query._replace(sigma=query.sigma[:1]), rows, lists)
    with pytest.raises(ValueError, match="start must be int64"):
        harness.listed(backend, query, rows, lists._replace(start=lists.start.int()))


@pytest.mark.parametrize("bias", [None, "normal", "holes"])
@plain_backends
def test_second_derivatives_as_autograd_through_the_definition(
    backend: str, bias: str | None
) -> None:
    case = Case(3, 9, 2, F64, F64, 0.6, -0.8, 0.7, bias)
    query, rows = case.problem()
    index = torch.tensor([0, 1, 2, 4, 1, 4, 5, 8, 3, 6, 7])  # each list has rows that are left in
    lists = RowLists(torch.tensor([0, 4, 8, 11]), index)
    grads = random_like(cases.basic(oracle.sums(query, rows, lists)), 1)
    seeds = random_like(oracle.gradients(query, rows, grads, lists), 2)
    heads, tails = harness.listed_double_backward(backend, query, rows, lists, grads, seeds)
    want = oracle.second(query, rows, grads, seeds, lists)
    kind = compare.unit(backend, query, rows)
    assert all(torch.isfinite(v).all() for v in (*heads, *tails))
    heads = [g for g, v in zip(heads, query.tensors, strict=True) if v is not None]
    compare.second_derivatives(heads, want[0], kind, (str(case), "query"))
    compare.second_derivatives(tails, want[1], kind, (str(case), "grads"))
