"""The solver with two closed ends: its order, the Gaussian part, the proof of the end, and what it
works with."""

import math

import numpy as np
import pytest
import torch

import memokern
from memokern import Denoiser, Given, TrainingSet, processes, regularizers, samplers
from memokern.processes import EDM
from memokern.samplers import Gaussian
from memokern.samplers import gaussian as gaussian_module
from memokern.samplers.base import level_of
from memokern.samplers.closed_end import ClosedEnd
from memokern.samplers.gaussian import of_samples
from memokern.samplers.interpolation import lagrange
from memokern.training import MLP, LearnedDenoiser

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def points() -> torch.Tensor:
    """Six rows at least 0.5 apart."""
    return torch.tensor(
        [[0.0, 0.0], [1.0, 0.2], [-0.8, 0.6], [0.3, -1.0], [-0.5, -0.7], [0.9, 1.1]],
        dtype=torch.float64,
    )


def run(denoiser, start, steps=None, **options):
    return samplers.ode(denoiser, start, steps, solver="exponential", **options)


# --- the middle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edm", "vp", "flow-matching"])
def test_order_of_the_middle(name):
    """Without closed ends, against rk45 to an early stop: at least of second order."""
    process = processes.EDM(sigma_max=3.0) if name == "edm" else processes.get(name)
    denoiser = Denoiser(points(), process)
    start = process.prior((20, 2), generator(2), torch.float64)
    exact = samplers.ode(denoiser, start, solver="rk45", sigma_min=0.5, rtol=1e-11, atol=1e-12).x
    options = {"sigma_min": 0.5, "gaussian": False, "finish": False}
    error = [float((run(denoiser, start, n, **options).x - exact).norm()) for n in (24, 48, 96)]
    # Flow matching has no values to start with at alpha = 0: its first step is of first order.
    expected = 2 if name == "flow-matching" else 2.7
    assert np.log2(error[1] / error[2]) > expected - 0.3, error
    heun = float((samplers.ode(denoiser, start, 96, sigma_min=0.5).x - exact).norm())
    assert error[2] < heun


def test_the_gaussian_part_converges_too():
    """All parts on, to an early stop: more steps leave less, and less than Heun's method."""
    denoiser = Denoiser(TrainingSet.digits())
    start = processes.EDM().prior((8, 8, 8), generator(3), torch.float64)
    exact = samplers.ode(denoiser, start, 400, sigma_min=2.0).x
    error = [float((run(denoiser, start, n, sigma_min=2.0).x - exact).norm()) for n in (9, 18, 72)]
    heun = [samplers.ode(denoiser, start, n, sigma_min=2.0) for n in (9, 18)]
    assert error[0] > error[1] > error[2] and error[2] < 0.01
    for n, found in zip((0, 1), heun, strict=True):
        assert error[n] < 1.5 * float((found.x - exact).norm())


def test_interpolation_is_exact_for_polynomials():
    places, at = [0.5, 1.0, 3.0], np.linspace(0, 4, 7)
    np.testing.assert_allclose(np.square(places) @ lagrange(places, at), at**2, atol=1e-12)


# --- the Gaussian ---------------------------------------------------------------------------------


def test_samples_that_share_a_few_gaussians_are_as_with_their_own():
    means, variances = normal(2, 3), normal(2, 3, seed=1).square()
    of = torch.tensor([0, 1, 1, 0, 1])
    shared = Gaussian(means, variances, of=of)
    own = Gaussian(means[of], variances[of])
    denoiser = Denoiser(normal(40, 3, seed=2), regularizer=regularizers.SmoothedBank(0.3))
    start = 80 * normal(5, 3, seed=3)
    found = [run(denoiser, start, 12, gaussian=g).x for g in (shared, own)]
    assert torch.equal(*found)
    assert torch.equal(shared.take(torch.tensor([4, 0])).mean, means[[1, 0]])


