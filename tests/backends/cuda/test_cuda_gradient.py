"""The CUDA backward sweep for wide rows, on the emulator, against autograd through the
definition."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from memokern.calls import BasicSums, Query, Rows
from tests import cases, compare, cuda_emulator, oracle
from tests.backends.cuda import kernels
from tests.backends.cuda.kernels import Variant
from tests.backends.cuda.test_cuda_sweep import LOG, LONG, VARIANTS, D
from tests.cases import F16, F32, F64, U8, Case

pytestmark = pytest.mark.skipif(
    cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing())
)


def _usual(types: Iterable[torch.dtype], *kept: torch.dtype) -> list[Any]:
    """Each row type has a program of its own to compile: all but these are for the long run."""
    return [t if t in kept else pytest.param(t, marks=pytest.mark.long) for t in types]


def _check(case: Case, variant: Variant, **how: int) -> None:
    """The gradients of a case, for random gradients of its sums."""
    query, rows = case.problem()
    _compare(query, _known(rows), variant, case, **how)


def _known(rows: Rows) -> Rows:
    rows = cases.with_norms(rows)
    return rows._replace(center=rows.center.double())


def _compare(query: Query, rows: Rows, variant: Variant, what: object, **how: int) -> None:
    sums = oracle.sums(query, rows)
    known = cases.basic(sums)._replace(mean=sums.mean.float())
    grads = cases.random_like(known, seed=5)
    got = kernels.backward(query, rows, known, grads, variant, **how)
    want = oracle.gradients(query, rows, grads)
    compare.gradients(got, want, sums, query, F32, str(what))


@pytest.mark.parametrize("dtype", _usual(VARIANTS, U8), ids=cases.name_of)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0, 30.0])
@pytest.mark.one_of(2)
def test_as_autograd_through_the_definition(dtype: torch.dtype, sigma: float) -> None:
    """Ragged last tile; biases, temperatures and alphas; more and fewer rows than a tile."""
    for seed, n in enumerate((1, 30, 90)):
        case = Case(3, n, D, dtype, sigma=sigma, alpha=-0.9 if n == 30 else 0.9, temperature=1.3,
                    seed=seed, bias="holes" if n == 90 else None)  # fmt: skip
        _check(case, VARIANTS[dtype], seed=seed)


@pytest.mark.parametrize("dtype", _usual(LOG, U8), ids=cases.name_of)
def test_weighting_log(dtype: torch.dtype) -> None:
    for bias in (None, "hole"):
        case = Case(3, 70, D, dtype, alpha=0.9, bias=bias, weighting="log", temperature=20.0)
        _check(case, LOG[dtype])


@pytest.mark.parametrize("dtype", _usual((U8, F32), U8), ids=cases.name_of)
def test_near_duplicates_and_offsets(dtype: torch.dtype) -> None:
    for case in (
        Case(4, 70, D, dtype, sigma=0.05, repeat=1e-3),
        Case(4, 70, D, dtype, sigma=0.5, offset=100.0),
        Case(4, 70, D, dtype, sigma=200.0, offset=100.0, bias="normal"),
    ):
        _check(case, VARIANTS[dtype])


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
def test_at_the_limit(weighting: str) -> None:
    """At sigma = 0, and where "log" hits a row: only the biases of the nearest rows and the
    temperature move anything. Autograd through the definition has no such point, so that the
    formulas stand here: with b the biases, d mean / d b_n = w_n (y_n - mean) / T."""
    query, rows = Case(3, 90, D, U8, bias="hole", weighting=weighting, temperature=1.3).problem()
    rows.data[60] = rows.data[7]
    rows = _known(rows)
    y = oracle.values(rows)
    bias = query.bias.clone()
    bias[7], bias[60] = 0.3, -0.2
    query = query._replace(x=y[[7, 30, 80]].float(), sigma=torch.zeros(3, dtype=F64), bias=bias,
                           alpha=torch.ones(3, dtype=F64))  # fmt: skip
    sums = oracle.sums(query, rows)
    known = cases.basic(sums)._replace(mean=sums.mean.float())
    grads = cases.random_like(known, seed=5)
    got = kernels.backward(
        query, rows, known, grads, LOG[U8] if weighting == "log" else VARIANTS[U8]
    )
    assert torch.equal(got.x, torch.zeros(3, D))
    assert torch.equal(got.sigma, torch.zeros(3, dtype=F64))
    assert torch.equal(got.alpha, torch.zeros(3, dtype=F64))
    want_bias, want_t = torch.zeros(90, dtype=F64), torch.zeros(3, dtype=F64)
    for b, nearest in enumerate(([7, 60], [30], [80])):
        t, some = query.temperature[b], bias[nearest]
        w = torch.softmax(some / t, 0)
        off = some - known.mean_bias[b]
        # log_z and mean_logit are infinite where "log" hits a row, and have no gradient.
        of_z, of_e = (grads.log_z[b], grads.mean_logit[b]) if weighting == "gaussian" else (0, 0)
        h = (y[nearest] - known.mean[b]) @ grads.mean[b].double() + (
            of_e + grads.mean_bias[b]
        ) * off
        h = (h + 2 * grads.weight_sq[b] * (w - known.weight_sq[b])) / t
        want_bias[nearest] = w * (of_z + of_e + grads.mean_bias[b] + h)
        gap = known.log_z[b] - known.mean_logit[b] if weighting == "gaussian" else 0
        want_t[b] = of_z * gap / t - (w * off * h).sum() / t
    torch.testing.assert_close(got.bias, want_bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.temperature, want_t, rtol=1e-5, atol=1e-5)


def test_a_sigma_so_small_that_the_nearest_row_has_all_weight() -> None:
    """log_z is finite there, and follows the bias."""
    case = Case(3, 40, D, U8, bias="hole", temperature=1.3)
    query, rows = case.problem()
    query = query._replace(sigma=torch.full((3,), 1e-17, dtype=F64))
    rows = _known(rows)
    sums = oracle.sums(query, rows)
    known = cases.basic(sums)._replace(mean=sums.mean.float())
    assert torch.isfinite(known.log_z).all()
    grads = cases.random_like(known, seed=5)
    got = kernels.backward(query, rows, known, grads, VARIANTS[U8])
    want = oracle.gradients(query, rows, grads)
    torch.testing.assert_close(got.bias, want.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_a_row_that_is_not_finite_makes_every_gradient_nan(sigma: float) -> None:
    query, rows = Case(2, 40, D, F32, sigma=sigma, bias="hole").problem()
    rows.data[7, 3] = math.nan
    rows = _known(rows)
    sums = BasicSums(torch.full((2, D), math.nan), *torch.full((4, 2), math.nan, dtype=F64))
    grads = cases.random_like(sums, seed=5)
    got = kernels.backward(query, rows, sums, grads, VARIANTS[F32])
    assert all(torch.isnan(v).all() for v in got[:4]) and torch.isnan(got.bias).any()


def test_a_lost_query_has_no_gradient_and_its_neighbours_theirs() -> None:
    query, rows = Case(3, 40, D, U8, bias="hole").problem()
    rows = _known(rows)
    sums = oracle.sums(query, rows)
    known = cases.basic(sums)._replace(mean=sums.mean.float())
    grads = cases.random_like(known, seed=5)
    clean = kernels.backward(query, rows, known, grads, VARIANTS[U8])
    x, mean = query.x.clone(), known.mean.clone()
    x[1, 5], mean[1] = math.nan, math.nan
    lost = BasicSums(mean, *(v.index_fill(0, torch.tensor(1), math.nan) for v in known[1:]))
    got = kernels.backward(query._replace(x=x), rows, lost, grads, VARIANTS[U8])
    for a, e in zip(got[:4], clean, strict=False):
        assert torch.isnan(a[1]).all()
        compare.equal([a[[0, 2]]], [e[[0, 2]]])
    assert torch.isnan(got.bias[0]) and not torch.isnan(got.bias[1:]).any()


@pytest.mark.parametrize("dtype", _usual((U8, F16), U8), ids=cases.name_of)
def test_order_of_threads_does_not_matter(dtype: torch.dtype) -> None:
    """To the bit; nor does it how many other queries there are."""
    query, rows = Case(5, 150, D, dtype, sigma=2.0, bias="normal").problem()
    rows = _known(rows)
    sums = oracle.sums(query, rows)
    known = cases.basic(sums)._replace(mean=sums.mean.float())
    grads = cases.random_like(known, seed=5)
    want = kernels.backward(query, rows, known, grads, VARIANTS[dtype])
    for seed in (1, 2):
        got = kernels.backward(query, rows, known, grads, VARIANTS[dtype], seed=seed)
        compare.equal(got, want)
    part = slice(1, 3)
    some = kernels.backward(
        query.take(part), rows, BasicSums(*(v[part].contiguous() for v in known)),
        BasicSums(*(v[part].contiguous() for v in grads)), VARIANTS[dtype],
    )  # fmt: skip
    compare.equal(some[:4], [v[part] for v in want[:4]])


@pytest.mark.long
@pytest.mark.parametrize("variant", [v for v in LONG if v.queries <= 32], ids=str)
@pytest.mark.parametrize("dtype", VARIANTS, ids=cases.name_of)
def test_other_variants(variant: Variant, dtype: torch.dtype) -> None:
    for b, sigma in ((1, 0.1), (variant.queries, 1.0)):
        case = Case(b, 150, D, dtype, sigma=sigma, bias="normal")
        _check(case, variant, seed=b)
        _check(replace(case, weighting="log", temperature=20.0), variant, seed=b)
