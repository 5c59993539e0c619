"""diffusers' schedulers and pipelines on a closed form."""

import json
from itertools import pairwise

import pytest
import torch

from memokern import Denoiser, Given, TrainingSet, processes, regularizers
from tests.integrations.clients import F64, client, normal, problem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # what its own loading warns of
]


def installed():
    """diffusers, and our module for it."""
    return client("diffusers", "diffusers"), client("diffusers", "memokern.integrations.diffusers")


def loop(scheduler, model, x, steps):
    """The loop of its documentation; every state."""
    scheduler.set_timesteps(steps)
    states = []
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has neither
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for i, t in enumerate(scheduler.timesteps):
        kwargs = {}
        if "generator" in scheduler.step.__code__.co_varnames:
            kwargs = {"generator": torch.Generator().manual_seed(i)}
        out = model(scaled(x, t), t)
        x = scheduler.step(out, t, x, **kwargs).prev_sample
        states.append(x)
    return torch.stack(states)


def definition(p, scheduler, prediction):
    """The model by the oracle, at the levels that the scheduler documents."""
    count = iter(range(10**6))

    def model(x, t):
        i = next(count)
        if getattr(scheduler, "sigmas", None) is None:
            square = scheduler.alphas_cumprod[int(t)].to(F64)
            alpha, sigma = square.sqrt(), (1 - square).sqrt()
        else:
            ratio = scheduler.sigmas[i].to(F64)
            if getattr(scheduler, "sigmas_interpol", None) is not None and i % 2:
                ratio = scheduler.sigmas_interpol[i].to(F64)
            alpha, sigma = (1 + ratio**2).rsqrt(), ratio * (1 + ratio**2).rsqrt()
            if prediction == "flow_prediction":
                alpha, sigma = 1 - ratio, ratio
        if "EDM" in type(scheduler).__name__:
            d = scheduler.config.sigma_data
            y, s = x * (ratio**2 + d**2).sqrt(), ratio  # before c_in
            c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
            sign = -1 if prediction == "v_prediction" else 1
            return ((p.x0(y, s) - c_skip * y) / (sign * c_out)).to(x.dtype)
        x0, eps = p.x0(x, sigma, alpha), p.eps(x, sigma, alpha)
        found = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
        }
        return found[prediction].to(x.dtype)

    return model