def test_moments_of_a_class_are_found_once_and_anew_for_new_rows(monkeypatch):
    fits = []
    moments = gaussian_module._moments
    monkeypatch.setattr(gaussian_module, "_moments", lambda *a: fits.append(a[0]) or moments(*a))
    data = TrainingSet(shaped((6,)), labels=torch.arange(300) % 3)
    label = torch.tensor([0, 2, 0])
    first, second = (of_samples(data, label, None, 3) for _ in range(2))
    assert len(fits) == 3 and torch.equal(first.mean, second.mean)  # of all rows and two classes
    data.rows.mul_(2)
    assert torch.equal(of_samples(data, label, None, 3).mean, 2 * first.mean)


@pytest.mark.parametrize("name", ["edm", "ve", "vp", "flow-matching", "cosine"])
@pytest.mark.one_of(2)
def test_a_gaussian_flow_is_exact_in_any_number_of_steps(name):
    """SmoothedBank(h) around one row is N(y, h^2 I), whose flow has a closed form."""
    row, h = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64), 0.5
    process = processes.get(name)
    denoiser = Denoiser(row, process, regularizers.SmoothedBank(h))
    gaussian = Gaussian(row[0], torch.full((3,), h**2, dtype=torch.float64))
    start = process.prior((5, 3), generator(1), torch.float64)
    found = run(denoiser, start, 3, sigma_min=0.05, gaussian=gaussian, finish=False)
    first, last = (torch.stack([process.alpha(t), process.sigma(t)]) for t in found.times[[0, -1]])

    def scale(level):
        return (level[0] ** 2 * h**2 + level[1] ** 2).sqrt()

    expected = last[0] * row + scale(last) / scale(first) * (start - first[0] * row)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)


def shaped(shape, n=300, seed=0):
    """Rows whose features vary by different amounts and together."""
    dim = math.prod(shape)
    mix = normal(12, dim, seed=seed + 1) * torch.linspace(2, 0.1, 12, dtype=torch.float64)[:, None]
    return (normal(n, 12, seed=seed) @ mix + 0.3 * normal(n, dim, seed=5) + 1).reshape(n, *shape)


@pytest.mark.parametrize(
    ("shape", "index"),
    [((10,), None), ((3, 20, 20), None), ((20, 20, 3), "dct"), ((1100,), None), ((1100,), "pca")],
)
def test_the_gaussian_has_the_moments_of_the_rows(shape, index):
    data = TrainingSet(shaped(shape))
    if index is not None:
        data.build_index(basis=index, progress=False)
    found = Gaussian.fit(data)
    rows = data.rows.reshape(data.n, -1)
    torch.testing.assert_close(found.mean, rows.mean(0))
    off = rows - rows.mean(0)
    # Without a complete basis of its own (1100 features) the variances outside share one number.
    total = found.variances[: found.transform.size]
    extra = total.shape[0] - data.dim
    kept = total if extra == 0 else torch.cat([total[:extra], total[extra : data.dim]])
    torch.testing.assert_close(kept.sum(), off.square().sum(1).mean(), rtol=1e-6, atol=0)
    top = torch.linalg.svdvals(off)[0] ** 2 / data.n
    if len(shape) == 1:  # noise is no image, and has no few cosines that hold its variance
        torch.testing.assert_close(found.variances.max(), top, rtol=0.02, atol=0)
    v = normal(4, data.dim, seed=9)
    z = found.transform.coordinates(v)
    torch.testing.assert_close(found.transform.values(z), v)
    torch.testing.assert_close(z.norm(dim=1), v.norm(dim=1))


