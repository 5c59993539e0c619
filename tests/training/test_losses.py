"""Each loss by what minimises it: the closed-form score, regularised or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memokern import Denoiser, TrainingSet, processes, regularizers
from memokern.training import LearnedDenoiser, losses
from memokern.training.losses import draw_times

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 20_000


def rows() -> torch.Tensor:
    return torch.tensor([[-1.0, 0.3], [0.8, 1.0], [0.2, -0.9]], dtype=torch.float64)


class Fixed(nn.Module):
    """A network that gives the same eps everywhere: what is learned at one x and t."""

    shape = (2,)

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x, c):
        return self.value.expand(len(x), 2)


def samples_at(x, t, process):
    """Rows and noise that make x_t = x: drawn from the posterior."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    square = (x - alpha * rows()).square().sum(1)
    w = torch.softmax(-square / (2 * sigma**2), 0)
    y = rows()[torch.multinomial(w, COUNT, True, generator=torch.Generator().manual_seed(0))]
    return y, (x - alpha * y) / sigma


def minimiser(loss, x, t, process, reference=None) -> torch.Tensor:
    """The eps at which the mean loss of the samples that make x_t = x is stationary."""
    y, noise = samples_at(x, t, process)
    model = LearnedDenoiser(Fixed(torch.zeros(2, dtype=torch.float64)), process, output="eps")
    times = t.expand(COUNT)

    def slope(value):
        with torch.no_grad():
            model.network.value.copy_(value)
        total = loss.at(model, y, noise, times, None, reference).mean()
        return torch.autograd.grad(total, model.network.value)[0]

    zero = slope(torch.zeros(2))  # the loss is a square: one step of Newton's method is exact
    bend = torch.stack([slope(row) - zero for row in torch.eye(2)])
    return -torch.linalg.solve(bend, zero)


CASES = {
    "eps": (losses.Denoising("eps"), None),
    "x0": (losses.Denoising("x0", losses.edm_weight()), None),
    "v": (losses.Denoising("v"), None),
    "score": (losses.Denoising("score"), None),
    "velocity": (losses.Denoising("velocity"), None),
    "score matching": (losses.ScoreMatching(), None),
    "Tikhonov": (losses.ScoreMatching(0.2), regularizers.Tikhonov(0.2)),
    "Tikhonov, as it stands": (
        losses.ScoreMatching(0.2, normalize=False),
        regularizers.Tikhonov(0.2),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("process", ["vp", "edm"])
def test_the_minimiser_is_the_score_of_the_rows(name, process):
    loss, regularizer = CASES[name]
    process = processes.get(process)
    t = process.time_of_sigma(torch.tensor(0.6, dtype=torch.float64))
    x = torch.tensor([1.2, -0.7], dtype=torch.float64)
    right = Denoiser(rows(), process, regularizer, "eps")(x[None], t)[0]
    got = minimiser(loss, x, t, process)
    # The mean noise of 20,000 samples: standard deviations near 1, five standard errors.
    assert (got - right).abs().max() < 5 / COUNT**0.5
    if regularizer is not None:
        plain = Denoiser(rows(), process, None, "eps")(x[None], t)[0]
        assert (got - plain).abs().max() > 0.05


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_a_reference_has_the_same_minimiser_and_less_variance(name):
    process = processes.get(name)
    t = process.time_of_sigma(torch.tensor(0.6, dtype=torch.float64))
    x = torch.tensor([0.1, 0.2], dtype=torch.float64)
    y, noise = samples_at(x, t, process)
    data = TrainingSet(rows())
    loss = losses.Denoising("eps", reference=data, size=64)
    model = LearnedDenoiser(Fixed(torch.zeros(2, dtype=torch.float64)), process, output="eps")
    drawn = loss.draw_reference(torch.Generator().manual_seed(1))
    assert drawn.shape == (64, 2)
    right = Denoiser(rows(), process, None, "eps")(x[None], t)[0]
    got = minimiser(loss, x, t, process, rows())  # own rows count once more, and are drawn by w
    assert (got - right).abs().max() < 0.15
    spread = [
        float(each.at(model, y, noise, t.expand(COUNT), None, given).detach().std())
        for each, given in ((losses.Denoising("eps"), None), (loss, drawn.double()))
    ]
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "score", "velocity"])
def test_regression_is_zero_for_the_teacher_itself(prediction):
    """The network is the teacher, in the place of a module."""
    process = processes.get("vp")
    teacher = Denoiser(rows(), process, regularizers.Tikhonov(0.1))

    class Same(nn.Module):
        shape = (2,)

        def forward(self, x, c):
            t = c * (process.t_noise - process.t_data) + process.t_data
            return teacher.evaluate(x, t).eps

    model = LearnedDenoiser(Same(), process, output="eps", sigma_data=1.0)
    t = torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    y, noise = rows()[torch.arange(7) % 3], torch.randn(7, 2, dtype=torch.float64)
    loss = losses.Regression(teacher, prediction)
    model.network.register_parameter("p", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    assert loss.at(model, y, noise, t).max() < 1e-20
    other = losses.Regression(Denoiser(rows(), process), prediction)
    assert other.at(model, y, noise, t).min() > 1e-6
    with pytest.raises(ValueError, match="the teacher's process is VP"):
        loss.at(LearnedDenoiser(Same()), y, noise, t)


def test_times_are_the_processes_own():
    g = torch.Generator().manual_seed(0)
    edm = draw_times(processes.EDM(), 4000, g).log()
    assert float(edm.mean()) == pytest.approx(-1.2, abs=0.1)
    assert float(edm.std()) == pytest.approx(1.2, abs=0.1)
    flow = processes.FlowMatching()
    t = draw_times(flow, 4000, g)
    assert t.min() >= 0 and flow.sigma(t).min() >= 0.0019
    loss = losses.Denoising(times=lambda process, n, g: torch.full((n,), 0.5).double())
    model = LearnedDenoiser(Fixed(torch.zeros(2)), processes.VP(), output="eps")
    assert loss(model, rows().float(), g).shape == ()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected prediction one of"):
        losses.Denoising("noise")
    with pytest.raises(ValueError, match="expected c"):
        losses.ScoreMatching(-1.0)
    with pytest.raises(TypeError, match=r"expected a memokern.Denoiser"):
        losses.Regression(nn.Linear(1, 1))
