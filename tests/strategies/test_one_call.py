"""A backend's one call for a pruned posterior gives what its steps give."""

import pytest
import torch

import memokern
from memokern import TrainingSet
from memokern.backends import protocol
from memokern.strategies import pruned
from memokern.strategies.costs import Costs
from tests import harness, isas
from tests.cases import F32, F64, U8, normal, query_of
from tests.strategies.rows import indexed

CPU = [name for name in harness.COMPILED if name.startswith("cpu")]
pytestmark = pytest.mark.skipif(not CPU, reason="the compiled module is missing")
B = 9
# None: whatever can be pruned is. Else a list may have a thirtieth of the rows.
COSTS = {"all": None, "split": Costs(row=1.0, query=1.0, listed=30.0, call=0.0)}


def images(dtype: torch.dtype) -> TrainingSet:
    """Smooth ones, and their index by cosines, to which the backend projects queries by itself."""
    values = normal(700, 3, 8, 8, seed=1).cumsum(-1).cumsum(-2) * 9 + 128
    data = TrainingSet(values.round().clamp(0, 255).to(dtype))
    return data.build_index(progress=False)


SETS = {
    "uint8": lambda: images(U8),
    "float32": lambda: images(F32),
    "float64 queries": lambda: images(U8),
    "float64 rows": lambda: indexed(700, 24, F64),
    "basis of its own": lambda: indexed(700, 24, F32),
}


def steps(*args, **options):
    """The same without the one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned, "undispatched", lambda *tensors: False)
        return pruned.posterior(*args, **options)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("kind", SETS)
def test_it_gives_what_the_steps_give(kind, costs):
    data = SETS[kind]()
    rows, d = data.as_rows(), data.dim
    wide = kind.startswith("float64")
    y = data.gather(torch.arange(B)).reshape(B, d).double()
    spread = float(y.std(0).mean())
    noise = spread * torch.logspace(-2, 1.5, B, dtype=F64)
    x = (0.8 * y + noise[:, None] * normal(B, d, seed=2)).to(F64 if wide else F32)
    bias = normal(data.n, seed=3)
    bias[5::7] = -torch.inf
    query = query_of(x, noise, alpha=0.8, temperature=1.5, bias=bias)
    args = (query, rows, data.index)
    options = {"eps": 1e-6, "costs": COSTS[costs], "certificate": True}
    for name in CPU:
        with isas.selected(name.partition(":")[2]):
            got, c = pruned.posterior(*args, **options)
            want, known = steps(*args, **options)
        assert bool((c.levels == 0).any()) == (costs == "split")
        assert torch.equal(c.levels, known.levels)
        assert torch.equal(c.rows_kept, known.rows_kept)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12 if wide else 1e-6, atol=1e-12)
        torch.testing.assert_close(c.mean_error, known.mean_error)


def test_where_it_runs(monkeypatch):
    """Not where a gradient is recorded, and not beside a backend that has none."""
    calls = []
    backend = protocol.get("cpu")
    one_call = backend.pruned_posterior
    monkeypatch.setattr(
        backend, "pruned_posterior", lambda *args: calls.append(1) or one_call(*args), raising=False
    )
    data = images(U8)
    x = data.gather(torch.arange(4)) + 0.1
    plain = memokern.posterior(x, data, 0.2, method="pruned").mean
    assert len(calls) == 1
    recorded = memokern.posterior(x.requires_grad_(), data, 0.2, method="pruned").mean
    assert recorded.requires_grad and len(calls) == 1
    with harness.named("reference"):
        other = memokern.posterior(x.detach(), data, 0.2, method="pruned").mean
    assert len(calls) == 1
    for found in (recorded, other):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_the_projection_takes_float32_queries_only():
    data = images(U8)
    x = torch.zeros(1, data.dim, dtype=F64)
    own = data.index.backends_own(x.float())
    with pytest.raises(TypeError, match="takes float32 queries, not float64"):
        protocol.get("cpu").pruned_posterior(query_of(x, 0.1), data.as_rows(), None, own, None)