def test_labels_and_weights_have_their_own_moments():
    rows, labels = shaped((6,)), torch.arange(300) % 3
    data = TrainingSet(rows, labels=labels)
    found = of_samples(data, torch.tensor([2, 0, -1]), None, 3)
    for i, part in enumerate((rows[labels == 2], rows[labels == 0], rows)):
        torch.testing.assert_close(found.mean[i], part.mean(0))
    one = of_samples(data, 1, None, 3)
    torch.testing.assert_close(one.mean, rows[labels == 1].mean(0))
    weights = torch.rand(300, generator=generator(), dtype=torch.float64)
    weighted = Gaussian.fit(TrainingSet(rows, log_weights=weights.log()))
    torch.testing.assert_close(weighted.mean, weights @ rows / weights.sum())
    biased = of_samples(data, None, weights.log(), 3)
    torch.testing.assert_close(biased.variances, weighted.variances)


# --- the end --------------------------------------------------------------------------------------

PROVABLE = ["none", "tikhonov:c=0.05", "bank:h=0.1", "temperature:sigma_c=0.4"]


@pytest.mark.parametrize("text", [*PROVABLE, "bank:h=0.1+tikhonov:c=0.02"])
@pytest.mark.parametrize("name", ["edm", "vp"])
@pytest.mark.one_of(3)
def test_no_proof_is_wrong(text, name):
    """From queries that are proven, at any level and near duplicates too, the flow itself,
    by the classical Runge-Kutta method, ends where the closed form says; many are proven."""
    rows = torch.cat([points(), points()[:2] + 0.02])
    process = processes.get(name)
    denoiser = Denoiser(rows, process, regularizers.parse(text))
    closed = ClosedEnd(denoiser, None)
    assert closed.possible and closed.plain == (text in ("none", "temperature:sigma_c=0.4"))
    ratio = torch.tensor([0.7, 0.35, 0.15, 0.05], dtype=torch.float64).repeat_interleave(48)
    t = process.time_of_ratio(ratio)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x = alpha * rows.repeat(24, 1) + sigma * normal(192, 2, seed=1)
    found = denoiser.evaluate(x, t)
    proven, end = closed.proven(found), level_of(process, process.time_of_ratio(0.01))
    assert 40 < int(proven.sum()) < 180
    exact = _followed(denoiser, (x / alpha)[proven], ratio[proven], end)
    row = memokern.nearest(found.posterior.mean, rows).index[proven, 0]
    assert torch.equal(_nearest_mean(exact, end, denoiser, rows), row)
    # The weight of the other rows moves the state by at most R on the way; the row is right.
    other = closed.other(found)[proven]
    away = (x / alpha)[proven] - rows[row]
    left = [closed.left(level_of(process, one), end) for one in t[proven]]
    formula = end.alpha * (rows[row] + torch.tensor(left)[:, None].double() * away)
    assert ((exact - formula).norm(dim=1) <= closed.diameter * other / (1 - other) + 1e-5).all()


def _followed(denoiser, u, ratio, end):
    """The flow of u = x / alpha from each one's sigma / alpha to a level, by the classical
    Runge-Kutta method in log s."""
    process, last = denoiser.process, math.log(end.sigma / end.alpha)
    step = (last - ratio.log()) / 60

    def slope(u, log_s):
        t = process.time_of_ratio(log_s.exp())
        return u - denoiser.evaluate(u * process.alpha(t)[:, None], t).x0

    for i in range(60):
        at, h = ratio.log() + i * step, step[:, None]
        k1 = slope(u, at)
        k2 = slope(u + h / 2 * k1, at + step / 2)
        k3 = slope(u + h / 2 * k2, at + step / 2)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h * k3, at + step))
    return end.alpha * u


def _nearest_mean(x, level, denoiser, rows):
    """Which row has the weight at the end."""
    return memokern.nearest(denoiser.evaluate(x, level.t).posterior.mean, rows).index[:, 0]


