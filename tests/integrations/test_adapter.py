"""What all adapters share beyond their clients: compilation, copies, odd labels, shapes."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from memokern import Denoiser, Given, TrainingSet, processes
from memokern.integrations import (
    EDMModel,
    KDiffusionModel,
    ScoreSDEModel,
    SmallDiffusionModel,
    VectorField,
)
from tests.integrations.clients import F64, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {
    "own process": lambda data: EDMModel(data),
    "another": lambda data: SmallDiffusionModel(Denoiser(data, processes.VP())),
    "flow": lambda data: VectorField(data),
    "sub-VP": lambda data: ScoreSDEModel(Denoiser(data), "subvp"),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "another" else pytest.param(n, marks=pytest.mark.long) for n in MODELS],
)
def test_one_graph_serves_all_levels(name):
    p = problem()
    model, x = MODELS[name](p.data), normal(3, 2, 3, 3, seed=2)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for level in (0.3, 0.4, 0.5, 0.6, 0.8):
        number = torch.tensor(level, dtype=F64)
        arguments = (number, x) if name == "flow" else (x, number)
        torch.testing.assert_close(compiled(*arguments), model(*arguments))
    assert counter.frame_count <= 2  # the first call makes what the data keep


def test_copies_and_moves_reach_the_denoiser_inside():
    p, x = problem(), normal(2, 2, 3, 3, seed=3)
    given = KDiffusionModel(Given(Denoiser(p.data), label=1))
    other = copy.deepcopy(given)
    torch.testing.assert_close(other(x, 0.7), given(x, 0.7))
    assert other.inside is other.denoiser.denoiser and other.inside is not given.inside
    assert given.to(torch.float32).inside.rows.dtype == torch.float32
    assert given(x.float(), 0.7).dtype == torch.float32


def test_where_rows_have_the_label_minus_one():
    """It is theirs, and so the number of classes is no other name for it."""
    p, x = problem(), normal(2, 2, 3, 3, seed=4)
    data = TrainingSet(p.rows, labels=p.labels - 1)
    model = KDiffusionModel(data)
    minus = torch.tensor([-1, -1])
    torch.testing.assert_close(model(x, 0.7, minus), p.x0(x, 0.7, label=0))
    with pytest.raises(ValueError, match="label"):
        model(x, 0.7, minus + 3)


def test_shapes_are_told():
    p = problem()
    model = EDMModel(p.data)
    with pytest.raises(ValueError, match=r"expected x \[\*batch, 2, 3, 3\]"):
        model(normal(2, 3, 4), 0.5)
    with pytest.raises(ValueError, match="sigma"):
        model(normal(2, 2, 3, 3), torch.ones(3))
    # Any batch, and none.
    x = normal(2, 4, 2, 3, 3, seed=5)
    want = p.x0(x.flatten(0, 1), 0.5).reshape(x.shape)
    torch.testing.assert_close(model(x, 0.5), want)
    torch.testing.assert_close(model(x[0, 0], 0.5), want[0, 0])
    assert model(x[:0], 0.5).shape == (0, 4, 2, 3, 3)
