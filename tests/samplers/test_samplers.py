"""Samplers: where they end, their order, their noise, early stops, wrong arguments."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy import stats

import memokern
from memokern import Denoiser, TrainingSet, processes, regularizers, samplers

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def points() -> torch.Tensor:
    """Six rows at least 0.5 apart."""
    return torch.tensor(
        [[0.0, 0.0], [1.0, 0.2], [-0.8, 0.6], [0.3, -1.0], [-0.5, -0.7], [0.9, 1.1]],
        dtype=torch.float64,
    )


PATHS = ["ve", "vp", "score-sde-vp", "edm", "flow-matching", "ddpm", "cosine"]


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.one_of(2)
def test_without_regularisation_samples_are_rows(name, solver):
    """The last level before the data must tell the rows apart: then x0 is one of them up to
    exp(-0.25 / (8 sigma^2)). Two rows can share a sample only on their bisector."""
    denoiser = Denoiser(points(), processes.get(name))
    if solver == "rk45":
        found = samplers.ode(denoiser, 20, solver=solver, seed=1)
    elif solver == "sde":
        found = samplers.sde(denoiser, 20, 100, seed=1)
    else:
        found = samplers.ode(denoiser, 20, 100, solver=solver, seed=1)
    assert found.x.shape == (20, 2) and found.x.dtype == torch.float64
    assert float(found.sigmas[0]) == denoiser.sigma_max and float(found.sigmas[-1]) == 0
    assert memokern.nearest(found.x, points()).distance.max() < 1e-3
    assert len(memokern.nearest(found.x, points()).index.unique()) >= 4


@pytest.mark.parametrize("name", ["edm", "vp", "flow-matching"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.one_of(2)
def test_order_of_the_solvers(name, solver, order):
    """Against rk45 to the same early stop: an order p divides the error by 2^p when the steps
    double. Smooth problem: rows one apart, stop at sigma = 0.5, EDM from sigma = 3."""
    process = processes.EDM(sigma_max=3.0) if name == "edm" else processes.get(name)
    denoiser = Denoiser(points(), process)
    start = process.prior((30, 2), torch.Generator().manual_seed(2), torch.float64)
    exact = samplers.ode(denoiser, start, solver="rk45", sigma_min=0.5, rtol=1e-11, atol=1e-12).x
    error = [
        float((samplers.ode(denoiser, start, n, solver=solver, sigma_min=0.5).x - exact).norm())
        for n in (32, 64, 128)
    ]
    found = np.log2(np.array(error[:-1]) / np.array(error[1:]))
    # The next term of the expansion changes the ratio by O(1 / n).
    assert np.abs(found - order).max() < 0.25, error


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_distance_to_the_end_is_proportional_to_sigma(name):
    """|x(t) - x*| = O(sigma) (arXiv 2501.15785): the quotient stays bounded and settles."""
    process = processes.get(name)
    denoiser = Denoiser(points(), process)
    found = samplers.ode(denoiser, 10, solver="rk45", sigma_min=1e-3, seed=3, trajectory=True)
    nearest = memokern.nearest(found.x, points()).index[:, 0]
    late = found.sigmas < 0.03
    alpha = process.alpha(found.times)[late][:, None, None]
    gap = (found.trajectory[late] - alpha * points()[nearest]).norm(dim=2)
    quotient = gap / found.sigmas[late][:, None]
    assert late.sum() >= 3 and (quotient < 10).all()
    # One weight is 1 to 1e-30 here, so eps is constant: the change is rk45's own error.
    torch.testing.assert_close(quotient[-1], quotient[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ve", "edm", "score-sde-vp"])
@pytest.mark.parametrize("solver", ["heun", "churn", "rk45", "sde"])
@pytest.mark.one_of(2)
def test_smoothed_bank_of_one_row_is_a_gaussian(name, solver):
    """SmoothedBank(h) around one row y: the exact score of N(y, h^2 I), so samples are that normal.

    S D = 6000 numbers (x - y) / h against N(0, 1): each of three statistics within 4.5 standard
    errors (chance 2e-5 in all), which leaves 4.5 / sqrt(12000) = 4% for the error of the steps.
    """
    row, h = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64), 0.5
    process = processes.EDM(sigma_max=20.0) if name == "edm" else processes.get(name)
    denoiser = Denoiser(row, process, regularizers.SmoothedBank(h))
    generator = torch.Generator().manual_seed(5)
    # VE ends its noise at 4.6, VP has alpha > 0: the start is drawn from the process's marginal.
    t = torch.tensor(process.t_noise, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    start = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    start = alpha * row + (sigma**2 + alpha**2 * h**2).sqrt() * start
    if solver == "sde":
        found = samplers.sde(denoiser, start, 300, generator=generator)
    elif solver == "rk45":
        found = samplers.ode(denoiser, start, solver="rk45")
    else:
        churn = 20.0 if solver == "churn" else 0.0
        found = samplers.ode(
            denoiser, start, 60, solver="heun", churn=churn, churn_min=0.05, generator=generator
        )
    z = ((found.x - row) / h).flatten().numpy()
    n = z.size
    assert abs(z.mean()) < 4.5 / math.sqrt(n)
    assert abs((z**2).mean() - 1) < 4.5 * math.sqrt(2 / n)
    assert stats.kstest(z, "norm").pvalue > 1e-5


def test_the_grid_of_ddpm_is_finer_where_it_matters():
    """The flow of a smoothed bank has an exact end; 18 steps of Heun come nearer to it on the
    default grid than evenly. Measured: 0.14 and 0.43."""
    regularizer = regularizers.SmoothedBank(0.15)
    start = processes.DDPM().prior((16, 8, 8), torch.Generator().manual_seed(0), torch.float64)
    ends = []
    for rho, options in (
        (7.0, {"solver": "rk45", "rtol": 1e-7, "atol": 1e-9}),
        (7.0, {"steps": 18}),
        (None, {"steps": 18}),
    ):
        denoiser = Denoiser(TrainingSet.digits(), processes.DDPM(rho=rho), regularizer)
        ends.append(samplers.ode(denoiser, start, **options).x)
    grid, even = ((end - ends[0]).flatten(1).norm(dim=1).median() for end in ends[1:])
    assert grid < 0.2 and even > 2 * grid


def test_heun_on_the_edm_grid_evaluates_as_karras_say():
    denoiser = Denoiser(points())
    assert samplers.ode(denoiser, 2, 18, solver="heun", seed=0).nfe == 35
    assert samplers.ode(denoiser, 2, 18, solver="euler", seed=0).nfe == 18
    assert samplers.sde(denoiser, 2, 18, seed=0).nfe == 18
    assert samplers.ode(denoiser, 2, 18, sigma_min=0.1, seed=0).nfe == 36


def test_churn_raises_the_level_as_algorithm_2():
    """One step with churn, written out: t_hat = t + gamma t, x + sqrt(t_hat^2 - t^2) S_noise z."""
    denoiser = Denoiser(points(), processes.EDM(sigma_max=2.0))
    start = normal(4, 2)
    found = samplers.ode(
        denoiser, start, 1, solver="euler", sigma_min=0.5, churn=0.3, churn_noise=1.1, seed=7
    ).x
    raised = 2.0 * 1.3
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = start + 1.1 * math.sqrt(raised**2 - 4) * z
    d = (x - denoiser(x, raised)) / raised
    torch.testing.assert_close(found, x + (0.5 - raised) * d)
    still = samplers.ode(denoiser, start, 1, solver="euler", sigma_min=0.5)
    outside = samplers.ode(
        denoiser, start, 1, solver="euler", sigma_min=0.5, churn=0.3, churn_max=1.9, seed=7
    )
    assert torch.equal(still.x, outside.x)


def test_euler_maruyama_step():
    """One step of dx = (f x - g^2 score) dt + g dW from t_noise, written out."""
    process = processes.VP()
    denoiser = Denoiser(points(), process, prediction="score")
    start = normal(4, 2)
    found = samplers.sde(denoiser, start, 1, sigma_min=0.7, seed=7).x
    t, to = torch.tensor(1.0, dtype=torch.float64), process.time_of_sigma(0.7)
    dt = to - t
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    g = process.diffusion(t)
    drift = process.drift(t) * start - g**2 * denoiser(start, t)
    torch.testing.assert_close(found, start + drift * dt + g * dt.abs().sqrt() * z)


def test_same_seed_same_samples():
    denoiser = Denoiser(points())
    for run in (
        lambda **k: samplers.ode(denoiser, 4, 10, churn=5.0, **k),
        lambda **k: samplers.sde(denoiser, 4, 10, **k),
    ):
        one, two = run(seed=3, sigma_min=0.3), run(seed=3, sigma_min=0.3)
        other = run(generator=torch.Generator().manual_seed(3), sigma_min=0.3)
        assert torch.equal(one.x, two.x) and torch.equal(one.x, other.x)
        assert not torch.equal(one.x, run(seed=4, sigma_min=0.3).x)
    state = torch.get_rng_state()
    samplers.sde(denoiser, 4, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.one_of(3)
def test_early_stop_ends_at_its_level(name, solver):
    process = processes.get(name)
    denoiser = Denoiser(points(), process)

    def run(**options):
        if solver == "sde":
            return samplers.sde(denoiser, 6, 100, sigma_min=0.05, seed=2, **options)
        steps = None if solver == "rk45" else 40
        return samplers.ode(denoiser, 6, steps, solver=solver, sigma_min=0.05, seed=2, **options)

    found = run()
    assert float(found.sigmas[-1]) == pytest.approx(0.05, rel=1e-9)
    distance = memokern.nearest(found.x, float(process.alpha(found.times[-1])) * points()).distance
    level = 0.05
    if solver == "sde":  # Euler-Maruyama's last step adds noise of variance g^2 dt
        before = found.times[-2]
        added = process.diffusion(before).square() * (found.times[-1] - before).abs()
        level = math.sqrt(level**2 + float(added))
        assert level < 0.1
    # Noise of that level in 2-D: longer than 6.5 of it has chance exp(-21); 0 has none.
    assert (distance > 1e-6).all() and distance.max() < 6.5 * level
    last = run(denoise_last=True)
    assert float(last.sigmas[-1]) == 0 and last.nfe == found.nfe + 1
    expected = denoiser(found.x, found.times[-1])
    torch.testing.assert_close(last.x, expected * float(process.alpha(last.times[-1])))


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
def test_trajectory_holds_every_state(solver):
    denoiser = Denoiser(points())
    start = 80 * normal(3, 2)
    if solver == "sde":
        found = samplers.sde(denoiser, start, 12, seed=0, trajectory=True)
    else:
        steps = None if solver == "rk45" else 12
        found = samplers.ode(denoiser, start, steps, solver=solver, trajectory=True)
    k = len(found.times)
    assert found.trajectory.shape == (k, 3, 2) and found.sigmas.shape == (k,)
    torch.testing.assert_close(found.trajectory[0], start, rtol=1e-14, atol=0)
    assert torch.equal(found.trajectory[-1], found.x)
    assert k == 13 or solver == "rk45"
    torch.testing.assert_close(found.sigmas, denoiser.process.sigma(found.times))
    plain = (
        samplers.sde(denoiser, start, 12, seed=0)
        if solver == "sde"
        else samplers.ode(denoiser, start, steps, solver=solver)
    )
    assert plain.trajectory is None and torch.equal(plain.x, found.x)


def test_any_prediction_samples_the_same():
    for prediction in ("x0", "velocity"):
        denoiser = Denoiser(points(), prediction=prediction)
        x = samplers.ode(denoiser, 4, 10, seed=0).x
        assert memokern.nearest(x, points()).distance.max() < 1e-3


def test_labels_and_bias_reach_every_evaluation():
    data = TrainingSet(points(), labels=[0, 0, 0, 1, 1, 1])
    denoiser = Denoiser(data)
    wanted = torch.tensor([0, 1, 1, 0, 1])
    for found in (
        samplers.ode(denoiser, 5, label=wanted, seed=0),
        samplers.sde(denoiser, 5, 100, label=wanted, seed=0),
        samplers.ode(denoiser, 5, solver="rk45", label=wanted, seed=0),
    ):
        assert torch.equal(data.labels[memokern.nearest(found.x, data).index[:, 0]], wanted)
    only = torch.full((6,), -torch.inf, dtype=torch.float64)
    only[4] = 0
    assert (memokern.nearest(samplers.ode(denoiser, 5, bias=only).x, data).index == 4).all()


def test_images_in_float32_and_progress(capfd):
    digits = TrainingSet.digits()
    found = samplers.ode(Denoiser(digits), 2, 8, seed=0, progress=True)
    assert found.x.shape == (2, 8, 8) and found.x.dtype == torch.float32
    assert "8/8" in capfd.readouterr().err
    samplers.ode(Denoiser(digits), 2, 8, seed=0)
    assert capfd.readouterr().err == ""
    assert samplers.ode(Denoiser(digits), 2, 2, dtype=torch.float64).x.dtype == torch.float64


def test_gradients_with_respect_to_starts():
    denoiser = Denoiser(points(), processes.EDM(sigma_max=2.0))
    start = normal(2, 2).requires_grad_()
    for solver in ("euler", "heun"):
        assert torch.autograd.gradcheck(
            lambda x, s=solver: samplers.ode(denoiser, x, 3, solver=s, sigma_min=0.5).x, (start,)
        )
    assert not samplers.ode(denoiser, start.detach(), 3).x.requires_grad


def test_a_users_own_process():
    class Circle(processes.Process):
        t_noise, t_data = math.pi / 2, 0.0

        def alpha(self, t):
            return torch.cos(t)

        def sigma(self, t):
            return torch.sin(t)

    denoiser = Denoiser(points(), Circle())
    for found in (
        samplers.ode(denoiser, 10, 60, seed=1),
        samplers.ode(denoiser, 10, solver="rk45", seed=1),
        samplers.sde(denoiser, 10, 100, seed=1),
    ):
        assert memokern.nearest(found.x, points()).distance.max() < 1e-3


def test_numbers_of_numpy_are_numbers():
    denoiser = Denoiser(points())
    plain = samplers.ode(denoiser, 3, 6, sigma_min=0.25, churn=2.0, seed=5)
    numpy = samplers.ode(
        denoiser, np.int64(3), np.int32(6), sigma_min=np.float32(0.25), churn=np.float64(2.0),
        seed=np.uint8(5),
    )  # fmt: skip
    assert torch.equal(plain.x, numpy.x)


BAD = [
    ({"solver": "dpm"}, ValueError, "euler, heun, rk45"),
    ({"steps": 0}, ValueError, "expected steps >= 1, got 0"),
    ({"steps": 2.5}, TypeError, "steps as an int"),
    ({"steps": True}, TypeError, "steps as an int, got bool"),
    ({"start": 0}, ValueError, "expected start >= 1, got 0; it is the number of samples"),
    ({"start": 2.0}, TypeError, "number of samples"),
    ({"start": torch.zeros(3, 5)}, ValueError, "to match the rows"),
    ({"start": torch.full((1, 2), math.nan)}, ValueError, "finite starts"),
    ({"start": torch.zeros(2, 2).half()}, TypeError, "float32 or float64"),
    ({"dtype": torch.bfloat16}, TypeError, "float32 or torch.float64"),
    ({"sigma_min": 0.0}, ValueError, "sigma_min finite and > 0, got 0.0; leave it out"),
    ({"sigma_min": 80.0}, ValueError, "sigma_min below 80, where EDM.* starts, got 80.0; leave"),
    ({"sigma_min": math.nan}, ValueError, "sigma_min finite and > 0, got nan"),
    ({"sigma_min": math.inf}, ValueError, "sigma_min finite and > 0, got inf"),
    ({"sigma_min": "0.1"}, TypeError, "sigma_min as a number, got str; leave it out"),
    ({"solver": "rk45", "sigma_min": "0.1"}, TypeError, "sigma_min as a number, got str"),
    ({"denoise_last": True}, ValueError, "goes with sigma_min"),
    ({"churn": -1.0}, ValueError, "expected churn finite and >= 0, got -1.0"),
    ({"churn": math.nan}, ValueError, "expected churn finite and >= 0, got nan"),
    ({"churn": "much"}, TypeError, "expected churn as a number, got str"),
    ({"churn_noise": math.nan}, ValueError, "expected churn_noise finite and >= 0, got nan"),
    ({"churn_min": math.nan}, ValueError, "expected churn_min finite and >= 0, got nan"),
    ({"churn_max": math.nan}, ValueError, "expected churn_max >= 0, got nan"),
    ({"churn_min": 2.0, "churn_max": 1.0}, ValueError, "churn_max >= 2, got 1.0; churn_min is 2"),
    ({"solver": "rk45", "steps": 3}, ValueError, "its own steps"),
    ({"solver": "rk45", "churn": 3.0}, ValueError, "its own steps"),
    ({"solver": "rk45", "rtol": 0.0}, ValueError, "expected rtol finite and > 0, got 0.0"),
    ({"solver": "rk45", "rtol": -1e-3}, ValueError, "expected rtol finite and > 0, got -0.001"),
    ({"solver": "rk45", "rtol": math.nan}, ValueError, "expected rtol finite and > 0, got nan"),
    ({"solver": "rk45", "atol": -1.0}, ValueError, "expected atol finite and >= 0, got -1.0"),
    ({"solver": "rk45", "atol": math.nan}, ValueError, "expected atol finite and >= 0, got nan"),
    ({"solver": "rk45", "atol": [1.0]}, TypeError, "expected atol as a number, got list"),
    ({"rtol": 1e-3}, ValueError, "are rk45's"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
    ({"seed": 1.5}, TypeError, "seed as an int, got float; leave it out"),
    ({"seed": "1"}, TypeError, "seed as an int, got str"),
    ({"seed": 2**64}, ValueError, r"expected seed in -9\d+\.\.18\d+, got 18446744073709551616"),
    ({"generator": 7}, TypeError, r"generator as a torch\.Generator, got int; .* seed="),
    ({"denoiser": torch.nn.Identity()}, TypeError, r"memokern\.Denoiser"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_wrong_arguments_are_refused_early(options, error, match, monkeypatch):
    called = []
    monkeypatch.setattr(Denoiser, "evaluate", lambda *a, **k: called.append(1))
    options = {"denoiser": Denoiser(points()), "start": 2, **options}
    with pytest.raises(error, match=match):
        samplers.ode(**options)
    if options.keys() <= inspect.signature(samplers.sde).parameters.keys():
        with pytest.raises(error, match=match):
            samplers.sde(**options)
    assert not called
