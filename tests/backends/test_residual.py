"""The residual alpha mean - x, and what is formed from it, relative to the distances that matter:
however far the rows lie from the origin, from each other, and from a few others."""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import TrainingSet
from memokern.calls import BasicSums, Rows
from tests import cases, compare, harness, oracle
from tests.cases import F32, F64, U8, normal, query_of
from tests.harness import every_backend


def check(backend: str, x: torch.Tensor, rows: Rows, sigma: float, **more: object) -> None:
    query = query_of(x, sigma, **more)
    if harness.refusal(backend, "posterior", x, rows) is not None:
        return
    got, want = harness.posterior(backend, query, rows), oracle.sums(query, rows)
    kind = compare.unit(backend, query, rows)
    compare.residuals(got, want, query, rows, kind, (sigma, *rows.data.shape))


@every_backend
@pytest.mark.parametrize("b", [3, 40])
def test_places_and_a_small_bandwidth(backend, b):
    """Longitude and latitude: rows some 10 apart, and weights within 1e-3."""
    rows = normal(300, 2) * torch.tensor([10.0, 5.0]) + torch.tensor([8.0, 47.0])
    rows = Rows(rows.float())
    near = rows.data[:b] + 1e-3 * normal(b, 2, seed=1).float()
    for alpha in (1.0, 0.7):
        x = (alpha * near.double()).float() if alpha != 1 else near
        for sigma in (1e-3, 0.03, 1.0):
            if backend != "triton" or (sigma == 1e-3 and b == 3):
                check(backend, x, rows, sigma, alpha=alpha)


@every_backend
@pytest.mark.parametrize("d", [3, 40, 300])
def test_clusters_far_apart(backend, d):
    if backend == "triton" and d == 40:
        pytest.skip("interpreted: the others take both ways")
    data = normal(40, d, dtype=F32)
    data[20:] += 1e5
    x = data[[3, 30]] + 0.5 * normal(2, d, seed=1).float()
    for sigma in (0.5, 5.0):
        check(backend, x, Rows(data), sigma)
    check(backend, x, Rows(data), 0.5, bias=normal(40), temperature=1.3)


@harness.plain_backends
@pytest.mark.parametrize("far", [1e6, 1e10, 9.97e36])
def test_one_far_row_leaves_the_others_alone(backend, far):
    """It may have weight or not: the mean of the others keeps its digits, dense and pruned."""
    if harness.device_of(backend).type != "cpu":
        pytest.skip("its tensors do not lie on the CPU")
    if backend == "triton" and far != 1e10:
        pytest.skip("interpreted: one is enough")
    for d in (3,) if backend == "triton" else (3, 40):
        rows, x = normal(100, d, dtype=F32), normal(5, d, seed=1, dtype=F32)
        rows[17] = far
        bias = torch.zeros(100, dtype=F64)
        bias[17] = -math.inf
        others = torch.cat([rows[:17], rows[18:]])
        want = oracle.sums(query_of(x, 1.0), Rows(others))
        with harness.preferred(backend):
            for data, b in (
                (rows, None), (rows, bias), (TrainingSet(rows), None), (TrainingSet(rows), bias),
                (TrainingSet(rows, log_weights=bias), None),
            ):  # fmt: skip
                got = memokern.posterior(x, data, 1.0, bias=b)
                assert (got.mean - want.mean).norm() <= 1e-5 * want.mean.norm()
                assert (got.residual - want.residual).norm() <= 1e-5 * want.residual.norm()


@every_backend
def test_hits_leave_no_residual(backend):
    data = normal(30, 40, dtype=F32) + 100
    data[20] = data[2]
    for sigma in (0.0, 1e-3):
        query = query_of(data[:4].clone(), sigma)
        got = harness.posterior(backend, query, Rows(data))
        assert not got.residual.any() and torch.equal(got.mean, data[:4])


