"""What EDM's scripts read, and labels of guidance: one-hot, and the null class."""

import pytest
import torch

from memokern import Denoiser, Given, TrainingSet, samplers
from memokern.training import MLP, LearnedDenoiser

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def network() -> Denoiser:
    rows = normal(12, 2, 3, 3, seed=1)
    weights = normal(12, seed=2)
    return Denoiser(TrainingSet(rows, labels=torch.arange(12) % 3, log_weights=weights))


def test_what_edms_scripts_read(network):
    assert (network.img_channels, network.img_resolution, network.label_dim) == (2, 3, 3)
    flat = Denoiser(normal(4, 6))
    assert flat.label_dim == 0
    assert not hasattr(flat, "img_channels") and not hasattr(flat, "img_resolution")
    assert not hasattr(Denoiser(normal(4, 1, 2, 3)), "img_resolution")
    # generate.py of Karras et al.
    shape = [5, network.img_channels, network.img_resolution, network.img_resolution]
    latents = normal(*shape, seed=3)
    classes = torch.eye(network.label_dim)[torch.tensor([0, 2, 1, 0, 1])]
    found = network(latents, torch.tensor(1.0), classes).to(torch.float64)
    assert torch.equal(found, network(latents, 1.0, torch.tensor([0, 2, 1, 0, 1])))


@pytest.mark.parametrize("null", ["tensor", "list", "one-hot", "minus one in a list"])
def test_the_null_class_means_all_rows(network, null):
    x, bias = normal(4, 2, 3, 3, seed=4), normal(12, seed=5)
    label = {
        "tensor": torch.tensor([1, -1, 2, -1]),
        "list": [1, None, 2, None],
        "minus one in a list": [1, -1, 2, -1],
        "one-hot": torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]),
    }[null]
    found = network.evaluate(x, 0.8, label, bias=bias, certificate=True)
    for i, one in enumerate([1, None, 2, None]):
        want = network.evaluate(x[i : i + 1], 0.8, one, bias=bias)
        torch.testing.assert_close(found.x0[i], want.x0[0])
        log_p = found.posterior.log_density[i]
        torch.testing.assert_close(log_p, want.posterior.log_density[0])
    assert torch.equal(network(x, 0.8, -1), network(x, 0.8))
    assert torch.equal(network(x, 0.8, label), network.evaluate(x, 0.8, label).x0)
    assert samplers.ode(network, 4, 3, label=label, seed=0).x.shape == x.shape


def test_a_network_with_labels_can_be_guided_too():
    torch.manual_seed(0)
    learned = LearnedDenoiser(MLP((5,), width=8, classes=3))
    x = normal(4, 5, seed=9).float()
    part, whole = learned.evaluate(x, 0.7, 2), learned.evaluate(x, 0.7)
    assert torch.equal(Given(learned, 2).evaluate(x, 0.7).x0, part.x0)
    guided = Given(learned, 2, guidance=1.5).evaluate(x, 0.7)
    torch.testing.assert_close(guided.eps, torch.lerp(whole.eps, part.eps, 1.5))
    assert guided.certificate is None
    assert samplers.ode(Given(learned, 2, guidance=1.5), 3, 4, seed=0).x.shape == (3, 5)


def test_minus_one_where_rows_have_it(network):
    labels = torch.arange(12) % 3 - 1
    other = Denoiser(TrainingSet(network.data.rows.reshape(12, 2, 3, 3), labels=labels))
    x = normal(2, 2, 3, 3)
    assert not torch.equal(other(x, 0.8, -1), other(x, 0.8))
    torch.testing.assert_close(other(x, 0.8, -1), Denoiser(other.data.where(-1))(x, 0.8))
    plain = Denoiser(normal(4, 3))
    q = normal(2, 3)
    assert torch.equal(plain(q, 0.8, -1), plain(q, 0.8))
    torch.testing.assert_close(plain(q, 0.8, [None, -1]), plain(q, 0.8))


def test_labels_that_are_no_labels(network):
    x = normal(2, 2, 3, 3)
    for label, error, match in (
        (torch.tensor([[0.5, 0.5, 0.0]] * 2), ValueError, "one-hot"),
        (torch.tensor([[1.0, 1.0, 0.0]] * 2), ValueError, "one-hot"),
        (torch.tensor([[1.0, 0.0]] * 2), TypeError, "label as integers"),
        (torch.tensor([[1, 0, 0]] * 2), ValueError, "one per query"),
        ([0, None, 1], ValueError, "one per query"),
        (-2, ValueError, "no row has the label -2"),
        (7, ValueError, "no row has the label 7"),
    ):
        with pytest.raises(error, match=match):
            network(x, 0.5, label)
