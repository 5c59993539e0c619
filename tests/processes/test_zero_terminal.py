"""DDPM schedules that end without signal, as diffusers' rescale_betas_zero_snr makes them."""

import math

import pytest
import torch

import memokern
from memokern import Denoiser, regularizers, samplers
from memokern.processes import DDPM, Process

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rescaled(steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Algorithm 1 of arXiv 2305.08891 on Stable Diffusion's betas, as diffusers has it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=dtype) ** 2
    roots = torch.cumprod(1 - betas, 0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)) ** 2


SCHEDULES = [rescaled(1000), rescaled(1000, torch.float64), torch.tensor([0.9, 0.5, 0.0]), [0.0]]


@pytest.mark.parametrize("values", SCHEDULES, ids=["float32", "float64", "three", "one"])
@pytest.mark.parametrize("rho", [7.0, None])
def test_a_schedule_that_ends_at_zero(values, rho):
    process = DDPM(values, rho)
    given = torch.as_tensor(values, dtype=torch.float64)
    t = torch.arange(len(given), dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2, given, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - given, rtol=1e-12, atol=0)
    end = t[-1]
    assert (float(process.alpha(end)), float(process.sigma(end))) == (0, 1)
    assert math.isinf(process.ratio(end)) and float(process.time_of_ratio(math.inf)) == end
    assert float(process.time_of_sigma(1.0)) == end
    # Between the indices: continuous, derivatives as autograd's, inverses.
    inside = torch.linspace(-0.999, float(end) - 0.003, 201, dtype=torch.float64)
    inside = inside[(inside - inside.round()).abs() > 1e-4]
    a, s = process.alpha(inside), process.sigma(inside)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))
    assert (process.ratio(inside).diff() > 0).all()
    h = 1e-6
    for name in ("alpha", "sigma"):
        f = getattr(process, name)
        slope = (f(inside + h) - f(inside - h)) / (2 * h)
        torch.testing.assert_close(
            getattr(process, f"d_{name}")(inside), slope, rtol=1e-3, atol=1e-6
        )
    torch.testing.assert_close(process.time_of_sigma(s[s < 0.99]), inside[s < 0.99])
    torch.testing.assert_close(process.time_of_ratio(s / a), inside)
    torch.testing.assert_close(Process.time_of_ratio(process, s / a), inside, rtol=1e-9, atol=1e-9)
    for n in (2, 3, 4, 19):
        for last in (None, 0.1):
            times = process.times(n, last)
            assert len(times) == n and float(times[0]) == end
            assert (times.diff() < 0).all() and (process.sigma(times).diff() < 0).all()
    assert torch.isfinite(process.times(5)).all()


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
@pytest.mark.parametrize("rho", [7.0, None])
@pytest.mark.one_of(2)
def test_sampling_from_no_signal(solver, rho):
    rows = 4 * normal(6, 2, seed=1)
    network = Denoiser(rows, DDPM(rescaled(1000), rho))
    steps = {} if solver == "rk45" else {"steps": 100}
    if solver == "sde":
        found = samplers.sde(network, 12, seed=0, **steps)
    else:
        found = samplers.ode(network, 12, solver=solver, seed=0, **steps)
    # The last of the even steps begins at 0.1, where x0 is a row: they are 2.7 apart or more.
    assert memokern.nearest(found.x, rows).distance.max() < 1e-3
    assert len(memokern.nearest(found.x, rows).index.unique()) >= 3


def test_every_prediction_is_finite_at_the_start():
    process = DDPM(rescaled(1000))
    for prediction in ("x0", "eps", "v", "score", "velocity"):
        for regularizer in (None, regularizers.Tikhonov(0.1)):
            network = Denoiser(normal(6, 2), process, regularizer, prediction)
            x = normal(3, 2).requires_grad_()
            out = network(x, 999)
            (g,) = torch.autograd.grad(out.sum(), x)
            assert torch.isfinite(out).all() and torch.isfinite(g).all()


def test_nearly_zero_stays_as_it_was():
    """diffusers' schedulers put 2^-24 in place of the last 0."""
    values = rescaled(100, torch.float64)
    values[-1] = 2**-24
    process = DDPM(values)
    assert float(process.alpha(torch.tensor(99.0, dtype=torch.float64))) == pytest.approx(2**-12)
