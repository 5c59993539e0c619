"""Python numbers under torch.compile: inputs of one graph, never values of an earlier call."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import memokern
from memokern import Denoiser, TrainingSet, kde, processes, regularizers
from memokern.denoiser import PREDICTIONS

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = [0.9, 0.83, 0.77, 0.7, 0.61, 0.53, 0.46, 0.4, 0.33, 0.24, 0.15, 0.07]
REGULARIZERS = {
    "none": None,
    "tikhonov": regularizers.Tikhonov(0.1),
    "of sigma": regularizers.Tikhonov(lambda s: 0.1 * s),
    "density": regularizers.EmpiricalBayes(-3.0, normalized=True),
    "smoothed": regularizers.SmoothedBank(0.2),
    "temperature": regularizers.Temperature(0.5),
    "unconditioned": regularizers.NoiseUnconditioned(2.0),
    "both": regularizers.Temperature(0.5) & regularizers.Tikhonov(0.1),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def follows_every_value(step, x, graphs=2) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for now, to in zip(TIMES, [*TIMES[1:], 0.03], strict=True):
        torch.testing.assert_close(compiled(x, now, to), step(x, now, to), rtol=1e-12, atol=1e-13)
    assert counter.frame_count <= graphs, counter.frame_count


@pytest.mark.parametrize("name", processes.NAMES)
@pytest.mark.one_of(6)
def test_a_samplers_step_over_process_times(name):
    network = Denoiser(normal(9, 4, seed=1), processes.get(name))

    def step(x, now, to):
        out = network(x, now)
        return x + (to - now) * out

    follows_every_value(step, normal(1, 4, seed=2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.one_of(2)
def test_every_prediction(prediction):
    network = Denoiser(normal(9, 4, seed=1), processes.VP(), prediction=prediction)
    follows_every_value(lambda x, now, to: x + (to - now) * network(x, now), normal(3, 4))


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.one_of(4)
def test_every_regulariser(name):
    network = Denoiser(normal(9, 4, seed=1), regularizer=REGULARIZERS[name], prediction="score")
    follows_every_value(lambda x, now, to: x + (to - now) * network(x, now), normal(1, 4))


FUNCTIONS = {
    "denoise": lambda x, d, a, b: memokern.denoise(x, d, a, b, a + 0.5),
    "score": lambda x, d, a, b: memokern.score(x, d, a, b, b + 0.5),
    "log_density": lambda x, d, a, b: memokern.log_density(x, d, a, b),
    "weights": lambda x, d, a, b: memokern.weights(x, d, a, b, a + 0.5),
    "velocity": lambda x, d, a, b: memokern.posterior(x, d, a, b).velocity(b, -a),
    "kde": lambda x, d, a, b: kde.score(x, d, a) + kde.log_density(x, d, b)[:, None],
    "state": lambda x, d, a, b: memokern.posterior_state(x, d, a, b).posterior().mean,
    "evaluate": lambda x, d, a, b: regularizers.evaluate(
        x, d, a, b, regularizer=REGULARIZERS["tikhonov"]
    ).velocity(b, -a),
}  # fmt: skip


@pytest.mark.parametrize(("batch", "wrapped"), [(1, True), (3, False)])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.one_of(5)
def test_every_function(name, batch, wrapped):
    rows = normal(9, 4, seed=1)
    data, function = TrainingSet(rows) if wrapped else rows, FUNCTIONS[name]
    follows_every_value(lambda x, a, b: function(x, data, a, b), normal(batch, 4, seed=2))


@pytest.mark.parametrize("name", processes.NAMES)
@pytest.mark.one_of(6)
def test_what_a_process_makes_of_numbers(name):
    """time_of_sigma, time_of_ratio and round_sigma are called in loops too."""
    process = processes.get(name)
    network = Denoiser(normal(9, 4, seed=1), process)

    def step(x, now, to):
        return x * network.round_sigma(now) + process.time_of_ratio(to)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager")
    x = normal(3, 4)
    for now, to in itertools.pairwise(TIMES[:6]):
        torch.testing.assert_close(compiled(x, now, to), step(x, now, to))
