"""score_sde's samplers, from the calling convention of its get_score_fn (arXiv 2011.13456).

VPSDE and subVPSDE: score = -model(x, 999 t) / std(t); VPSDE with continuous=False:
score = -model(x, (N - 1) t) / std[labels], labels cut to integers, of N betas evenly spaced from
beta_0 / N to beta_1 / N. VESDE: score = model(x, sigma(t)), or with continuous=False
model(x, labels), labels counting N levels from the largest. x and t are float32 in the client; the
tests use float64, so that rounding does not hide anything.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from memokern import Denoiser, processes
from memokern.integrations import ScoreSDEModel
from memokern.integrations.score_sde import SubVP
from tests.integrations.clients import F64, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")


def wide(v, x):
    return torch.as_tensor(v, dtype=F64).expand(len(x)).reshape(-1, *[1] * (x.dim() - 1))


@dataclass
class VPSDE:
    """The client's attributes, and what get_score_fn needs of marginal_prob."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    N: int = 1000

    def levels(self, t):
        """alpha and sigma."""
        log = -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2
        return torch.exp(log), (1 - torch.exp(2 * log)).sqrt()

    def labels(self, t):
        return 999 * t

    def score(self, model, x, t):
        return -model(x, self.labels(t)) / wide(self.levels(t)[1], x)

    def rates(self, t):
        """f and g^2 of dx = f x dt + g dW."""
        beta = self.beta_0 + t * (self.beta_1 - self.beta_0)
        return -beta / 2, beta


class subVPSDE(VPSDE):
    def levels(self, t):
        alpha, _ = super().levels(t)
        return alpha, 1 - alpha**2

    def rates(self, t):
        drift, beta = super().rates(t)
        return drift, beta * (1 - super().levels(t)[0] ** 4)


@dataclass
class VESDE:
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    N: int = 1000

    def levels(self, t):
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def labels(self, t):
        return self.levels(t)[1]

    def score(self, model, x, t):
        return model(x, self.labels(t))

    def rates(self, t):
        return 0 * t, self.levels(t)[1] ** 2 * 2 * math.log(self.sigma_max / self.sigma_min)


SDES = {"vp": VPSDE, "subvp": subVPSDE, "ve": VESDE}


def sample(sde, score, x, steps=60, end=1e-3):
    """Euler-Maruyama of the reverse SDE, as its EulerMaruyamaPredictor; the last step's mean."""
    times = torch.linspace(1, end, steps, dtype=F64)
    for i, t in enumerate(times):
        f, g2 = sde.rates(t)
        t_vec = t.expand(len(x))
        mean = x - (f * x - g2 * score(x, t_vec)) / steps
        x = mean + (g2 / steps).sqrt() * normal(*x.shape, seed=100 + i)
    return mean


@pytest.mark.parametrize("name", SDES)
def test_the_reverse_sde_is_that_of_the_definition(name):
    p, sde = problem(), SDES[name]()
    model = ScoreSDEModel(p.data, sde)

    def definition(x, t):
        alpha, sigma = sde.levels(t)
        return -p.eps(x, sigma, alpha) / wide(sigma, x)

    x = (sde.sigma_max if name == "ve" else 1.0) * normal(3, 2, 3, 3, seed=2)
    found = sample(sde, lambda x, t: sde.score(model, x, t), x)
    torch.testing.assert_close(found, sample(sde, definition, x), rtol=1e-7, atol=1e-7)
    # Its discretisation is that of a constant score, the noise that is left is what it leaves.
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", SDES)
def test_names_stand_for_the_clients_defaults(name):
    p, x = problem(), normal(3, 2, 3, 3, seed=3)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    labels = SDES[name]().labels(t)
    found = ScoreSDEModel(p.rows, name)(x, labels)
    torch.testing.assert_close(found, ScoreSDEModel(p.data, SDES[name]())(x, labels))


def test_discrete_vp_has_ddpms_levels():
    p, x = problem(), normal(4, 2, 3, 3, seed=4)
    sde = VPSDE(N=100)
    betas = torch.linspace(0.1 / 100, 20.0 / 100, 100, dtype=F64)
    total = torch.cumprod(1 - betas, 0)
    labels = torch.tensor([0.0, 12.0, 57.9, 99.0], dtype=F64)
    at = total[labels.long()]
    found = ScoreSDEModel(p.data, sde, continuous=False)(x, labels)
    torch.testing.assert_close(found, p.eps(x, (1 - at).sqrt(), at.sqrt()))


def test_discrete_ve_counts_from_the_largest_level():
    p, x = problem(), normal(3, 2, 3, 3, seed=5)
    sde = VESDE(N=50)
    levels = torch.exp(torch.linspace(math.log(50.0), math.log(0.01), 50, dtype=F64))
    labels = torch.tensor([0, 20, 49])
    sigma = levels[labels]
    found = ScoreSDEModel(p.data, sde, continuous=False)(x, labels)
    want = -p.eps(x, sigma) / wide(sigma, x)
    torch.testing.assert_close(found, want)


def test_denoisers_of_other_processes_and_types():
    p, x = problem(), normal(3, 2, 3, 3, seed=6)
    labels = 999 * torch.tensor([0.05, 0.5, 1.0], dtype=F64)
    want = ScoreSDEModel(p.data)(x, labels)
    for name in ("edm", "cosine", "flow-matching"):
        found = ScoreSDEModel(Denoiser(p.data, processes.get(name)))(x, labels)
        torch.testing.assert_close(found, want)
    assert ScoreSDEModel(p.data)(x.float(), labels.float()).dtype == torch.float32


def test_what_is_refused():
    rows = normal(4, 3)
    with pytest.raises(ValueError, match="expected sde of VPSDE, subVPSDE, VESDE"):
        ScoreSDEModel(rows, object())
    with pytest.raises(ValueError, match="sde"):
        ScoreSDEModel(rows, "edm")
    with pytest.raises(ValueError, match="continuous=True"):
        ScoreSDEModel(rows, "subvp", continuous=False)


def test_sub_vp_is_a_process():
    process = SubVP()
    t = torch.linspace(0.01, 1, 7, dtype=F64, requires_grad=True)
    for value, slope in (
        (process.alpha, process.d_alpha),
        (process.sigma, process.d_sigma),
    ):
        (want,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t).detach(), want)
    t = t.detach()
    torch.testing.assert_close(process.time_of_ratio(process.ratio(t)), t)
    beta = 0.1 + 19.9 * t
    want = (beta * (1 - torch.exp(-2 * (0.1 * t + 19.9 * t**2 / 2)))).sqrt()
    torch.testing.assert_close(process.diffusion(t), want)
    torch.testing.assert_close(process.time_of_sigma(process.sigma(t)), t)