def test_the_score_of_a_density_estimate():
    rows = (normal(500, 2) * 10 + 40).float()
    x = rows[:9] + 1e-3 * normal(9, 2, seed=1).float()
    want = oracle.sums(query_of(x, 1e-3), Rows(rows)).residual / 1e-6
    for data in (rows, TrainingSet(rows)):
        for call in (x, x.clone().requires_grad_()):
            got = memokern.score(call, data, 1e-3).detach()
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@every_backend
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.1])
def test_queries_at_a_center_that_is_a_row_of_bytes(backend, n, sigma):
    """Where all rows are equal, the center is one, and nothing is left of a query at it."""
    bytes_ = torch.randint(0, 256, (1, 257), generator=torch.Generator().manual_seed(2))
    rows = Rows(bytes_.to(U8).expand(n, -1).contiguous(), *cases.UINT8_UNIT)
    x = 0.4 * oracle.values(rows)[[0, 0, 0]] + sigma * normal(3, 257, seed=1)
    x[0] = 0.4 * oracle.values(rows)[0]
    for given in (rows, cases.with_norms(rows)):
        check(backend, x.float(), given, sigma, alpha=0.4, temperature=1.7)


@every_backend
@pytest.mark.parametrize("sigma", [1e-8, 1e-9])
def test_gradients_where_a_logit_has_no_digits_left(backend, sigma):
    """|x - y| / sigma = 1e8: weights of equal rows follow the bias and the temperature."""
    data = normal(20, 3)
    data[10] = data[0]
    bias = torch.zeros(20, dtype=F64)
    bias[10] = 0.7
    rows = Rows(data)
    query = query_of(data[:2] + 0.3, sigma, temperature=2.0, bias=bias)
    if harness.refusal(backend, "posterior_backward", query.x, rows) is not None:
        pytest.skip("it has no kernel for float64")
    sums = oracle.sums(query, rows)
    zero = torch.zeros(2, dtype=F64)
    grads = BasicSums(normal(2, 3, seed=3), zero, zero, zero + 1, zero)
    got = harness.backward(backend, query, rows, sums, grads)
    want = oracle.gradients(query, rows, grads)
    torch.testing.assert_close(got.bias, want.bias, rtol=1e-6, atol=1e-9)


@every_backend
@pytest.mark.parametrize("unit", [2.0**20, 2.0**-20])
def test_log_weights_in_another_unit(backend, unit):
    """All logits then move by the same 4e3, whose last place is all that the gradient for the
    temperature may lose: differences of logits alone decide on it."""
    data, x, zero = normal(8, 300), normal(5, 300, seed=1), torch.zeros(5, dtype=F64)
    grads = BasicSums(normal(5, 300, seed=2), zero + 1, zero + 1, zero, zero + 1)
    query, rows = query_of(x, 1.0, weighting="log"), Rows(data)
    if harness.refusal(backend, "posterior_backward", x, rows) is not None:
        pytest.skip("it has no kernel for float64")
    want = oracle.gradients(query, rows, grads).temperature
    moved, there = query_of(unit * x, 1.0, weighting="log"), Rows(unit * data)
    grads = grads._replace(mean=grads.mean / unit)
    truth = oracle.gradients(moved, there, grads).temperature
    torch.testing.assert_close(truth, want, rtol=1e-13, atol=1e-13)
    sums = oracle.sums(moved, there)
    got = harness.backward(backend, moved, there, sums, grads).temperature
    place = 2.0**-52 * sums.mean_logit.abs().max().item()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=8 * place)


@harness.plain_backends
def test_rows_that_are_all_left_out_have_gradient_0(backend):
    rows = Rows(cases.normal(6, 3, dtype=F32))
    bias = torch.full((6,), -math.inf, dtype=F64)
    query = query_of(cases.normal(2, 3, dtype=F32), 0.0, bias=bias)
    zero = torch.zeros(2, dtype=F64)
    sums = BasicSums(torch.zeros(2, 3), zero, zero, zero, zero)
    ones = BasicSums(torch.ones(2, 3), zero + 1, zero + 1, zero + 1, zero + 1)
    if backend == "cpu":
        got = harness.backward(backend, query, rows, sums, ones)
        assert not any(v.any() for v in got)
