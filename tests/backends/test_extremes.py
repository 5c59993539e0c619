"""Distances beside a bias that is larger than they are, and gradients of queries whose rows are far
for their noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memokern import TrainingSet
from memokern.calls import BasicSums, Query, RowLists, Rows, State, Sums, by_key, merge, to_sums
from tests import compare, harness, oracle
from tests.cases import F32, F64, U8, Case, normal, query_of
from tests.harness import every_backend, over, sized


def squares(got: Sums, query: Query) -> Tensor:
    """sum w |x - alpha y|^2 from what a sweep gives."""
    return -2 * query.sigma.square() * (got.mean_logit - got.mean_bias)


def check_squares(got: Sums, query: Query, rows: Rows, backend: str, what: object) -> None:
    want = oracle.reach(query, rows).square()
    # float64: as exact as a logit is, whose bias may be large.
    kind = compare.unit(backend, query, rows)
    last = 8 * 2.3e-16 * query.sigma.square() * (1 + query.bias[query.bias.isfinite()].abs().max())
    tol = {F32: 2e-6, F64: 1e-13}[kind] * want + last
    off = ((squares(got, query) - want).abs() / tol).max()
    assert off <= 1, (what, off.item())


@over(
    sized(
        *((b, 150, d, t) for b in (3, 24) for d in (3, 40) for t in (F32, U8, F64)),
        triton=((2, 40, 3, F32), (2, 40, 40, U8), (2, 40, 300, F32)),
    ),
    "b",
    "n",
    "d",
    "rows",
)
@pytest.mark.one_of(2)
def test_distances_beside_a_bias(backend: str, b: int, n: int, d: int, rows: torch.dtype) -> None:
    """Of the logits little is left for r^2: at sigma = 80 each unit of the bias is 12800 of it."""
    sigmas = (80.0, 1e3) if backend != "triton" else (1e3,)
    for sigma in sigmas:
        for temperature in (1.0, 2.5):
            case = Case(b, n, d, rows, sigma=sigma, temperature=temperature, bias="hole")
            query, stored = case.problem()
            query = query._replace(x=oracle.values(stored)[:b].float() + 0.1, bias=3 * query.bias)
            got = harness.posterior(backend, query, stored)
            check_squares(got, query, stored, backend, str(case))
            joined = _joined(backend, query, stored, n // 3)
            check_squares(to_sums(joined, query), query, stored, backend, ("joined", str(case)))


def _joined(backend: str, query: Query, rows: Rows, cut: int) -> State:
    """The state of two parts of the rows."""
    parts = [
        harness.posterior_state(
            backend, query._replace(bias=query.bias[at]), rows._replace(data=rows.data[at])
        )
        for at in (slice(0, cut), slice(cut, None))
    ]
    return merge(*parts, by_key(query))


@over(sized((2, 40, 3), (20, 40, 40), triton=((2, 20, 3), (2, 20, 300))), "b", "n", "d")
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradients_of_far_queries(backend: str, b: int, n: int, d: int, temperature: float) -> None:
    """At |x - y| = 10^8 sigma, log_z / T has no digit left behind the point. Equal rows share."""
    data = normal(n, d, dtype=F32)
    data[n // 2 :] = data[: n - n // 2]
    x = data[:b] + torch.linspace(0.5, 1.0, b)[:, None] / math.sqrt(d)
    bias = normal(n, seed=3)
    query, rows = query_of(x, 1e-8, 0.9, temperature, bias), Rows(data)
    got = harness.posterior(backend, query, rows)
    # Of what equal rows share nothing moves the mean; these have gradients.
    zero = torch.zeros(b, dtype=F64)
    grads = BasicSums(torch.zeros(b, d), *(normal(b, seed=i) for i in (1, 2, 3)), zero)
    back = harness.backward(backend, query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    for name, a, e in zip(back._fields, back, want, strict=True):
        if e.numel() == 0 or (backend == "reference" and name == "temperature"):
            continue  # not there, or log_z - mean_logit of numbers that have no more digits
        off = (a.double() - e).abs().max() / e.abs().max()
        assert off <= 1e-6, (name, off.item())


@over(
    sized(
        *((b, n, d, t) for b in (2, 40) for n, d in ((40, 3), (900, 40)) for t in (F32, F64)),
        triton=(),  # which knows a logit to about 1e-16 of itself
    ),
    "b",
    "n",
    "d",
    "rows",
)
@pytest.mark.parametrize("sigma", [1e-6, 1e-9, 1e-12, 1e-14])
@pytest.mark.one_of(2)
def test_equal_rows_share_by_their_bias_however_far_they_are(
    backend: str, b: int, n: int, d: int, rows: torch.dtype, sigma: float
) -> None:
    """At r^2 / sigma^2 of 10^12 to 10^28, beside which a bias has no digits left. Copies lie in the
    other half of the rows, and the nearest one comes after farther ones."""
    half = n // 2
    data = normal(half, d, dtype=rows).repeat(2, 1)
    x = data[max(0, half - b) : half] + 0.5 / math.sqrt(d)
    query, stored = query_of(x, sigma, 0.9, 1.3, normal(n, seed=3)), Rows(data)
    want = oracle.sums(query, stored)
    joined = to_sums(_joined(backend, query, stored, half), query)
    for got in (harness.posterior(backend, query, stored), joined):
        for name in ("mean_bias", "weight_sq"):
            off = (getattr(got, name) - getattr(want, name)).abs().max()
            assert off <= 1e-6, (name, off.item())
        assert (got.mean.double() - want.mean).abs().max() <= 1e-6 * want.mean.abs().max()
        torch.testing.assert_close(got.log_z, want.log_z, rtol=1e-14, atol=0)


@every_backend
def test_gradient_where_one_row_has_nearly_all_weight(backend: str) -> None:
    """The weight of the others, 10^-5, makes all of it: its error is that of a share of theirs."""
    d = 3
    data = normal(20, d, dtype=F32)
    data[1] = data[0] + 0.048 / math.sqrt(d)
    x = data[:1] - 0.0002 / math.sqrt(d)
    query, rows = query_of(x, 0.01), Rows(data)
    got = harness.posterior(backend, query, rows)
    zero = torch.zeros(1, dtype=F64)
    grads = BasicSums(normal(1, d, seed=4).float(), zero, zero, zero, zero)
    back = harness.backward(backend, query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    assert 1e-6 < 1 - float(oracle.weights(query, rows).max()) < 1e-4
    tol = 1e-4 if backend == "triton" else 1e-5  # Triton rounds the mean to float32
    assert (back.x.double() - want.x).norm() <= tol * want.x.norm()


@every_backend
@pytest.mark.parametrize("sigma", [1e-8, 1e-17])
def test_what_has_all_weight_moves_nothing(backend: str, sigma: float) -> None:
    """What rounding leaves of a gradient for the weights would be divided by sigma^2. The last
    query hits a row."""
    b, n, d = 3, 40, 5
    data = normal(n, d, dtype=F32)
    x = data[:b] + torch.tensor([0.3, 0.02, 0.0])[:, None]
    query, rows = query_of(x, sigma, 1.0, 1.3, normal(n, seed=3)), Rows(data)
    got = harness.posterior(backend, query, rows)
    zero = torch.zeros(b, dtype=F64)
    grads = BasicSums(normal(b, d, seed=4).float(), zero, zero, zero, normal(b, seed=5))
    back = harness.backward(backend, query, rows, got, grads)
    for name in ("x", "sigma", "alpha"):
        assert getattr(back, name).abs().max() == 0, name
    # log_z, mean_logit and mean_bias move, with the bias too: log_z is finite.
    grads = BasicSums(torch.zeros(b, d), *(normal(b, seed=i) for i in (1, 2, 3)), zero)
    back = harness.backward(backend, query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    # Triton's kernels take such a noise for 0 where it moves the query.
    for name in ("bias",) if backend == "triton" and sigma < 1e-8 else ("x", "bias"):
        a, e = getattr(back, name), getattr(want, name)
        assert (a.double() - e).abs().max() <= 1e-6 * e.abs().max(), name


@over(
    sized(
        *((b, n, d) for b in (2, 40) for n, d in ((20, 3), (700, 3), (700, 40))),
        triton=((2, 40, 3), (2, 40, 300)),
    ),
    "b",
    "n",
    "d",
)
@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.one_of(2)
def test_a_row_that_is_no_number_leaves_nothing_known(
    backend: str, b: int, n: int, d: int, weighting: str
) -> None:
    """Whether the caller knows of it by a norm or not. A backend's center may or may not be taken
    of it."""
    for sigma in (0.0, 0.7) if weighting == "gaussian" else (1.0,):
        for lost in (4, n - 3):
            data = normal(n, d, dtype=F32)
            data[lost, 1] = math.nan
            bias = normal(n, seed=3)
            grads = BasicSums(normal(b, d, seed=4).float(), *(normal(b, seed=i) for i in range(4)))
            query = query_of(normal(b, d, seed=9, dtype=F32), sigma, 1.0, 1.3, bias, weighting)
            known = TrainingSet(data, check=False).as_rows()
            about = torch.zeros(d)
            norms = known.values(slice(None)).square().sum(1)
            # Where the caller has a center that is known, Triton takes all rows to be.
            own = () if backend == "triton" else (Rows(data, center=about, sq_norms=norms),)
            for rows in (Rows(data), known, *own):
                what = (sigma, lost, rows.center is None)
                for plain in (query, query._replace(bias=None)):
                    got = harness.posterior(backend, plain, rows)
                    assert all(bool(value.isnan().all()) for value in got), what
                state = harness.posterior_state(backend, query, rows)
                assert bool(to_sums(state, query).log_z.isnan().all()), what
                got = harness.posterior(backend, query, rows)
                back = harness.backward(backend, query, rows, got, grads)
                for value in (back.x, back.sigma, back.temperature):
                    assert bool(value.isnan().all()), what
                assert bool(back.bias.isnan().any()), what


# Triton's lists at sigma = 0 do not ask: they are of rows that a training set has checked.
@over(sized(0.0, 0.7, triton=(0.7,)), "sigma")
def test_a_listed_row_that_is_no_number_leaves_nothing_known(backend: str, sigma: float) -> None:
    """Of the queries whose lists have it."""
    n, d = 300, 5
    data, bias = normal(n, d, dtype=F32), normal(n, seed=3)
    data[7, 1] = math.nan
    query, rows = query_of(data[:3] + 0.1, sigma, bias=bias), Rows(data)
    lists = RowLists(
        torch.tensor([0, 3, 6, 296]), torch.tensor([1, 7, 3, 1, 2, 3, *range(10, 300)])
    )
    lists.index[200] = 7
    got = harness.listed(backend, query, rows, lists)
    grads = BasicSums(normal(3, d, seed=4).float(), *(normal(3, seed=i) for i in range(4)))
    back = harness.listed_backward(backend, query, rows, lists, got, grads)
    for value in (*got, back.x, back.sigma, back.alpha, back.temperature):
        lost = value.flatten(1) if value.dim() > 1 else value[:, None]
        assert lost[[0, 2]].isnan().all() and not lost[1].isnan().any()


@over(
    sized((2, 40, 3), (40, 40, 3), (2, 60, 40), (40, 60, 40), triton=((2, 20, 3),)), "b", "n", "d"
)
@pytest.mark.parametrize("power", [-85, -66, -50, 50, 66, 100, 118])
def test_units_do_not_matter(backend: str, b: int, n: int, d: int, power: int) -> None:
    """Data in units in which squares leave the range of float32: 4e-26 to 3e35."""
    unit = 2.0**power
    data = normal(n, d, dtype=F32)
    x = data[:b] + 0.3 * normal(b, d, seed=2, dtype=F32)
    plain = query_of(x, 0.5 * math.sqrt(d), 1.0, 1.3, normal(n, seed=3))
    query, rows = plain._replace(x=x * unit, sigma=plain.sigma * unit), Rows(data * unit)
    got, want = harness.posterior(backend, query, rows), oracle.sums(plain, Rows(data))
    in_units = got._replace(mean=got.mean.double() / unit, residual=got.residual.double() / unit)
    kind = compare.unit(backend, query, rows)
    for name, a, e in zip(got._fields, in_units, want, strict=True):
        tol = {F32: 2e-5, F64: 2e-7}[kind] * (1 + e.abs().max())
        assert (a.double() - e).abs().max() <= tol, name
    grads = BasicSums(normal(b, d, seed=4), *(normal(b, seed=i) for i in range(4)))
    given = grads._replace(mean=(grads.mean / unit).float())
    back = harness.backward(backend, query, rows, got, given)
    want = oracle.gradients(plain, Rows(data), grads)
    sizes = {"x": unit, "sigma": unit}
    for name, a, e in zip(back._fields, back, want, strict=True):
        if e.numel():
            off = (a.double() * sizes.get(name, 1.0) - e).abs().max() / e.abs().max()
            assert off <= {F32: 1e-4, F64: 2e-6}[kind], (name, off.item())


@over(sized((3, 700, 9), (70, 300, 40), triton=((3, 100, 9),)), "b", "n", "d")
@pytest.mark.parametrize("weighting", ["gaussian", "log"])
def test_gradients_for_biases_do_not_see_what_these_have_in_common(
    backend: str, b: int, n: int, d: int, weighting: str
) -> None:
    """A constant in all biases changes log_z alone. The mean that a backward pass is given is
    rounded; a bias that is made of large numbers would multiply what is left of that."""
    data = normal(n, d, dtype=F32) + 30
    query = query_of(data[:b] + 0.3, 0.8, 1.0, 1.3, normal(n, seed=3))
    query, rows = query._replace(weighting=weighting), Rows(data)
    got = harness.posterior(backend, query, rows)
    zero = torch.zeros(b, dtype=F64)
    grads = BasicSums(normal(b, d, seed=4).float(), zero, zero, zero, normal(b, seed=5))
    back = harness.backward(backend, query, rows, got, grads)
    size = float((grads.mean.norm(dim=1) * got.mean.norm(dim=1)).sum())
    # Triton's is as exact as a mean in float32.
    assert abs(float(back.bias.sum())) <= {"triton": 1e-6}.get(backend, 1e-12) * size


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rows_at_the_same_distance_are_taken_alike(backend: str, dtype: torch.dtype) -> None:
    """However far from the center they are: a query between two rows stays between them, and
    between two pairs of rows up to a rounding of their sum."""
    if backend not in harness.INSTALLED:
        pytest.skip("the compiled module is missing")
    pairs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 3.0], [-1.0, 3.0]], dtype=dtype)
    for count, allowed in ((2, 0.0), (4, 4 * torch.finfo(dtype).eps)):
        for center in ([0.0, 0.0], [1.0, 0.0]):
            data, about = pairs[:count], torch.tensor(center, dtype=F64)
            rows = Rows(data, center=about, sq_norms=(data.to(F64) - about).square().sum(1))
            for sigma in torch.logspace(-6, 1, 29).tolist():
                query = Case(3, count, 2, x=dtype, rows=dtype, sigma=sigma).problem()[0]
                x = torch.tensor([[0.0, -2.0], [0.0, 0.3], [0.0, 4.0]], dtype=dtype)
                mean = harness.posterior(backend, query._replace(x=x), rows).mean
                assert (mean[:, 0].abs() <= allowed).all(), (count, center, sigma)