def test_a_proof_without_its_condition_would_be_wrong():
    """Where nearly all weight is one row's but the condition fails, another row may win."""
    rows = torch.tensor([[0.0], [0.05], [4.0]], dtype=torch.float64)
    denoiser = Denoiser(rows)
    closed = ClosedEnd(denoiser, torch.tensor([0.0, -12.0, 0.0], dtype=torch.float64))
    x = torch.tensor([[0.045]], dtype=torch.float64)
    found = denoiser.evaluate(x, 0.1, bias=torch.tensor([0.0, -12.0, 0.0], dtype=torch.float64))
    assert float(found.posterior.weight_sq) > 0.999 and not bool(closed.proven(found))
    exact = _followed(Denoiser(rows), x, torch.tensor([0.1]).double(), level_of(EDM(), 0.001))
    assert float(exact) > 0.04  # without the bias the second row takes it


@pytest.mark.parametrize("text", [*PROVABLE, "empirical-bayes:log_tau=-4", "unconditioned"])
@pytest.mark.one_of(2)
def test_every_regulariser_ends_where_heun_does(text):
    denoiser = Denoiser(TrainingSet.digits(), regularizer=regularizers.parse(text))
    start = processes.EDM().prior((8, 8, 8), generator(4), torch.float64)
    exact = samplers.ode(denoiser, start, 150, sigma_min=0.01).x
    found = run(denoiser, start, 60, sigma_min=0.01)
    off = (found.x - exact).flatten(1).norm(dim=1)
    assert off.median() < 0.02 and found.nfe < 85


def test_ends_are_rows_and_are_reached_early():
    data = TrainingSet.digits()
    start = processes.EDM().prior((16, 8, 8), generator(5), torch.float32)
    watched = []
    found = run(Denoiser(data), start, watch=watched.append, trajectory=True)
    near = memokern.nearest(found.x, data)
    assert near.distance.max() < 1e-5 and found.nfe == len(watched) <= 16
    assert [w.phase for w in watched] == sorted(
        (w.phase for w in watched), key=["gaussian", "middle", "end"].index
    )
    assert len({w.phase for w in watched}) == 3
    sizes = [len(w.certificate.rows_kept) for w in watched if w.phase != "end"]
    assert sizes[0] == 16 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 16
    path = found.trajectory
    assert path.shape[0] == len(found.times) == len(found.sigmas) and found.sigmas[-1] == 0
    assert torch.equal(path[0], start) and torch.equal(path[-1], found.x)
    assert torch.equal(run(Denoiser(data), start).x, found.x)


