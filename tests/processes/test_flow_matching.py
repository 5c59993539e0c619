"""Flow matching as its clients call it: at and past the ends, with noise left, in reverse time."""

import math

import pytest
import torch

import memokern
from memokern import Denoiser, processes, regularizers, samplers
from memokern.processes import FlowMatching, Process

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = [FlowMatching(s, reverse=r) for s in (0.0, 0.1) for r in (False, True)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("process", PATHS, ids=repr)
def test_closed_forms(process):
    t = (torch.arange(21, dtype=torch.float64) + 0.37) / 21
    for closed in ("d_alpha", "d_sigma", "drift", "diffusion"):
        base = getattr(Process, closed)(process, t)
        torch.testing.assert_close(getattr(process, closed)(t), base, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(process.time_of_sigma(process.sigma(t)), t)
    torch.testing.assert_close(process.time_of_ratio(process.ratio(t)), t)
    assert float(process.time_of_ratio(math.inf)) == process.t_noise
    assert process.times(3).tolist() == [process.t_noise, 0.5, process.t_data]
    ends = torch.tensor([process.t_data, process.t_noise], dtype=torch.float64)
    low = 0.1 if "0.1" in repr(process) else 0.0
    torch.testing.assert_close(process.sigma(ends).tolist(), [low, 1.0])
    assert process.alpha(ends).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_velocity_is_torchcfms(sigma):
    """TargetConditionalFlowMatcher.compute_conditional_flow, its x1 averaged over the posterior."""
    rows, x = normal(9, 3, seed=1), normal(5, 3, seed=2)
    ahead = Denoiser(rows, FlowMatching(sigma), prediction="velocity")
    back = Denoiser(rows, FlowMatching(sigma, reverse=True), prediction="velocity")
    for t in (0.0, 0.3, 0.9):
        level = 1 - (1 - sigma) * t
        x1 = memokern.posterior(x, rows, level, t).mean
        expected = (x1 - (1 - sigma) * x) / level
        torch.testing.assert_close(ahead(x, t), expected)
        torch.testing.assert_close(back(x, 1 - t), -expected)


def test_wrong_constants():
    for value in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_min"):
            FlowMatching(value)
    assert [repr(p) for p in PATHS] == [
        "FlowMatching()", "FlowMatching(reverse=True)", "FlowMatching(sigma_min=0.1)",
        "FlowMatching(sigma_min=0.1, reverse=True)",
    ]  # fmt: skip


def all_paths() -> list[Process]:
    return [*PATHS, *(processes.get(name) for name in processes.NAMES)]


@pytest.mark.parametrize("process", all_paths(), ids=repr)
def test_velocity_at_and_past_the_data(process):
    rows, x = normal(9, 3, seed=1), normal(5, 3, seed=2)
    x[0] = rows[4]
    network = Denoiser(rows, process, prediction="velocity")
    length = process.t_data - process.t_noise
    end = network(x, process.t_data)
    assert torch.isfinite(end).all()
    for part in (0.05, 0.9):
        assert torch.equal(network(x, process.t_data + part * length), end)
    if isinstance(process, FlowMatching):
        with pytest.raises(ValueError, match="sigma finite"):
            network(x, process.t_noise + 21 * length)
    # With a gate like Tikhonov's the velocity at the data is the limit.
    gated = Denoiser(rows, process, regularizers.Tikhonov(0.5), prediction="velocity")
    level = max(1e-5, float(process.sigma(torch.tensor(process.t_data, dtype=torch.float64))))
    near = gated(x, process.time_of_sigma(level))
    torch.testing.assert_close(gated(x, process.t_data), near, rtol=1e-3, atol=1e-4)


def test_gradients_at_the_data_are_finite():
    network = Denoiser(normal(9, 3, seed=1), FlowMatching(), prediction="velocity")
    x = normal(5, 3, seed=2).requires_grad_()
    (g,) = torch.autograd.grad(network(x, 1.0).sum(), x)
    assert torch.isfinite(g).all()


def integrate(field, x, times, stages) -> torch.Tensor:
    """An explicit Runge-Kutta method of fixed steps, given its tableau's rows (c, a)."""
    for now, to in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        h, slopes = to - now, []
        for c, row in stages[:-1]:
            point = x + h * sum((a * k for a, k in zip(row, slopes, strict=True)), 0 * x)
            slopes.append(field(point, now + c * h))
        x = x + h * sum(b * k for b, k in zip(stages[-1], slopes, strict=True))
    return x


RK4 = [
    (0.0, []),
    (0.5, [0.5]),
    (0.5, [0.0, 0.5]),
    (1.0, [0.0, 0.0, 1.0]),
    [1 / 6, 1 / 3, 1 / 3, 1 / 6],
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.one_of(2)
def test_fixed_steps_of_rk4_reach_the_rows(reverse):
    """The last stage is at the data. Its slope has weight h / 6, so the end is off by O(h)."""
    rows = normal(9, 3, seed=1)
    process = FlowMatching(reverse=reverse)
    field = Denoiser(rows, process, prediction="velocity")
    for n in (50, 200):
        x = integrate(field, normal(20, 3, seed=3), process.times(n + 1), RK4)
        assert memokern.nearest(x, rows).distance.max() < 3 / n


@pytest.mark.parametrize("process", all_paths(), ids=repr)
@pytest.mark.one_of(3)
def test_rk45_ends_where_the_process_ends(process):
    rows = normal(6, 2, seed=1)
    found = samplers.ode(Denoiser(rows, process), 8, solver="rk45", seed=0)
    assert float(found.times[-1]) == process.t_data and len(found.times) == 2
    if float(found.sigmas[-1]) == 0:
        assert memokern.nearest(found.x, rows).distance.max() < 1e-4


@pytest.mark.parametrize("name", ["ve", "vp", "score-sde-vp", "edm", "ddpm"])
@pytest.mark.one_of(2)
def test_rk45_does_not_move_a_gated_end(name):
    """With a gate, x0 held from an early level moves the end (arXiv 2501.15785)."""
    process, rows = processes.get(name), normal(6, 2, seed=1)
    network = Denoiser(rows, process, regularizers.Tikhonov(3.2e-5))
    found = samplers.ode(network, 8, solver="rk45", seed=0).x
    close = samplers.ode(network, 8, solver="rk45", seed=0, sigma_min=1e-6).x
    torch.testing.assert_close(found, close, rtol=0, atol=1e-4)
    assert memokern.nearest(found, rows).distance.max() > 1e-3