PLAIN = {"clip_sample": False}
CASES = {
    "ddpm": ("DDPMScheduler", PLAIN),
    "ddpm x0": ("DDPMScheduler", PLAIN | {"prediction_type": "sample"}),
    "ddpm v": ("DDPMScheduler", PLAIN | {"prediction_type": "v_prediction"}),
    "ddim": ("DDIMScheduler", PLAIN | {"beta_schedule": "scaled_linear"}),
    "ddim, no signal at first": (
        "DDIMScheduler",
        PLAIN
        | {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler v, log-linear": (
        "EulerDiscreteScheduler",
        {"interpolation_type": "log_linear", "prediction_type": "v_prediction"},
    ),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm-solver": ("DPMSolverMultistepScheduler", {}),
    "dpm-solver, karras, rounded timesteps": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
    ),
    "dpm-solver, flow": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "edm": ("EDMEulerScheduler", {}),
    "edm v": ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
    "edm dpm-solver": ("EDMDPMSolverMultistepScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow, shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, heun": ("FlowMatchHeunDiscreteScheduler", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_its_schedulers_go_where_the_definition_takes_them(case):
    diffusers, module = installed()
    p = problem()
    name, config = CASES[case]
    make = getattr(diffusers, name)
    scheduler, other = make(**config), make(**config)
    model = module.DiffusersModel(p.data, scheduler)
    prediction = model.config.prediction_type
    x = normal(3, 2, 3, 3, seed=2)
    found = loop(scheduler, lambda x, t: model(x, t).sample, x, 12)
    want = loop(other, definition(p, other, prediction), x, 12)
    # Where the schedulers compute in float64, so do we; most go by way of float32.
    exact = name.startswith("DDIM")
    torch.testing.assert_close(
        found.to(F64), want.to(F64), **({} if exact else {"rtol": 1e-5, "atol": 1e-5})
    )


def test_ddim_is_the_plain_loop():
    diffusers, module = installed()
    p = problem()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    model = module.DiffusersModel(p.data, scheduler)
    x = normal(4, 2, 3, 3, seed=3)
    found = loop(scheduler, lambda x, t: model(x, t, return_dict=False)[0], x, 10)[-1]
    levels = [*scheduler.alphas_cumprod.to(F64)[list(range(900, -1, -100))].tolist(), 1.0]
    for now, then in pairwise(levels):
        eps = p.eps(x, (1 - now) ** 0.5, now**0.5)
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * eps
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)  # its square roots are float32
    assert p.distance(found) < 1e-5


def test_flow_match_is_the_plain_loop():
    diffusers, module = installed()
    p = problem()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = module.DiffusersModel(p.data, scheduler)
    x = normal(4, 2, 3, 3, seed=4)
    found = loop(
        scheduler, lambda x, t: model(hidden_states=x, timestep=t.expand(4)).sample, x, 10
    )[-1]
    s = [*torch.linspace(1, 1e-3, 10, dtype=F64).tolist(), 0.0]
    for now, then in pairwise(s):
        x = x + (then - now) * (p.eps(x, now, 1 - now) - p.x0(x, now, 1 - now))
    torch.testing.assert_close(found.to(F64), x, rtol=1e-5, atol=1e-5)
    assert p.distance(found.to(F64)) < 1e-4


@pytest.fixture
def pictures():
    """Rows in [-1, 1], which pipelines show as pictures in [0, 1]."""
    return TrainingSet(torch.tanh(normal(12, 1, 4, 4, seed=5)).float(), labels=torch.arange(12) % 3)


def run(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(batch_size=3, num_inference_steps=25, output_type="np", generator=generator)
    return torch.from_numpy(out.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_pipelines_sample_rows_and_are_saved_whole(pictures, tmp_path, name):
    diffusers, module = installed()
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    make = getattr(diffusers, f"{name}Pipeline")
    model = module.DiffusersModel(pictures, scheduler)
    pipe = make(unet=model, scheduler=scheduler)
    found = run(pipe)
    rows = pictures.rows.reshape(12, 1, 4, 4) / 2 + 0.5
    apart = torch.cdist(found.flatten(1), rows.flatten(1)).amin(1)
    assert apart.max() < (0.02 if name == "DDIM" else 0.1)  # DDPM adds noise to the end
    pipe.save_pretrained(tmp_path / "pipe")
    files = sorted(f.suffix for f in (tmp_path / "pipe").rglob("*") if f.is_file())
    assert files == [".json", ".json", ".json", ".safetensors"]
    again = make.from_pretrained(str(tmp_path / "pipe"))
    assert type(again.unet) is module.DiffusersModel
    assert torch.equal(run(again), found)


def test_a_saved_model_is_the_same_model(pictures, tmp_path):
    diffusers, module = installed()
    regularizer = regularizers.Temperature(0.7) & regularizers.Tikhonov(1 / 3)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    x, t = normal(3, 1, 4, 4, seed=6).float(), torch.tensor([3, 400, 999])
    for process in (None, processes.ScoreSDEVP()):
        source = pictures if process is None else Denoiser(pictures, process, regularizer)
        own = regularizer if process is None else None
        model = module.DiffusersModel(source, scheduler, own)
        model.save_pretrained(tmp_path / "m")
        again = module.DiffusersModel.from_pretrained(tmp_path, subfolder="m")
        label = torch.tensor([0, 2, 3])
        assert torch.equal(again(x, t, label).sample, model(x, t, label).sample)
        assert again.config == model.config
        assert type(again.scheduler) is type(scheduler)
        mine = again.adapter.denoiser.process
        assert type(mine) is (processes.DDPM if process is None else processes.ScoreSDEVP)
    half = module.DiffusersModel.from_pretrained(tmp_path / "m", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    found = half(x.half(), t).sample
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), model(x, t).sample, rtol=0.02, atol=0.02)


def test_what_cannot_be_saved_or_loaded_says_so(pictures, tmp_path):
    diffusers, module = installed()
    scheduler = diffusers.DDPMScheduler()
    model = module.DiffusersModel(pictures, scheduler)
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="cannot save a Given"):
        given = Given(Denoiser(pictures), label=1)
        module.DiffusersModel(given, scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be written as text"):
        level = regularizers.Tikhonov(lambda sigma: sigma)
        module.DiffusersModel(pictures, scheduler, level).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot save VP\("):
        mine = Denoiser(pictures, processes.VP(0.1, 7.0))
        module.DiffusersModel(mine, scheduler).save_pretrained(tmp_path)
    assert not any(p.suffix == ".safetensors" for p in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        module.DiffusersModel.from_pretrained(tmp_path / "nothing")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"_class_name": "UNet2DModel"}, "was not written by"),
        ({"scheduler": {"_class_name": "Popen"}}, "no scheduler 'Popen'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            module.DiffusersModel.from_pretrained(tmp_path)


def test_training_and_timesteps_per_query():
    """As training loops call it: add_noise at random timesteps, before any set_timesteps."""
    diffusers, module = installed()
    p = problem()
    for scheduler in (diffusers.DDPMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        model = module.DiffusersModel(p.data, scheduler)
        t = torch.tensor([0, 250, 700, 999])
        x = scheduler.add_noise(p.rows[:4], normal(4, 2, 3, 3, seed=7), t)
        total = scheduler.alphas_cumprod[t].to(F64)
        want = p.eps(x, (1 - total).sqrt(), total.sqrt())
        torch.testing.assert_close(model(x, t).sample, want)
        scheduler.set_timesteps(10)
        mixed = torch.stack([scheduler.timesteps[3], scheduler.timesteps[7]])
        total = scheduler.alphas_cumprod[mixed].to(F64)
        want = p.eps(x[:2], (1 - total).sqrt(), total.sqrt())
        torch.testing.assert_close(model(x[:2], mixed).sample, want, rtol=1e-5, atol=1e-5)


def test_labels_conditions_and_what_is_refused():
    diffusers, module = installed()
    p, scheduler = problem(), diffusers.DDPMScheduler()
    x, total = normal(4, 2, 3, 3, seed=8), scheduler.alphas_cumprod[500].to(F64)
    levels = (1 - total).sqrt(), total.sqrt()
    model = module.DiffusersModel(p.data, scheduler)
    assert model.config.num_class_embeds == 3 and model.config.sample_size == 3
    label = torch.tensor([0, 1, 2, 3])
    want = [p.eps(x[i : i + 1], *levels, label=i if i < 3 else -1) for i in range(4)]
    torch.testing.assert_close(model(x, 500, label).sample, torch.cat(want))
    conditions = normal(20, 2, seed=9)
    data = TrainingSet(p.rows, conditions=conditions)
    asked = normal(4, 2, seed=10)
    found = module.DiffusersModel(data, scheduler, bandwidth=0.4)(
        x, 500, encoder_hidden_states=asked[:, None]
    )
    given = Given(Denoiser(data, processes.DDPM(scheduler.alphas_cumprod)), None, asked, 0.4)
    torch.testing.assert_close(found.sample, given.evaluate(x, 500.0).eps)
    assert model(x, 500, cross_attention_kwargs=None).sample.shape == x.shape
    with pytest.raises(TypeError, match="pooled_projections"):
        model(x, 500, pooled_projections=x)
    with pytest.raises(TypeError, match="a sample"):
        model(x)
    for name in ("ScoreSdeVeScheduler", "CMStochasticIterativeScheduler"):
        with pytest.raises(ValueError, match=f"got {name}"):
            module.DiffusersModel(p.data, getattr(diffusers, name)())
    with pytest.raises(ValueError, match="learned variance"):
        module.DiffusersModel(p.data, diffusers.DDPMScheduler(variance_type="learned_range"))


def test_another_scheduler_takes_its_place():
    diffusers, module = installed()
    p, x = problem(), normal(3, 2, 3, 3, seed=11)
    model = module.DiffusersModel(p.data, diffusers.DDPMScheduler())
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    model.scheduler = flow
    assert model.config.prediction_type == "flow_prediction"
    want = p.eps(x, 0.3, 0.7) - p.x0(x, 0.3, 0.7)
    torch.testing.assert_close(model(x, 300.0).sample, want, rtol=1e-6, atol=1e-6)