def test_both_ends_can_be_switched_off():
    data = TrainingSet.digits()
    start = processes.EDM().prior((6, 8, 8), generator(6), torch.float64)
    found = {
        (gaussian, finish): run(Denoiser(data), start, 40, gaussian=gaussian, finish=finish)
        for gaussian in (True, False)
        for finish in (True, False)
    }
    evaluations = [found[key].nfe for key in ((True, True), (False, True), (False, False))]
    assert evaluations == sorted(evaluations) and evaluations[2] == math.ceil(40 * 4 / 3) + 1
    for other in found.values():
        torch.testing.assert_close(other.x, found[True, True].x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ve", "vp", "score-sde-vp", "edm", "flow-matching", "cosine"])
@pytest.mark.one_of(3)
def test_early_stops_lie_on_the_same_path(name):
    process = processes.get(name)
    denoiser = Denoiser(points(), process)
    start = process.prior((10, 2), generator(7), torch.float64)
    found = run(denoiser, start, 60, sigma_min=0.05)
    exact = samplers.ode(denoiser, start, solver="rk45", sigma_min=0.05, rtol=1e-9, atol=1e-10)
    assert ((found.x - exact.x).norm(dim=1) < 2e-3).sum() >= 9
    assert float(found.sigmas[-1]) == pytest.approx(0.05)
    last = run(denoiser, start, 60, sigma_min=0.05, denoise_last=True)
    assert memokern.nearest(last.x, points()).distance.max() < 1e-3
    assert float(last.sigmas[-1]) == 0


# --- what it works with ---------------------------------------------------------------------------


def test_labels_conditions_biases_and_duplicates():
    rows = torch.cat([points(), points()])  # every end is a tie, which no proof can decide
    data = TrainingSet(rows, labels=[0, 0, 0, 1, 1, 1] * 2)
    found = run(Denoiser(data), 5, 18, seed=0)
    assert memokern.nearest(found.x, data).distance.max() < 1e-3
    wanted = torch.tensor([0, 1, 1, 0, 1])
    data = TrainingSet(points(), labels=[0, 0, 0, 1, 1, 1], conditions=points())
    for label in (wanted, wanted.tolist(), torch.nn.functional.one_hot(wanted).double()):
        ends = run(Denoiser(data), 5, label=label, seed=0).x
        assert torch.equal(data.labels[memokern.nearest(ends, data).index[:, 0]], wanted)
    given = Given(Denoiser(data), label=wanted)
    torch.testing.assert_close(run(given, 5, seed=0).x, ends)
    conditioned = Given(Denoiser(data), condition=points()[:5], bandwidth=0.0)
    torch.testing.assert_close(run(conditioned, 5, seed=0).x, points()[:5])
    guided = Given(Denoiser(data), label=1, guidance=1.5)
    assert run(guided, 5, seed=0).x.isfinite().all()
    only = torch.full((6,), -torch.inf, dtype=torch.float64)
    only[4] = 0
    assert (memokern.nearest(run(Denoiser(data), 5, bias=only).x, data).index == 4).all()


def test_a_network_with_the_gaussian_of_its_data():
    data = TrainingSet(points())
    network = LearnedDenoiser(MLP((2,), width=8), processes.EDM())
    start = processes.EDM().prior((4, 2), generator(8))
    with torch.no_grad():
        exact = samplers.ode(network, start, 200, sigma_min=0.5).x
        plain = run(network, start, 100, sigma_min=0.5)
        helped = run(network, start, 100, sigma_min=0.5, gaussian=Gaussian.fit(data))
    torch.testing.assert_close(plain.x, exact, rtol=0, atol=2e-2)
    torch.testing.assert_close(helped.x, exact, rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match=r"gaussian=samplers\.Gaussian\.fit"):
        run(network, start, gaussian=True)


def test_gradients_with_respect_to_starts():
    denoiser = Denoiser(points(), processes.EDM(sigma_max=2.0))
    start = (0.5 * normal(2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(denoiser, x, 3, sigma_min=0.5).x, (start,))
    denoiser = Denoiser(points(), processes.EDM(sigma_max=2.0), regularizers.Tikhonov(0.1))
    assert torch.autograd.gradcheck(lambda x: run(denoiser, x, 5).x, (start,))
    assert not run(denoiser, start.detach(), 3).x.requires_grad


def test_rows_as_the_index_prunes_them():
    data = TrainingSet(shaped((20,), n=400).float())
    start = processes.EDM().prior((8, 20), generator(9))
    dense = run(Denoiser(data, method="dense"), start)
    data.build_index(progress=False)
    pruned = run(Denoiser(data, method="pruned"), start)
    torch.testing.assert_close(pruned.x, dense.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"churn": 1.0}, ValueError, "no churn"),
        ({"solver": "heun", "gaussian": False}, ValueError, "belong to solver="),
        ({"solver": "heun", "finish": False}, ValueError, "belong to solver="),
        ({"gaussian": 3}, TypeError, "samplers.Gaussian, True or False, got int"),
        ({"gaussian": Gaussian(torch.zeros(3), torch.ones(3))}, ValueError, "of 2 features"),
        ({"rtol": 1e-3}, ValueError, "are rk45's"),
        ({"steps": 0}, ValueError, "expected steps >= 1"),
        ({"sigma_min": 80.0}, ValueError, "sigma_min below 80"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        samplers.ode(Denoiser(points()), 2, **{"solver": "exponential", **options})


def test_wrong_gaussians():
    with pytest.raises(TypeError, match="variances as a tensor, got float"):
        Gaussian(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"variances \[3\], got \[3\] and \[2\]"):
        Gaussian(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="variances >= 0"):
        Gaussian(torch.zeros(3), -torch.ones(3))
