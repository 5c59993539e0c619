"""The denoiser as a network: predictions, labels, buffers, gradients."""

import copy
from itertools import pairwise

import pytest
import torch

import memokern
from memokern import Denoiser, TrainingSet, processes, regularizers, samplers
from memokern.denoiser import PREDICTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def labelled() -> TrainingSet:
    rows = normal(12, 2, 3, seed=1)
    return TrainingSet(
        rows, labels=torch.arange(12) % 3, log_weights=normal(12, seed=2), name="labelled"
    )


@pytest.mark.parametrize("name", processes.NAMES)
def test_predictions_agree_with_each_other_and_with_the_posterior(name, labelled):
    process = processes.get(name)
    t = process.time_of_sigma(torch.linspace(0.2, 0.7, 5, dtype=torch.float64))
    x = normal(5, 2, 3, seed=3)
    out = {p: Denoiser(labelled, process, prediction=p)(x, t) for p in PREDICTIONS}
    alpha, sigma, da, ds = (
        f(t)[:, None, None]
        for f in (process.alpha, process.sigma, process.d_alpha, process.d_sigma)
    )
    expected = memokern.posterior(x, labelled, process.sigma(t), process.alpha(t))
    torch.testing.assert_close(out["x0"], expected.mean)
    torch.testing.assert_close(alpha * out["x0"] + sigma * out["eps"], x)
    torch.testing.assert_close(out["score"], -out["eps"] / sigma)
    torch.testing.assert_close(out["v"], alpha * out["eps"] - sigma * out["x0"])
    torch.testing.assert_close(out["velocity"], da * out["x0"] + ds * out["eps"])


def test_velocity_of_the_sde_coefficients(labelled):
    """The probability flow dx/dt = f x - g^2 score / 2 (arXiv 2011.13456, eq. 13)."""
    for name in ("ve", "vp", "score-sde-vp", "edm", "cosine"):
        process = processes.get(name)
        x, t = normal(4, 2, 3), process.time_of_sigma(0.5)
        field = Denoiser(labelled, process, prediction="velocity")(x, t)
        score = Denoiser(labelled, process, prediction="score")(x, t)
        flow = process.drift(t) * x - process.diffusion(t).square() / 2 * score
        torch.testing.assert_close(field, flow, rtol=1e-9, atol=1e-9)


def test_it_is_the_regularised_score(labelled):
    regularizer = regularizers.Tikhonov(0.3)
    x = normal(4, 2, 3)
    found = Denoiser(labelled, regularizer=regularizer, prediction="score")(x, 0.5)
    plain = memokern.score(x, labelled, 0.5)
    torch.testing.assert_close(found, plain * 0.25 / 0.55)


def test_shapes_of_t_that_other_samplers_use(labelled):
    network, x = Denoiser(labelled), normal(3, 2, 3)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = network(x, sigma)
    assert torch.equal(network(x, sigma.reshape(3, 1, 1)), expected)
    assert torch.equal(network(x, torch.tensor(1.0))[1], expected[1])
    assert torch.equal(network(x[1], 1.0), expected[1])
    assert torch.equal(network(x[1], torch.ones(1)), expected[1])
    # Six queries may take another kernel than three: logits below 100 rounded in another order.
    deep = network(x.expand(2, 3, 2, 3), sigma)
    torch.testing.assert_close(deep[1], expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="broadcasts to the batch"):
        network(x, sigma.reshape(1, 3, 1, 1).expand(1, 3, 1, 2))


def test_as_the_network_of_the_edm_sampler():
    """Algorithm 2 of arXiv 2206.00364 as its released code calls a network: net.sigma_min,
    sigma_max, round_sigma and net(x, sigma, class_labels)."""
    rows = normal(6, 1, 2, 2, seed=4)
    net = Denoiser(rows)
    steps = torch.arange(18, dtype=torch.float64)
    high, low = net.sigma_max ** (1 / 7), net.sigma_min ** (1 / 7)
    t_steps = (high + steps / 17 * (low - high)) ** 7
    t_steps = torch.cat([net.round_sigma(t_steps), torch.zeros(1, dtype=torch.float64)])
    x = normal(5, 1, 2, 2, seed=5) * t_steps[0]
    start = x
    for i, (now, to) in enumerate(pairwise(t_steps)):
        d = (x - net(x, now, None)) / now
        ahead = x + (to - now) * d
        if i < 17:
            d = (d + (ahead - net(ahead, to, None)) / to) / 2
            ahead = x + (to - now) * d
        x = ahead
    assert memokern.nearest(x, rows).distance.max() < 1e-12
    torch.testing.assert_close(samplers.ode(net, start, 18, solver="heun").x, x)


