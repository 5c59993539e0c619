"""The gradients of the dense sweep, for the query and for the rows, of every backend, against
autograd through the definition."""

from __future__ import annotations

import math

import pytest
import torch

from memokern.calls import BasicSums, Gradients, Query, Rows, Sums
from tests import cases, compare, harness, oracle
from tests.cases import F16, F32, F64, U8, Case, normal, query_of, random_like
from tests.harness import INSTALLED, every_backend, over, plain_backends, sized


def _backward(backend: str, query: Query, rows: Rows, seed: int) -> tuple[Sums, Sums, Gradients]:
    """-> sums, random gradients for them, and those for the query."""
    got = harness.posterior(backend, query, rows)
    grads = random_like(cases.basic(got), seed)
    return got, grads, harness.backward(backend, query, rows, got, grads)


@over(cases.gradients, "group")
@pytest.mark.one_of(4)
def test_as_autograd_through_the_definition(backend: str, group: list[Case]) -> None:
    for case in group:
        query, rows, grads, want = cases.with_gradients(case)
        got = harness.posterior(backend, query, rows)
        back = harness.backward(backend, query, rows, got, grads)
        kind = compare.unit(backend, query, rows)
        compare.gradients(back, want, got, query, kind, str(case))


@pytest.mark.parametrize("sigma", [0.0, 1e-200])
@every_backend
def test_at_the_limit(backend: str, sigma: float) -> None:
    """Nothing moves but the ties' shares: d sum w^2 / d b_n = 2 w_n (w_n - sum w^2)."""
    rows = Rows(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    bias = torch.tensor([0.0, 0.0, math.log(3)], dtype=F64)
    query = query_of(torch.tensor([[0.9, 0.1]]), sigma, bias=bias)
    got = harness.posterior(backend, query, rows)
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    grads = BasicSums(torch.ones(1, 2), one, one, zero, one)
    back = harness.backward(backend, query, rows, got, grads)
    assert torch.equal(back.x, torch.zeros(1, 2))
    assert back.sigma.item() == 0 and back.alpha.item() == 0
    w = torch.tensor([0.25, 0.75], dtype=F64)
    torch.testing.assert_close(back.bias[1:], 2 * w * (w - w.square().sum()))
    assert back.bias[0].item() == 0


@every_backend
def test_a_lost_query_has_no_gradient_and_its_neighbours_theirs(backend: str) -> None:
    rows = Rows(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    x = torch.tensor([[0.9, 0.1], [0.9, 0.1], [math.nan, 0.0]])
    query = query_of(x, 0.5)
    got = harness.posterior(backend, query, rows)
    ones = BasicSums(*(torch.ones_like(v) for v in got[:5]))
    back = harness.backward(backend, query, rows, got, ones)
    assert torch.isnan(back.x[2]).all() and all(torch.isnan(v[2]) for v in back[1:4])
    assert torch.isfinite(back.x[:2]).all() and torch.equal(back.x[0], back.x[1])


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@every_backend
def test_exact_hits(backend: str, sigma: float, weighting: str) -> None:
    """Where log_z is finite at sigma = 0, and infinite with weighting "log"."""
    data = normal(9, 4, dtype=F32)
    data[5] = data[2]
    bias = normal(9, seed=1)
    query = query_of(data[2:3].clone(), sigma, 1.0, 1.3, bias, weighting)
    got, grads, back = _backward(backend, query, Rows(data), 2)
    want = oracle.gradients(query, Rows(data), grads)
    for a, e in zip(back, want, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(got.mean).all()


@over(sized(1, 12, triton=(2,)), "b")
@pytest.mark.parametrize(("weighting", "sigma"), [("log", 1.0), ("gaussian", 1e-6)])
def test_beside_a_row(backend: str, b: int, weighting: str, sigma: float) -> None:
    """r = 1e-6: the gradient is made of differences that float32 sums would cancel."""
    data = normal(30, 40, dtype=F32)
    x = (data[:b].double() + 1e-6 * normal(b, 40, seed=1)).float()
    query, rows = query_of(x, sigma, weighting=weighting), Rows(data)
    got, grads, back = _backward(backend, query, rows, 0)
    want = oracle.gradients(query, rows, grads)
    # Triton's <g, y - mean> has the rounding of the mean, which is float32; where the logits are
    # linear in r^2 it drops out.
    rounded = 2**-24 * grads.mean.norm() * got.mean.norm() if weighting == "log" else 0.0
    allowed = 1e-6 + (rounded if backend == "triton" else 0.0)
    for a, e in zip(back[:3], want[:3], strict=True):
        assert (a.double() - e).abs().max() <= allowed * e.abs().max() + 1e-9


@pytest.mark.parametrize("d", [3, 300])
@every_backend
def test_narrow_conditions_where_one_row_has_nearly_all_weight(backend: str, d: int) -> None:
    """1 / h^3 is large: of a gradient for the mean, what its rounding to float32 leaves of sum w
    (y - mean) must not reach them."""
    query, rows = Case(40, 60, d, sigma=0.3 * d**0.5, offset=30, own="condition", h=0.1).problem()
    got = harness.posterior(backend, query, rows)
    zero = torch.zeros(40, dtype=F64)
    grads = BasicSums(normal(40, d, dtype=F32), zero, zero, zero, zero)
    back = harness.backward(backend, query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    assert (want.bandwidth.abs() < 1e-6).sum() > 5
    for a, e in (
        (back.condition, want.condition),
        (back.bandwidth[:, None], want.bandwidth[:, None]),
    ):
        allowed = 1e-4 * e.abs().amax(1) + 1e-9
        assert ((a - e).abs().amax(1) <= allowed).all(), (a - e).abs().amax(1) / allowed


@every_backend
def test_float32_queries_on_float64_rows(backend: str) -> None:
    """The mean that x's type rounded must not enter: rows are float64, and so is the gradient."""
    query, rows = Case(9, 60, 40, F64, sigma=3.0).problem()
    query = query._replace(bias=torch.linspace(-1, 1, 60, dtype=F64))
    got = harness.posterior(backend, query, rows)
    grads = random_like(cases.basic(got), 0)
    grads = grads._replace(mean=1e3 * random_like(got, 1).mean)
    back = harness.backward(backend, query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    for a, e in zip(back[1:], want[1:], strict=True):
        assert e.numel() == 0 or (a - e).abs().max() <= 1e-10 * e.abs().max()
    assert (back.x.double() - want.x).abs().max() <= 1e-7 * want.x.abs().max()


@over(sized(5, 300, triton=(5, 300)), "d")
def test_far_offsets(backend: str, d: int) -> None:
    query, rows = Case(2, 4, d, U8, sigma=0.5, alpha=0.9, temperature=1.1).problem()
    found = []
    for stored in (rows, cases.far_apart(rows, harness.device_of(backend))):
        got = harness.posterior(backend, query, rows)
        found.append(harness.backward(backend, query, stored, got, got))
    compare.equal(*found)


@every_backend
def test_no_query(backend: str) -> None:
    query, rows = Case(2, 5, 3).problem()
    none = query.take(slice(0, 0))._replace(bias=torch.zeros(5, dtype=F64))
    got = harness.posterior(backend, none, rows)
    back = harness.backward(backend, none, rows, got, got)
    assert back.x.shape == (0, 3) and all(v.shape == (0,) for v in back[1:4])
    assert torch.equal(back.bias, torch.zeros(5, dtype=F64))


# --- for the rows -------------------------------------------------------------------------------


def _row_gradient(
    backend: str, query: Query, rows: Rows, grads: Sums
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backend's and the definition's."""
    got = harness.backward_rows(backend, query, rows, grads)
    return got, oracle.row_gradient(query, rows, grads)


def _grads(query: Query, seed: int) -> BasicSums:
    return random_like(BasicSums(query.x, *[query.sigma] * 4), seed)


@over(cases.row_gradients, "group", backends=INSTALLED)
@pytest.mark.one_of(2)
def test_rows_as_autograd_through_the_definition(backend: str, group: list[Case]) -> None:
    for case in group:
        query, rows = case.problem()
        got, want = _row_gradient(backend, query, rows, _grads(query, case.b))
        compare.row_gradient(got, want, rows, compare.unit(backend, query, rows), str(case))


@plain_backends
def test_rows_with_a_unit_and_a_stride(backend: str) -> None:
    query, rows = Case(5, 70, 20, F16, sigma=3.0, alpha=0.8).problem()
    data = torch.cat([rows.data, rows.data], 1)[:, 7:27]
    rows = Rows(data, 0.7, 0.2)
    assert not data.is_contiguous()
    got, want = _row_gradient(backend, query, rows, _grads(query, 1))
    assert (got.double() - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize(("weighting", "sigma"), [("log", 1.0), ("gaussian", 1e-6)])
@plain_backends
def test_rows_beside_a_query(backend: str, weighting: str, sigma: float) -> None:
    """r = 1e-6, and an alpha that float32 does not hold: nothing may cancel."""
    data = normal(30, 40, dtype=F32)
    alpha = 0.9 if weighting == "gaussian" else 1.0
    x = (alpha * data[:2].double() + 1e-6 * normal(2, 40, seed=1)).float()
    query, rows = query_of(x, sigma, alpha, weighting=weighting), Rows(data)
    got, want = _row_gradient(backend, query, rows, _grads(query, 0))
    for n in range(2):
        assert (got[n].double() - want[n]).abs().max() <= 1e-6 * want[n].abs().max()


@plain_backends
def test_rows_follow_the_mean_alone(backend: str) -> None:
    """One row has all the weight: what is left is g, and not what the mean's rounding does to it,
    which x - alpha y over sigma^2 would make large."""
    data = 10 + normal(20, 300, dtype=F32)
    x = (data[3:4].double() + 1e-3 * normal(1, 300, seed=1)).float()
    query, zero = query_of(x, 1e-3), torch.zeros(1, dtype=F64)
    grads = BasicSums(normal(1, 300, seed=2, dtype=F32), zero, zero, zero, zero)
    got = harness.backward_rows(backend, query, Rows(data), grads)
    assert (got[3] - grads.mean[0]).abs().max() <= 1e-4 * grads.mean.abs().max()


@pytest.mark.parametrize(
    ("weighting", "sigma"), [("gaussian", 0.0), ("gaussian", 1.0), ("log", 1.0)]
)
@plain_backends
def test_rows_of_exact_hits(backend: str, weighting: str, sigma: float) -> None:
    """At a limit ties share g by their weights, and nothing else moves."""
    data = normal(9, 4, dtype=F32)
    data[5] = data[2]
    x = torch.cat([data[2:3], data[2:3] + 0.1, data[2:3]])
    query = query_of(x, sigma, 1.0, 1.3, normal(9, seed=1), weighting)
    rows, grads = Rows(data), _grads(query, 2)
    if weighting == "log":  # log_z is infinite, and has no gradient
        for v in grads[1:3]:
            v[::2] = 0
    got, want = _row_gradient(backend, query, rows, grads)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got, harness.backward_rows(backend, query, rows, grads))
    query.x[0] = math.nan
    assert torch.isnan(harness.backward_rows(backend, query, rows, grads)).all()


# --- second derivatives -------------------------------------------------------------------------


@over(cases.second_derivatives, "case", backends=INSTALLED)
def test_second_derivatives_as_autograd_through_the_definition(backend: str, case: Case) -> None:
    """With rows left out too: a bias of -inf must not make 0 times infinity of anything."""
    query, rows = case.problem()
    sums = oracle.sums(query, rows)
    grads = random_like(cases.basic(sums), 1)._replace(mean=random_like(query[:1], 1)[0])
    first = oracle.gradients(query, rows, grads)
    seeds = random_like(first, 2)._replace(x=random_like(query[:1], 2)[0])
    heads, tails = harness.double_backward(backend, query, rows, grads, seeds)
    want = oracle.second(query, rows, grads, seeds)
    kind = compare.unit(backend, query, rows)
    assert all(torch.isfinite(v).all() for v in (*heads, *tails))
    heads = [g for g, v in zip(heads, query.tensors, strict=True) if v is not None]
    compare.second_derivatives(heads, want[0], kind, (str(case), "query"))
    compare.second_derivatives(tails, want[1], kind, (str(case), "grads"))
