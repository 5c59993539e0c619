"""What is built on the sweep uses the data's index: the same results, with a certificate."""

import math

import pytest
import torch

from memokern import Denoiser, TrainingSet, memorization, processes, samplers
from memokern.regularizers import CovarianceTikhonov, evaluate, parse
from memokern.strategies import pruned as pruned_strategy
from tests.cases import F64, normal

N, SHAPE = 300, (6, 8)


def indexed(n=N):
    """Rows whose variance falls, in float64: a pruned mean errs by 1e-14 of their radius."""
    rows = normal(n, 48, seed=5) * torch.logspace(0.5, -1.5, 48, dtype=F64)
    labels = torch.arange(n) % 3
    data = TrainingSet(rows.reshape(n, *SHAPE), labels=labels, log_weights=normal(n, seed=9))
    return data.build_index("pca", dims=(8, 16, 32))


@pytest.fixture
def scanned(monkeypatch):
    """How many rows each pruned call kept, of how many."""
    calls = []
    run = pruned_strategy.posterior

    def noted(query, rows, index, **how):
        sums, bounds = run(query, rows, index, **how | {"certificate": True})
        calls.append((index.n, bounds.levels.clone(), bounds.rows_kept.clone()))
        return sums, bounds if how.get("certificate") else None

    monkeypatch.setattr(pruned_strategy, "posterior", noted)
    return calls


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def both(data, *args, **kwargs):
    return [Denoiser(data, *args, method=m, **kwargs) for m in ("pruned", "dense")]


def queries(data, process, t, seed=3):
    alpha, sigma = process.alpha(t), process.sigma(t)
    return alpha * data[:6] + sigma * normal(6, *SHAPE, seed=seed)


@pytest.mark.parametrize("name", sorted(processes.NAMES))
def test_every_process(name, scanned):
    data, process = indexed(), processes.get(name)
    pruned, dense = both(data, process)
    for sigma in (0.05, 0.3, 0.8):
        t = process.time_of_sigma(torch.tensor(sigma, dtype=F64))
        x = queries(data, process, t)
        got, want = pruned.evaluate(x, t, certificate=True), dense.evaluate(x, t)
        for value in ("x0", "score", "eps", "v"):
            same(getattr(got, value), getattr(want, value))
        assert got.posterior.certificate.levels.shape == (6,)
    n, levels, kept = scanned[0]
    assert n == N and (levels > 0).all() and (kept < N / 4).all()


@pytest.mark.parametrize("label", [1, "each"])
@pytest.mark.parametrize("biased", [False, True])
def test_labels_and_biases(label, biased, scanned):
    data, process = indexed(), processes.EDM()
    pruned, dense = both(data, process)
    x = queries(data, process, torch.tensor(0.2, dtype=F64)).reshape(2, 3, *SHAPE)
    label = torch.tensor([[0, 1, 2], [2, 1, 0]]) if label == "each" else label
    bias = normal(N, seed=7) if biased else None
    if biased:
        bias[::5] = -math.inf
    got = pruned.evaluate(x, 0.2, label, bias=bias, certificate=True)
    want = dense.evaluate(x, 0.2, label, bias=bias)
    same(got.x0, want.x0)
    same(got.posterior.log_density, want.posterior.log_density)
    bounds = got.posterior.certificate
    assert bounds.weight.shape == bounds.rows_kept.shape == (2, 3)
    assert (bounds.levels > 0).all() and (bounds.rows_kept < N / 6).all()
    assert {n for n, _, _ in scanned} == {N // 3}


def test_an_index_built_later_serves_the_labels_too(scanned):
    data = indexed()
    later = TrainingSet(data[:], labels=data.labels)
    denoiser = Denoiser(later)
    x = queries(data, processes.EDM(), torch.tensor(0.2, dtype=F64))
    before = denoiser(x, 0.2, 1)
    later.build_index("pca", dims=(8, 16, 32))
    denoiser.method = "pruned"
    same(denoiser(x, 0.2, 1), before)
    assert scanned[0][0] == N // 3


@pytest.mark.parametrize(
    "text",
    [
        "tikhonov:c=0.01",
        "empirical-bayes:log_tau=-3",
        "temperature:sigma_c=0.3",
        "smoothing:h=0.1,samples=4",
        "bank:h=0.1",
        "temperature:sigma_c=0.2+tikhonov:c=0.01",
        "covariance",
        "unconditioned",
    ],
)
def test_every_regularizer(text, scanned):
    data = indexed()
    regularizer = CovarianceTikhonov.fit(0.1, data, rank=4) if text == "covariance" else parse(text)
    x = queries(data, processes.EDM(), torch.tensor(0.1, dtype=F64))
    got, want = (
        evaluate(x, data, 0.1, regularizer=regularizer, method=method, certificate=True)
        for method in ("pruned", "dense")
    )
    same(got.score, want.score)
    if got.log_potential is not None:
        same(got.log_potential, want.log_potential)
    if text == "unconditioned":  # its weights fall too slowly for bounds
        assert not scanned
        return
    assert (scanned[0][1] > 0).all() and (scanned[0][2] < N).any()
    assert (got.posterior.certificate.rows_kept < N).any()
    assert (want.posterior.certificate.rows_kept == N).all()


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
def test_every_sampler_and_what_it_tells(solver, scanned):
    data = indexed()
    told = []
    how = {"seed": 0, "label": 1}
    run = samplers.sde if solver == "sde" else samplers.ode
    if solver != "sde":
        how["solver"] = solver
    if solver != "rk45":
        how["steps"] = 6
    got, want = (
        run(denoiser, 5, **how, watch=told.append if denoiser.method == "pruned" else None)
        for denoiser in both(data)
    )
    # rk45 chooses its steps by differences of what rounding differs in.
    torch.testing.assert_close(got.x, want.x, rtol=1e-6, atol=1e-6)
    assert [e.count for e in told] == list(range(1, got.nfe + 1)) and len(scanned) == got.nfe
    for evaluation, (_, levels, kept) in zip(told, scanned, strict=True):
        assert torch.equal(evaluation.certificate.levels, levels)
        assert torch.equal(evaluation.certificate.rows_kept, kept)
        assert evaluation.seconds > 0 and evaluation.alpha == 1
        assert evaluation.sigma == evaluation.t
    steps = [e.step for e in told]
    assert (
        steps
        == {
            "euler": [1, 2, 3, 4, 5, 6],
            "sde": [1, 2, 3, 4, 5, 6],
            "heun": [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6],
            "rk45": [None] * got.nfe,
        }[solver]
    )
    assert told[0].sigma == pytest.approx(80)
    if solver != "rk45":  # which ends at sigma = 0, where a query is swept densely
        assert (told[-1].certificate.rows_kept < N / 3).all()


def test_the_metrics():
    data = TrainingSet(normal(60, 3, 8, 8)).build_index()
    x = data[:40] + 0.01 * normal(40, 3, 8, 8, seed=2)
    got, want = (
        memorization.report(x, data, k=9, level=0.0, method=method)
        for method in ("pruned", "dense")
    )
    criteria = {"collapse", "ratio", "carlini", "neighbourhood", "exact"}
    assert got.keys() == want.keys() == criteria
    for name in got:
        assert torch.equal(got[name].value, want[name].value)
        assert torch.equal(got[name].index, want[name].index)
    for criterion in (memorization.collapse, memorization.ratio, memorization.carlini):
        with pytest.raises(ValueError, match=r"call build_index\(\)"):
            criterion(x, data.rows.reshape(-1, 3, 8, 8), method="pruned")