def test_labels_restrict_to_their_rows(labelled):
    network = Denoiser(labelled, regularizer=regularizers.EmpiricalBayes(-1.0))
    x, bias = normal(4, 2, 3), normal(12, seed=6)
    for label in range(3):
        mask = torch.where(labelled.labels == label, 0.0, -torch.inf).double()
        found = network.evaluate(x, 0.7, label, bias=bias)
        masked = network.evaluate(x, 0.7, bias=bias + mask)
        torch.testing.assert_close(found.x0, masked.x0)
        torch.testing.assert_close(found.posterior.log_density, masked.posterior.log_density)
    labels = torch.tensor([2, 0, 2, 1])
    t = torch.tensor([0.3, 0.7, 0.5, 0.9], dtype=torch.float64)
    mixed = network.evaluate(x, t, labels, bias=bias)
    for i, label in enumerate(labels.tolist()):
        one = network.evaluate(x[i], t[i], label, bias=bias)
        torch.testing.assert_close(mixed.x0[i], one.x0)
        torch.testing.assert_close(mixed.score[i], one.score)
        torch.testing.assert_close(mixed.posterior.log_density[i], one.posterior.log_density)
        torch.testing.assert_close(mixed.posterior.divergence[i], one.posterior.divergence)
        torch.testing.assert_close(mixed.log_potential[i], one.log_potential)
    square = network.evaluate(x.reshape(2, 2, 2, 3), t.reshape(2, 2), labels.reshape(2, 2))
    torch.testing.assert_close(square.x0.reshape(4, 2, 3), network(x, t, labels))


def test_labels_with_a_regulariser_that_replicates(labelled):
    network = Denoiser(labelled, regularizer=regularizers.GaussianSmoothing(0.2, 4))
    x, labels = normal(4, 2, 3), torch.tensor([2, 0, 2, 1])
    mixed = network.evaluate(x, 0.7, labels)
    for i, label in enumerate(labels.tolist()):
        one = network.evaluate(x[i : i + 1], 0.7, label)
        torch.testing.assert_close(mixed.x0[i], one.x0[0])
        torch.testing.assert_close(mixed.posterior.log_z[:, i], one.posterior.log_z[:, 0])


def test_gradients_through_x_and_t(labelled):
    for name in ("vp", "cosine", "edm"):
        process = processes.get(name)
        for prediction in PREDICTIONS:
            network = Denoiser(labelled, process, regularizers.Tikhonov(0.1), prediction)
            x = normal(2, 2, 3).requires_grad_()
            t = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(network, (x, t))
    labels = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda x, t: network(x, t, labels), (x, t))


def test_state_dict_round_trip_and_the_callers_rows(labelled, tmp_path):
    one = Denoiser(labelled)
    assert set(one.state_dict()) == {"rows", "affine", "labels", "log_weights"}
    assert one.rows.data_ptr() == labelled.rows.data_ptr()  # no copy of the data set
    mine = normal(12, 2, 3, seed=9)
    before = mine.clone()
    two = Denoiser(
        TrainingSet(mine, labels=torch.zeros(12).long(), log_weights=torch.zeros(12).double())
    )
    path = tmp_path / "denoiser.pt"
    torch.save(one.state_dict(), path)
    two.load_state_dict(torch.load(path, weights_only=True))
    x = normal(4, 2, 3)
    assert torch.equal(two(x, 0.5), one(x, 0.5))
    assert torch.equal(two(x, 0.5, 1), one(x, 0.5, 1))
    assert torch.equal(mine, before)
    holder = torch.nn.Sequential(torch.nn.Identity(), one)
    other = torch.nn.Sequential(torch.nn.Identity(), copy.deepcopy(two))
    other.load_state_dict(holder.state_dict())
    assert other[1].rows.data_ptr() != one.rows.data_ptr()  # two modules, two memories
    assert torch.equal(other[1](x, 0.5), one(x, 0.5))


def test_state_dict_keeps_the_scale_of_uint8_rows():
    digits = TrainingSet.digits()
    one = Denoiser(digits)
    two = Denoiser(TrainingSet(torch.zeros(1797, 8, 8, dtype=torch.uint8), labels=digits.labels))
    two.load_state_dict(one.state_dict())
    x = normal(2, 8, 8, dtype=torch.float32)
    assert two.data.scale == digits.scale and torch.equal(two(x, 0.5), one(x, 0.5))


