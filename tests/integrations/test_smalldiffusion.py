"""smalldiffusion's sampler on a closed form, beside its own IdealDenoiser."""

from itertools import pairwise

import pytest
import torch

from memokern import Denoiser, processes, regularizers
from memokern.integrations import SmallDiffusionModel
from tests.integrations.clients import F64, client, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")


def installed():
    return client("smalldiffusion", "smalldiffusion.diffusion")


def last(samples):
    return list(samples)[-1]


def start(sigma):
    return float(sigma) * normal(4, 2, 3, 3, seed=2)


def test_ddim_is_the_plain_loop():
    diffusion = installed()
    p = problem()
    sigmas = diffusion.ScheduleDDPM().sample_sigmas(12).to(F64)
    found = last(diffusion.samples(SmallDiffusionModel(p.data), sigmas, xt=start(sigmas[0])))
    x = start(sigmas[0])
    for now, then in pairwise(sigmas):
        x = x - (now - then) * p.eps(x, now)
    torch.testing.assert_close(found, x)
    assert p.distance(found) < 0.1  # its schedule ends at sigma = 0.01


@pytest.mark.parametrize("gam,mu", [(2.0, 0.0), (1.0, 0.5)])
def test_its_samplers_go_where_its_own_ideal_denoiser_takes_them(gam, mu):
    diffusion = installed()
    p = problem()
    ideal = client("smalldiffusion", "smalldiffusion.model").IdealDenoiser(list(p.rows))
    sigmas = diffusion.ScheduleLogLinear(200, 0.1, 20.0).sample_sigmas(10).to(F64)
    ends = []
    for model in (SmallDiffusionModel(p.rows), ideal):
        torch.manual_seed(0)  # both draw their noise with rand_input
        model.rand_input = lambda n: torch.randn(n, 2, 3, 3, dtype=F64)
        ends.append(last(diffusion.samples(model, sigmas, gam=gam, mu=mu, xt=start(sigmas[0]))))
    torch.testing.assert_close(*ends)


def test_flow_is_the_plain_loop():
    diffusion = installed()
    p = problem()
    sigmas = diffusion.ScheduleFlow().sample_sigmas(10)
    assert sigmas[0] == 1.0  # all noise: alpha = 0
    model = SmallDiffusionModel(p.data, flow=True)
    found = last(diffusion.samples(model, sigmas, xt=start(1.0)))
    x = start(1.0)
    for now, then in pairwise(sigmas):
        x = x - (now - then) * (p.eps(x, now, 1 - now) - p.x0(x, now, 1 - now))
    torch.testing.assert_close(found, x)
    assert p.distance(found) < 1e-6


def test_labels_and_guidance():
    diffusion = installed()
    p = problem()
    sigmas = diffusion.ScheduleLogLinear(100, 0.01, 20.0).sample_sigmas(8).to(F64)
    cond = torch.tensor([0, 1, 2, 2])
    model = SmallDiffusionModel(p.data)
    found = last(diffusion.samples(model, sigmas, xt=start(sigmas[0]), cond=cond, cfg_scale=0.5))
    x = start(sigmas[0])
    for now, then in pairwise(sigmas):
        part = torch.cat(
            [p.eps(x[i : i + 1], now, label=int(c)) for i, c in enumerate(cond.tolist())]
        )
        x = x - (now - then) * (part + 0.5 * (part - p.eps(x, now)))
    torch.testing.assert_close(found, x)
    null = torch.full((4,), 3)
    torch.testing.assert_close(model.predict_eps(x, torch.tensor(1.0), null), p.eps(x, 1.0))


def test_what_its_samplers_and_loops_read():
    p = problem()
    model = SmallDiffusionModel(p.rows.float())
    assert model.input_dims == (2, 3, 3)
    noise = model.rand_input(5)
    assert noise.shape == (5, 2, 3, 3) and noise.dtype == torch.float32
    x, sigma = normal(3, 2, 3, 3, seed=3), torch.tensor([0.3, 1.0, 4.0]).reshape(-1, 1, 1, 1)
    want = p.eps(x, sigma)
    torch.testing.assert_close(SmallDiffusionModel(p.rows)(x, sigma), want)
    vp = Denoiser(p.rows, processes.VP())
    torch.testing.assert_close(SmallDiffusionModel(vp)(x, sigma), want, rtol=1e-8, atol=1e-8)
    # A start without signal, of a denoiser whose process always has some: eps + x0 is exact.
    flow = SmallDiffusionModel(vp, flow=True)(x, torch.tensor(1.0))
    torch.testing.assert_close(flow, x - p.rows.mean(0), rtol=1e-5, atol=1e-5)


def test_a_regulariser_is_in_the_clients_units():
    p, x = problem(), normal(3, 2, 3, 3, seed=4)
    model = SmallDiffusionModel(p.data, regularizers.Tikhonov(0.5))
    want = 0.8**2 / (0.8**2 + 0.5) * p.eps(x, 0.8)
    torch.testing.assert_close(model.predict_eps(x, torch.tensor(0.8)), want)
