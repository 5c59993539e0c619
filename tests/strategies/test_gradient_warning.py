"""Gradients with respect to the noise level through an index are not those of all rows."""

import warnings

import pytest
import torch

import memokern
from memokern import Denoiser, TrainingSet, processes
from memokern.strategies import costs
from memokern.strategies.costs import Costs

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def number(value: float, grad: bool) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("name", ["sigma", "alpha", "temperature"])
@pytest.mark.parametrize("method", ["pruned", "auto"])
def test_a_number_that_requires_a_gradient_warns(name, method):
    rows = normal(60, 24, seed=1)
    indexed, x = TrainingSet(rows).build_index("pca", dims=(8, 16)), normal(3, 24)
    asked = {"sigma": number(0.5, False), "alpha": number(1.0, False)}
    asked |= {"temperature": number(1.0, False), name: number(0.7, True)}
    for function in (memokern.posterior, memokern.denoise, memokern.score):
        with pytest.warns(UserWarning, match=f"{name} requires a gradient.*method='dense'"):
            function(x, indexed, **asked, method=method)
        # Nothing is recorded, or every row is swept.
        function(x, indexed, **asked, method="dense")
        function(x, TrainingSet(rows), **asked)
        with torch.no_grad():
            function(x, indexed, **asked, method=method)
        constants = {k: v.detach() for k, v in asked.items()}
        function(x.clone().requires_grad_(), indexed, **constants, method=method)


def test_a_denoisers_time():
    network = Denoiser(TrainingSet(normal(60, 24, seed=1)).build_index("pca", dims=(8, 16)))
    x, t = normal(3, 24), number(0.5, True)
    with pytest.warns(UserWarning, match="sigma requires a gradient"):
        network(x, t)
    network(x, t.detach())
    dense = Denoiser(network.data, processes.VP(), method="dense")
    dense(x, t)  # a warning would be an error


@pytest.mark.parametrize("name", ["sigma", "alpha", "temperature"])
def test_pytorch_has_nothing_to_warn_of(name, monkeypatch):
    """Where a sweep takes long enough for the noise to be looked at, which makes a number of a
    tensor."""
    slow = Costs(row=1e-6, query=1e-6, listed=1e-6, call=0.0)
    monkeypatch.setattr(costs, "costs_of", lambda x, rows: slow)
    indexed = TrainingSet(normal(60, 24, seed=1)).build_index("pca", dims=(8, 16))
    asked = {"sigma": number(0.5, False), name: number(0.7, True)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = memokern.posterior(normal(3, 24), indexed, **asked, certificate=True)
        found.log_z.sum().backward()
    assert [f"{name} requires a gradient" in str(w.message) for w in seen] == [True]