def test_state_dict_mismatches_say_what_to_do(labelled):
    state = Denoiser(labelled).state_dict()
    cases = [
        (normal(11, 2, 3), "12, 2, 3.*make the Denoiser on data of that shape"),
        (normal(12, 2, 3).float(), "float64.*make the Denoiser on data of that shape"),
    ]
    for rows, match in cases:
        labels, weights = torch.zeros(len(rows)).long(), torch.zeros(len(rows)).double()
        network = Denoiser(TrainingSet(rows, labels=labels, log_weights=weights))
        before = network.rows.clone()
        with pytest.raises(RuntimeError, match=match):
            network.load_state_dict(state)
        assert torch.equal(network.rows, before)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*labels"):
        Denoiser(normal(12, 2, 3)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*labels"):
        Denoiser(labelled).load_state_dict(Denoiser(labelled.rows.reshape(12, 2, 3)).state_dict())
    bad = {k: v.clone() for k, v in state.items()}
    bad["rows"][3] = torch.nan
    with pytest.raises(RuntimeError, match="finite values"):
        Denoiser(labelled).load_state_dict(bad)


def test_to_another_type_converts_rows_and_nothing_else(labelled):
    network = Denoiser(labelled).float()
    assert network.rows.dtype == torch.float32 and network.data.dtype == torch.float32
    assert network.log_weights.dtype == network.affine.dtype == torch.float64
    assert labelled.dtype == torch.float64
    # Rows rounded to 24 bits, 6e-8, times the logits' slope |x| |y| / sigma^2 < 100.
    x = normal(4, 2, 3)
    torch.testing.assert_close(network(x, 0.7), Denoiser(labelled)(x, 0.7), rtol=1e-5, atol=1e-5)
    pixels = Denoiser(TrainingSet.digits()).double().half()
    assert pixels.rows.dtype == torch.uint8 and pixels.affine.dtype == torch.float64


def test_meta_keeps_shapes_and_a_state_brings_the_values_back(labelled):
    digits = TrainingSet.digits()
    x = normal(2, 8, 8, dtype=torch.float32)
    for data in (labelled, digits):
        network = Denoiser(data, processes.VP(), regularizers.EmpiricalBayes(-3.0))
        state, query = network.state_dict(), x if data is digits else normal(2, 2, 3)
        expected = network(query, 0.7, 1)
        for back in ("load", "to_empty"):
            shell = copy.deepcopy(network).to("meta")
            assert {b.device.type for b in shell.buffers()} == {"meta"}
            assert (shell.data.n, shell.data.shape) == (data.n, data.shape)
            assert (shell.data.scale, shell.data.shift) == (data.scale, data.shift)
            out = shell(query.to("meta"), 0.7)
            assert out.is_meta and out.shape == query.shape and out.dtype == query.dtype
            with pytest.raises(RuntimeError, match="load a state first"):
                shell(query.to("meta"), 0.7, 1)
            with pytest.raises(NotImplementedError, match="to_empty"):
                shell.to("cpu")
            if back == "to_empty":
                shell = copy.deepcopy(shell).to_empty(device="cpu")
                assert shell.affine.tolist() == [data.scale, data.shift]
            shell.load_state_dict(state)
            assert torch.equal(shell(query, 0.7, 1), expected)
            assert shell.log_weights is None or torch.equal(shell.log_weights, data.log_weights)
    assert not network.rows.is_meta and digits.rows.device.type == "cpu"


@pytest.mark.parametrize("name", processes.NAMES)
def test_made_under_the_meta_device(name):
    """Data that are given stay where they are; only what the context makes is on meta."""
    digits = TrainingSet.digits()
    with torch.device("meta"):
        given = Denoiser(TrainingSet.digits(), processes.get(name))
        made = TrainingSet(torch.ones(5, 3), labels=range(5), log_weights=[0.0] * 5)
        shell = copy.deepcopy(Denoiser(made, processes.get(name)))
    assert {b.device.type for b in given.buffers()} == {"cpu"}
    x = normal(2, 8, 8, dtype=torch.float32)
    t = given.process.time_of_sigma(0.5)
    assert torch.equal(given(x, t), Denoiser(digits, processes.get(name))(x, t))
    assert {b.device.type for b in shell.buffers()} == {"meta"}
    assert shell(torch.ones(4, 3, device="meta"), t).shape == (4, 3)
    assert samplers.ode(shell, 4, 3, seed=0).x.shape == (4, 3)


def test_compiles(labelled):
    network = Denoiser(labelled, processes.VP(), regularizers.Tikhonov(0.1))
    x, t = normal(3, 2, 3), torch.tensor(0.5, dtype=torch.float64)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t), network(x, t))


def test_wrong_arguments(labelled):
    network, x = Denoiser(labelled), normal(2, 2, 3)
    with pytest.raises(TypeError, match=r"processes\.get"):
        Denoiser(labelled, "edm")
    with pytest.raises(TypeError, match=r"regularizers\.parse"):
        Denoiser(labelled, regularizer="tikhonov")
    with pytest.raises(ValueError, match="x0, eps, v, score, velocity"):
        Denoiser(labelled, prediction="epsilon")
    with pytest.raises(ValueError, match="auto, dense"):
        Denoiser(labelled, method="fast")
    with pytest.raises(ValueError, match=r"to match the rows"):
        network(normal(2, 3, 2), 0.5)
    with pytest.raises(ValueError, match="sigma finite"):
        network(x, -1.0)
    with pytest.raises(ValueError, match="no row has the label 7"):
        network(x, 0.5, 7)
    with pytest.raises(TypeError, match="label as integers"):
        network(x, 0.5, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="one per query"):
        network(x, 0.5, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="no labels"):
        Denoiser(normal(3, 2))(normal(1, 2), 0.5, 0)
