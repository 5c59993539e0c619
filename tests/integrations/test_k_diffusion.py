"""k-diffusion's samplers on a closed form: the real ones, where it is installed."""

import pytest
import torch

from memokern import Denoiser, Given, processes, regularizers
from memokern.integrations import KDiffusionModel
from tests.integrations.clients import F64, client, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMAS = torch.tensor([20.0, 6, 2, 0.8, 0.3, 0.05, 0.0], dtype=F64)


def installed():
    return client("k-diffusion", "k_diffusion.sampling")


def start():
    return 20 * normal(4, 2, 3, 3, seed=2)


def test_euler_is_the_plain_loop():
    sampling = installed()
    p = problem()
    found = sampling.sample_euler(KDiffusionModel(p.data), start(), SIGMAS, disable=True)
    x = start()
    for now, then in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True):
        x = x + (then - now) / now * (x - p.x0(x, now))
    torch.testing.assert_close(found, x)
    assert p.distance(found) < 1e-6


@pytest.mark.parametrize("name", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_2s_ancestral", "lms"])
def test_samplers_end_where_the_definition_takes_them(name):
    sampling = installed()
    p = problem()
    sample = getattr(sampling, f"sample_{name}")
    kwargs = {"noise_sampler": lambda *_: normal(4, 2, 3, 3, seed=3)} if "anc" in name else {}

    def definition(x, sigma):
        return p.x0(x, sigma)

    with_ours = sample(KDiffusionModel(p.data), start(), SIGMAS, disable=True, **kwargs)
    torch.testing.assert_close(
        with_ours, sample(definition, start(), SIGMAS, disable=True, **kwargs)
    )


def test_labels_in_extra_args_and_guidance():
    sampling = installed()
    p = problem()
    model, label = KDiffusionModel(p.data), torch.tensor([0, 2, 2, 1])
    found = sampling.sample_euler(
        model, start(), SIGMAS, extra_args={"class_cond": label}, disable=True
    )
    for i, one in enumerate(label.tolist()):
        assert p.distance(found[i : i + 1], one) < 1e-6

    def guided(x, sigma, class_cond):  # as its own make_cfg_model_fn doubles the batch
        both = torch.cat([torch.full_like(class_cond, 3), class_cond])
        out = model(torch.cat([x, x]), torch.cat([sigma, sigma]), class_cond=both)
        whole, part = out.chunk(2)
        return torch.lerp(whole, part, 1.5)

    x, sigma = start() / 10, torch.full((4,), 2.0, dtype=F64)
    want = torch.stack(
        [
            torch.lerp(p.x0(x[i : i + 1], 2.0), p.x0(x[i : i + 1], 2.0, label=c), 1.5)[0]
            for i, c in enumerate(label.tolist())
        ]
    )
    torch.testing.assert_close(guided(x, sigma, label), want)


def test_its_ode_likelihood_is_that_of_the_mixture():
    """Its Hutchinson estimate along a flow that is traced by our gradients."""
    sampling = installed()
    rows = normal(1, 3, 2, seed=4)  # one row: the score is linear and the estimate has no noise
    torch.manual_seed(0)
    x = rows.expand(2, 3, 2) + 0.3 * normal(2, 3, 2, seed=5)
    found, _ = sampling.log_likelihood(KDiffusionModel(rows), x, 0.3, 50.0, atol=1e-8, rtol=1e-8)
    z = (x - rows) / 0.3
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    want = want - 6 * torch.log(torch.tensor(0.3))
    # Its prior is a normal one about 0 instead of about the row, which at 50 makes little.
    torch.testing.assert_close(found.to(F64), want, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["vp", "ddpm", "cosine", "flow-matching", "ve"])
def test_denoisers_of_other_processes(name):
    p = problem()
    process = processes.get(name)
    model = KDiffusionModel(Denoiser(p.data, process))
    x, sigma = normal(4, 2, 3, 3, seed=6), torch.tensor([3.0, 1.5, 0.7, 0.05], dtype=F64)
    torch.testing.assert_close(model(x, sigma), p.x0(x, sigma), rtol=1e-9, atol=1e-9)


def test_regularisers_are_in_the_units_of_whoever_has_the_process():
    p, x = problem(), normal(4, 2, 3, 3, seed=7)
    c, sigma = 0.3, 0.9
    mean = p.x0(x, sigma)
    want = x + sigma**2 * (mean - x) / (sigma**2 + c)
    tikhonov = regularizers.Tikhonov(c)
    torch.testing.assert_close(KDiffusionModel(p.data, tikhonov)(x, sigma), want)
    with pytest.raises(ValueError, match="its own regularizer"):
        KDiffusionModel(Denoiser(p.data), tikhonov)
    # In VP's units the same ratio has a smaller sigma, so that c weighs more.
    vp = processes.ScoreSDEVP()
    other = KDiffusionModel(Denoiser(p.data, vp, tikhonov))(x, sigma)
    small = float(vp.sigma(vp.time_of_ratio(sigma)))
    torch.testing.assert_close(other, x + small**2 * (mean - x) / (small**2 + c))


def test_what_it_takes_and_refuses():
    p, x = problem(), normal(4, 2, 3, 3, seed=8)
    model = KDiffusionModel(p.data)
    zeros = torch.zeros(4, 9)
    assert torch.equal(model(x, 1.0, aug_cond=zeros), model(x, torch.ones(4)))
    assert torch.equal(model(x, 1.0, class_cond=torch.full((4,), 3)), model(x, 1.0))
    with pytest.raises(ValueError, match="aug_cond absent or zero"):
        model(x, 1.0, aug_cond=zeros + 1)
    with pytest.raises(TypeError, match="unet_cond"):
        model(x, 1.0, unet_cond=zeros)
    with pytest.raises(TypeError, match="expected a TrainingSet, rows"):
        KDiffusionModel("digits")
    with pytest.raises(ValueError, match="label"):
        model(x, 1.0, class_cond=torch.full((4,), 7))


def test_conditions_and_what_is_given():
    p, x = problem(), normal(4, 2, 3, 3, seed=9)
    data = type(p.data)(p.rows, conditions=normal(20, 2, seed=10))
    wanted = normal(4, 2, seed=11)
    model = KDiffusionModel(data, bandwidth=0.5)
    found = model(x, 0.7, mapping_cond=wanted)
    given = Given(Denoiser(data), condition=wanted, bandwidth=0.5)
    torch.testing.assert_close(found, given.evaluate(x, 0.7).x0)
    torch.testing.assert_close(KDiffusionModel(given)(x, 0.7), found)
    assert list(KDiffusionModel(given).parameters())  # those of the denoiser inside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_x_comes_back(dtype):
    p = problem()
    x = normal(4, 2, 3, 3, seed=12).to(dtype)
    found = KDiffusionModel(p.data)(x, torch.tensor(0.8, dtype=dtype))
    sigma = float(torch.tensor(0.8, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, p.x0(x, sigma).to(dtype))
