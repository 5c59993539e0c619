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


ASKED = {
    "label": {"label": torch.tensor([1, 0, 1, 2, 2])},
    "condition": {"condition": cases.normal(5, 2, seed=8), "bandwidth": 0.5},
    "left-out": {"leave_out": torch.tensor([0, 30, 30, -1, 39])},
    "all": {
        "label": torch.tensor([0, 1, 1, 1, 0]), "condition": cases.normal(2, seed=9),
        "bandwidth": torch.tensor([0.3, 1.0, 1.0, 2.0, 0.3]), "leave_out": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_of_the_rows_that_queries_ask_for(asked, backend):
    """By the softmax over them, written down."""
    x, rows, n = X.to(F32), ROWS[:40].to(F32), 40
    labels, conditions = torch.arange(n) % 3, cases.normal(n, 2, seed=7)
    sigma, bias = torch.tensor([0.5, 0.9, 2.0, 1.0, 0.7], dtype=F64), cases.normal(n, seed=3)
    data = TrainingSet(rows, labels=labels, conditions=conditions, log_weights=bias)
    logit = -(x[:, None] - rows).double().square().sum(-1) / 2 / sigma[:, None] ** 2 + bias
    if "condition" in asked:
        gap = (torch.atleast_2d(asked["condition"])[:, None] - conditions).square().sum(-1)
        h = torch.as_tensor(asked["bandwidth"], dtype=F64).reshape(-1, 1)
        logit = logit - gap / 2 / h**2
    if "label" in asked:
        logit = logit.masked_fill(asked["label"][:, None] != labels, -torch.inf)
    if "leave_out" in asked:
        out = torch.as_tensor(asked["leave_out"]).reshape(-1, 1)
        logit = logit.masked_fill(out == torch.arange(n), -torch.inf)
    weights = logit.softmax(1)
    got = memokern.row_weights(x, data, sigma, **asked)
    torch.testing.assert_close(got, weights.sum(0), rtol=1e-4, atol=1e-5)

    def drawn(**more):
        g = torch.Generator().manual_seed(3)
        return memokern.draw(x.reshape(5, 1, D), data, sigma[:, None], **more, generator=g)

    shaped = {k: v[:, None] if isinstance(v, torch.Tensor) and len(v) == 5 else v
              for k, v in asked.items()}  # fmt: skip
    rows_drawn = drawn(**shaped)
    assert rows_drawn.shape == (5, 1)
    assert bool((weights.gather(1, rows_drawn) > 0).all())
    assert torch.equal(drawn(temperature=1e-9, **shaped)[:, 0], weights.argmax(1))
    with harness.preferred("reference"):
        assert torch.equal(drawn(**shaped), rows_drawn)


def test_draws_at_a_condition_have_the_weights_as_frequencies(backend):
    if backend == "triton":
        pytest.skip("interpreted kernels: the same rows, as the test before shows")
    many, rows = 4000, ROWS[:40].to(F32)
    conditions = cases.normal(40, 1, seed=7)
    data, c = TrainingSet(rows, conditions=conditions), torch.tensor([0.2, -0.5])
    x, each = X[:1].to(F32).expand(many, D), c[torch.arange(many) % 2, None]
    g = torch.Generator().manual_seed(2)
    got = memokern.draw(x, data, 2.0, condition=each, bandwidth=0.4, generator=g)
    logit = -(X[0] - ROWS[:40]).square().sum(1) / 8
    for k in range(2):
        p = (logit - (conditions[:, 0] - c[k]).square() / 2 / 0.4**2).softmax(0)
        assert abs(deviation(got[k::2], p)) < 4.9


def test_of_rows_that_are_apart_queries_ask_for_all(tmp_path):
    TrainingSet(ROWS, labels=torch.arange(N) % 2).save(tmp_path / "rows.safetensors")
    apart = memokern.StreamedSet(tmp_path / "rows.safetensors")
    for call in memokern.draw, memokern.row_weights:
        with pytest.raises(ValueError, match="where the rows are apart"):
            call(X, apart, 0.5, label=1)


def test_no_queries():
    assert memokern.row_weights(X[:0], ROWS, 0.5).tolist() == [0.0] * N
    assert memokern.draw(X[:0], ROWS, 0.5).shape == (0,)


def deviation(drawn, p):
    """Pearson's chi-square of rows drawn by p [N], as a standard normal number. Rows expected less
    than five times count as one."""
    expected = p * len(drawn)
    often = expected >= 5
    counts = torch.bincount(drawn, minlength=len(p)).double()
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    k = len(seen) - 1
    chi2 = float(((seen - wanted).square() / wanted).sum())
    assert k > 10
    # The cube root of chi2 / k is nearly normal (Wilson and Hilferty, 1931).
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5


def test_draws_have_the_weights_as_frequencies(backend):
    """Pearson's chi-square of 20,000 draws; the bound is passed by chance once in a million."""
    if backend == "triton":
        pytest.skip("interpreted kernels: of the same rows, as the next test shows")
    many, x = 20_000, X[:1].float()
    g = torch.Generator().manual_seed(1)
    bias = cases.normal(N, seed=3)
    data = TrainingSet(ROWS.float(), log_weights=bias)
    rows = memokern.draw(x.expand(many, D), data, 0.8, generator=g)
    assert abs(deviation(rows, memokern.weights(x, data, 0.8)[0])) < 4.9


@pytest.mark.long_on("triton")
def test_a_seed_gives_the_same_rows_whoever_computes(backend):
    def drawn():
        g = torch.Generator().manual_seed(7)
        return memokern.draw(X.float().repeat(4, 1), ROWS[:40].float(), 0.7, generator=g)

    got = drawn()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(got, drawn())
    finally:
        torch.set_num_threads(before)
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
