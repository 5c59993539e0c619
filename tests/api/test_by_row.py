"""What a sweep says of each row: sums of weights, and rows drawn by them."""

from __future__ import annotations

import pytest
import torch

import memokern
from memokern import TrainingSet
from tests import cases, harness
from tests.cases import F32, F64

N, D = 300, 3
ROWS = cases.normal(N, D, seed=1)
X = cases.normal(5, D, seed=2)


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def test_row_weights_are_the_sums_of_the_columns(backend):
    x, rows = X.to(F32), ROWS[:40].to(F32)
    x[1] = rows[7]
    sigma = torch.tensor([0.5, 0.0, 2.0, 0.0, 1e-3], dtype=F64)
    bias = cases.normal(40, seed=3)
    for data in (rows, TrainingSet(rows, log_weights=bias)):
        got = memokern.row_weights(x, data, sigma, 0.9, 1.3)
        want = memokern.weights(x, data, sigma, 0.9, 1.3).sum(0)
        assert got.dtype == F64
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.sum(), torch.tensor(5.0, dtype=F64), rtol=1e-5, atol=0)


def test_no_queries():
    assert memokern.row_weights(X[:0], ROWS, 0.5).tolist() == [0.0] * N
    assert memokern.draw(X[:0], ROWS, 0.5).shape == (0,)


def test_draws_have_the_weights_as_frequencies(backend):
    """Pearson's chi-square of 20,000 draws; the bound is passed by chance once in a million."""
    if backend == "triton":
        pytest.skip("interpreted kernels: of the same rows, as the next test shows")
    many, x = 20_000, X[:1].float()
    g = torch.Generator().manual_seed(1)
    bias = cases.normal(N, seed=3)
    data = TrainingSet(ROWS.float(), log_weights=bias)
    rows = memokern.draw(x.expand(many, D), data, 0.8, generator=g)
    expected = memokern.weights(x, data, 0.8)[0] * many
    often = expected >= 5
    counts = torch.bincount(rows, minlength=N).double()
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    k = len(seen) - 1
    chi2 = float(((seen - wanted).square() / wanted).sum())
    assert k > 20
    # The cube root of chi2 / k is nearly normal (Wilson and Hilferty, 1931).
    z = ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5
    assert abs(z) < 4.9


@pytest.mark.long_on("triton")
def test_a_seed_gives_the_same_rows_whoever_computes(backend):
    def drawn():
        g = torch.Generator().manual_seed(7)
        return memokern.draw(X.float().repeat(4, 1), ROWS[:40].float(), 0.7, generator=g)

    got = drawn()
    with harness.preferred("reference"):
        assert torch.equal(got, drawn())


def test_the_limits():
    cold = memokern.draw(X, ROWS, 0.5, 1.0, 1e-9)
    assert torch.equal(cold, memokern.weights(X, ROWS, 0.5).argmax(1))
    nearest = memokern.nearest(X, ROWS).index[:, 0]
    assert torch.equal(memokern.draw(X, ROWS, 0.0), nearest)
    g = torch.Generator().manual_seed(0)
    twice = torch.cat([ROWS[:1], ROWS[1:], ROWS[:1]])  # in the first stretch and in the last
    found = memokern.draw(ROWS[:1].expand(200, D), twice, 0.0, generator=g)
    counts = torch.bincount(found, minlength=N + 1)
    assert int(counts[0] + counts[N]) == 200 and 60 < int(counts[0]) < 140
    left_out = torch.zeros(N, dtype=F64)
    left_out[1:] = -torch.inf
    assert memokern.draw(X, ROWS, 100.0, bias=left_out).tolist() == [0] * 5


def test_shapes_and_errors():
    assert memokern.draw(X.reshape(5, 1, D), ROWS, 0.5).shape == (5, 1)
    with pytest.raises(ValueError, match="expected sigma finite"):
        memokern.draw(X, ROWS, -1.0)
    with pytest.raises(ValueError, match="to match the rows"):
        memokern.row_weights(X[:, :2], ROWS, 0.5)
