"""Scores at sigma = 0: finite and the limit wherever the regulariser's gate falls like sigma^2."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from memokern import Denoiser, TrainingSet, processes, regularizers
from memokern.regularizers import (
    CovarianceTikhonov,
    EmpiricalBayes,
    GaussianSmoothing,
    NoiseUnconditioned,
    SmoothedBank,
    Temperature,
    Tikhonov,
    evaluate,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ROWS = normal(7, 3, seed=1)
COVARIANCE = CovarianceTikhonov.fit(0.1, ROWS, rank=2)
FINITE = {
    "tikhonov": Tikhonov(0.1),
    "of sigma": Tikhonov(lambda s: 0.1 + s),
    "covariance": COVARIANCE,
    "smoothed": SmoothedBank(0.3),
    "density": EmpiricalBayes(-5.0),
    "normalized": EmpiricalBayes(-5.0, normalized=True),
    "tempered": Temperature(0.5) & Tikhonov(0.1),
    "twice": Tikhonov(0.1) & COVARIANCE,
    "smoothed and gated": SmoothedBank(0.3) & Tikhonov(0.1),
    "shifted": GaussianSmoothing(0.2, 4) & Tikhonov(0.1),
    "unconditioned": NoiseUnconditioned() & Tikhonov(0.1),
}
SINGULAR = {
    "none": None,
    "temperature": Temperature(0.5),
    "unconditioned": NoiseUnconditioned(),
    "shifted": GaussianSmoothing(0.2, 4),
    "zero": Tikhonov(0.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("name", FINITE)
def test_the_limit_of_a_gated_score(name, alpha, dtype):
    x, rows = normal(4, 3, seed=2).to(dtype), ROWS.to(dtype)
    found = evaluate(x, rows, 0.0, alpha, regularizer=FINITE[name])
    near = evaluate(x, rows, 1e-4, alpha, regularizer=FINITE[name])
    # 1e-4 is away from 0 by sigma^2 / c = 1e-7, and for Tikhonov(0.1 + s) by 1e-3.
    tolerance = {"rtol": 2e-3, "atol": 1e-5}
    assert torch.isfinite(found.score).all()
    torch.testing.assert_close(found.score, near.score, **tolerance)
    assert torch.equal(found.eps, torch.zeros_like(x))
    torch.testing.assert_close(found.v, torch.zeros_like(x))
    assert torch.isfinite(found.velocity()).all()


@pytest.mark.parametrize("name", FINITE)
def test_levels_that_are_mixed_and_rows_that_are_hit(name):
    x = normal(4, 3, seed=2)
    x[0], x[3] = ROWS[5], ROWS[2]
    sigma = torch.tensor([0.0, 0.5, 0.0, 0.3], dtype=torch.float64)
    reg = FINITE[name]
    found = evaluate(x, ROWS, sigma, regularizer=reg)
    for i, level in enumerate(sigma.tolist()):
        one = evaluate(x[i : i + 1], ROWS, level, regularizer=reg)
        torch.testing.assert_close(found.score[i], one.score[0])
        torch.testing.assert_close(found.eps[i], one.eps[0])
    # On a row itself it is 0, unless the queries are shifted or other rows have weight too.
    if name not in ("shifted", "smoothed"):
        torch.testing.assert_close(found.score[0], torch.zeros(3, dtype=torch.float64))
    network = Denoiser(ROWS, processes.VE(), reg, "score")
    assert torch.isfinite(network(x, 0.0)).all()


def test_tikhonovs_value_is_written_out():
    x = normal(4, 3, seed=2)
    nearest = ROWS[torch.cdist(x, ROWS).argmin(1)]
    network = Denoiser(ROWS, processes.VE(), Tikhonov(1e-3), "score")
    torch.testing.assert_close(network(x, 0.0), (nearest - x) / 1e-3)
    faded = Denoiser(ROWS, processes.VE(), EmpiricalBayes(-5.0), "score")
    assert torch.equal(faded(x, 0.0), torch.zeros_like(x))


@pytest.mark.parametrize("name", SINGULAR)
def test_without_a_gate_there_is_no_limit(name):
    x = normal(4, 3, seed=2)
    for dtype in (torch.float32, torch.float64):
        found = evaluate(x.to(dtype), ROWS.to(dtype), 0.0, regularizer=SINGULAR[name])
        assert not torch.isfinite(found.score).any() and not torch.isfinite(found.eps).any()
    velocity = Denoiser(ROWS, processes.VE(), SINGULAR[name], "velocity")(x, 0.0)
    assert torch.equal(velocity, torch.zeros_like(x))
    assert torch.isfinite(found.x0).all() and torch.isfinite(found.velocity()).all()


@pytest.mark.parametrize("regularizer", [Tikhonov(3.2e-5), EmpiricalBayes(-30.0)], ids=repr)
def test_the_papers_rk45_takes_few_evaluations(regularizer):
    """dx/dt = -g^2 score / 2 of the VE process, by scipy from t = 1 to 0 exactly, as the code
    released with arXiv 2501.15785 has it. NaN at the end made it 3926 evaluations."""
    points = torch.from_numpy(np.random.RandomState(1).randn(20, 2))
    process = processes.VE()
    score = Denoiser(TrainingSet(points), process, regularizer, "score")
    start = process.prior((10, 2), torch.Generator().manual_seed(0), torch.float64)
    seen = []

    def field(t, state):
        time = torch.tensor(t, dtype=torch.float64)
        x = torch.from_numpy(state).reshape(10, 2)
        out = -process.diffusion(time).square() / 2 * score(x, time)
        seen.append(bool(torch.isfinite(out).all()))
        return out.reshape(-1).numpy()

    found = solve_ivp(field, (1.0, 0.0), start.reshape(-1).numpy(), method="RK45")
    assert found.success and all(seen) and len(seen) < 700, len(seen)
    other = Denoiser(TrainingSet(points), process, regularizer, "velocity")
    flow = solve_ivp(
        lambda t, s: other(torch.from_numpy(s).reshape(10, 2), t).reshape(-1).numpy(),
        (1.0, 0.0), start.reshape(-1).numpy(), method="RK45",
    )  # fmt: skip
    assert flow.success and flow.nfev < 700
    np.testing.assert_allclose(flow.y[:, -1], found.y[:, -1], atol=1e-2)


def test_evaluations_that_need_no_limit_take_no_second_gate():
    calls = []

    class Counting(regularizers.Tikhonov):
        def gate(self, residual, query, posterior):
            calls.append(query.sigma)
            return super().gate(residual, query, posterior)

    found = evaluate(normal(2, 3), ROWS, 0.5, regularizer=Counting(0.1))
    assert torch.isfinite(found.score).all() and torch.isfinite(found.eps).all()
    assert len(calls) == 1
