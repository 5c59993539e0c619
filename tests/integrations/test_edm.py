"""EDM's sampler and loss (arXiv 2206.00364, algorithm 2, table 1), from their calling convention.

net(x, sigma, class_labels) with x float64 [B, C, R, R], sigma a float64 tensor [] or [B, 1, 1, 1],
class_labels one-hot float32 [B, label_dim] or None. The sampler reads sigma_min, sigma_max and
round_sigma; generate.py also img_channels, img_resolution and label_dim. Losses call
net(y + n, sigma, labels, augment_labels=...), and edm2's force_fp32= and return_logvar= too.
"""

import pytest
import torch

from memokern import Denoiser, Given, processes, regularizers
from memokern.integrations import EDMModel, VectorField
from memokern.training import MLP, LearnedDenoiser
from tests.integrations.clients import F64, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")


def edm_sampler(net, latents, class_labels=None, num_steps=8, rho=7.0, churn=0.0, noise=None):
    """Algorithm 2, as the client calls its networks."""
    low, high = net.sigma_min, min(net.sigma_max, 80.0)
    steps = torch.arange(num_steps, dtype=F64)
    t = high ** (1 / rho) + steps / (num_steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
    t = torch.cat([net.round_sigma(t**rho), torch.zeros_like(steps[:1])])
    x = latents.to(F64) * t[0]
    for i in range(num_steps):
        gamma = min(churn / num_steps, 2**0.5 - 1)
        t_hat = net.round_sigma(t[i] + gamma * t[i])
        if churn:
            x = x + (t_hat**2 - t[i] ** 2).sqrt() * noise[i]
        slope = (x - net(x, t_hat, class_labels).to(F64)) / t_hat
        ahead = x + (t[i + 1] - t_hat) * slope
        if i < num_steps - 1:
            other = (ahead - net(ahead, t[i + 1], class_labels).to(F64)) / t[i + 1]
            ahead = x + (t[i + 1] - t_hat) * (slope + other) / 2
        x = ahead
    return x


class Definition:
    """The closed form by the oracle, where the network stands."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, problem, label=-1):
        self.problem, self.label = problem, label

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return self.problem.x0(x, sigma, label=self.label)


@pytest.mark.parametrize("churn", [0.0, 2.0])
def test_its_sampler_ends_where_the_definition_takes_it(churn):
    p = problem()
    net = EDMModel(p.data)
    latents = normal(5, net.img_channels, net.img_resolution, net.img_resolution, seed=2)
    noise = normal(8, 5, 2, 3, 3, seed=3)
    found = edm_sampler(net, latents, churn=churn, noise=noise)
    torch.testing.assert_close(found, edm_sampler(Definition(p), latents, churn=churn, noise=noise))
    assert p.distance(found) < 1e-6


def test_class_labels_as_generate_py_makes_them():
    p = problem()
    net = EDMModel(p.data)
    classes = torch.eye(net.label_dim)[torch.tensor([2, 0, 1])]
    latents = normal(3, 2, 3, 3, seed=4)
    found = edm_sampler(net, latents, classes)
    for i, label in enumerate([2, 0, 1]):
        want = edm_sampler(Definition(p, label), latents[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], want)
    none = torch.zeros(3, 3)  # what its networks take for no class
    torch.testing.assert_close(net(latents, 1.0, none), p.x0(latents, 1.0))


def test_its_loss_calls():
    p = problem()
    net = EDMModel(p.data)
    y, sigma = p.rows[:4], torch.tensor([0.1, 0.5, 1.0, 5.0]).reshape(-1, 1, 1, 1)
    x = y + sigma * normal(4, 2, 3, 3, seed=5)
    one_hot = torch.eye(3)[p.labels[:4]]
    want = torch.cat([p.x0(x[i : i + 1], sigma[i], label=int(p.labels[i])) for i in range(4)])
    zeros = torch.zeros(4, 9)
    torch.testing.assert_close(net(x, sigma, one_hot, augment_labels=zeros), want)
    torch.testing.assert_close(net(x, sigma, p.labels[:4], force_fp32=True), want)
    with pytest.raises(ValueError, match="augment_labels absent or zero"):
        net(x, sigma, one_hot, augment_labels=zeros + 1)
    with pytest.raises(ValueError, match="return_logvar"):
        net(x, sigma, one_hot, return_logvar=True)


def test_a_denoiser_keeps_its_process_and_regulariser():
    p, x = problem(), normal(4, 2, 3, 3, seed=6)
    flow = EDMModel(Denoiser(p.data, processes.FlowMatching()))
    assert 0 < flow.sigma_min < 0.01 and flow.sigma_max == 80.0
    torch.testing.assert_close(flow(x, 1.3), p.x0(x, 1.3))
    vp = processes.ScoreSDEVP()
    found = EDMModel(Denoiser(p.data, vp))
    assert found.sigma_max == pytest.approx(float(vp.ratio(torch.tensor(1.0, dtype=F64))))
    gated = EDMModel(p.data, regularizers.Tikhonov(0.01))
    samples = edm_sampler(gated, normal(5, 2, 3, 3, seed=7))
    assert torch.isfinite(samples).all() and p.distance(samples) > 1e-3


def test_a_trained_network_stands_there_too():
    torch.manual_seed(0)
    learned = LearnedDenoiser(MLP((2, 3, 3), width=8))
    x, sigma = normal(3, 2, 3, 3, seed=8).float(), torch.tensor([2.0, 0.5, 0.1], dtype=F64)
    torch.testing.assert_close(EDMModel(learned)(x, sigma), learned(x, sigma))


def test_a_network_is_asked_for_no_more_noise_than_it_was_trained_on():
    torch.manual_seed(0)
    learned = LearnedDenoiser(MLP((2, 3, 3), width=8))
    x = normal(2, 2, 3, 3, seed=10).float()
    at_80 = learned(80 * x, 80.0)
    torch.testing.assert_close(EDMModel(Given(learned))(160 * x, 160.0), learned(160 * x, 160.0))
    model = VectorField(learned)  # flow matching starts with noise alone
    torch.testing.assert_close(model(0.0, x), at_80 - x)
    t = torch.tensor([1 / 161, 0.4], dtype=F64)  # sigma / alpha = 160 and 1.5
    found = model(t, x)
    alpha, sigma = t[0].float(), 1 - t[0].float()
    x0 = learned(80 * x[:1] / sigma, 80.0)
    torch.testing.assert_close(found[:1], x0 - (x[:1] - alpha * x0) / sigma, rtol=1e-4, atol=1e-5)


def test_gradients_go_through():
    p = problem()
    net = EDMModel(p.data)
    x = normal(2, 2, 3, 3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: net(v, torch.tensor([0.7, 1.2])), x)
