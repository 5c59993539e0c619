"""memokern.explain: who would run a call, and why the others would not; nothing is computed."""

from __future__ import annotations

import pytest
import torch

import memokern
from memokern import TrainingSet
from memokern.backends import protocol
from memokern.util import env
from tests import harness
from tests.cases import normal
from tests.plain_index import with_index

X, ROWS = torch.zeros(4, 2), torch.zeros(10, 2)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Whoever computes anything fails."""
    monkeypatch.delenv(env.BACKEND, raising=False)
    for name in harness.INSTALLED:
        for operation in ("posterior", "posterior_state", "nearest"):
            monkeypatch.setattr(protocol.get(name), operation, None)


@pytest.mark.parametrize("name", ["auto", *harness.INSTALLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 3])
def test_it_names_who_is_chosen(name: str, dtype: torch.dtype, k: int, monkeypatch) -> None:
    monkeypatch.setenv(env.BACKEND, name)
    found = memokern.explain(X.to(dtype), ROWS.to(dtype), 1.0, k=k)
    operation = "nearest" if k else "posterior"
    assert found.operation == operation and found.call.k == k
    assert list(found.backends) == protocol.explain(operation, found.call)
    try:
        chosen = protocol.choose(operation, found.call).name
    except RuntimeError:
        chosen = None
    assert found.runs == chosen


def test_its_text() -> None:
    found = memokern.explain(X, ROWS, 1.0)
    lines = str(found).splitlines()
    assert lines[0] == "posterior: 4 queries of float32 on 10 rows [2] of float32, cpu"
    assert lines[1] == f"strategy: {found.strategy}"
    assert len(lines) == 2 + len(protocol.NAMES)
    (mine,) = [line for line in lines if "runs it: " in line]
    assert mine.split()[0] == found.runs
    assert "  reference  could run it, and is not asked" in lines or found.runs == "reference"
    nearest = memokern.explain(X, ROWS.to(torch.uint8), 1.0, k=3)
    first = "nearest: 4 queries of float32 on 10 rows [2] of uint8, cpu, k = 3"
    assert str(nearest).splitlines()[0] == first


@pytest.mark.skipif("triton" not in harness.ON_CPU, reason="Triton does not run on the CPU here")
def test_a_named_backend_that_refuses_is_told_with_its_reason(monkeypatch) -> None:
    monkeypatch.setenv(env.BACKEND, "triton")
    found = memokern.explain(X.double(), ROWS, 1.0)
    assert found.runs is None
    lines = str(found).splitlines()
    assert "  triton     does not: it has no kernel for float64" in lines
    assert lines[-1] == "  MEMOKERN_BACKEND=triton asks for one that does not: an error"
    assert memokern.explain(X, ROWS, 1.0).runs == "triton"


def test_a_transform_is_noticed() -> None:
    seen = []

    def total(q):
        seen.append(memokern.explain(q, ROWS, 1.0))
        return q.sum()

    torch.func.grad(total)(X)
    assert seen[0].call.transform and seen[0].runs == "reference"
    assert "no torch.func transforms and no forward mode" in str(seen[0])


def test_the_strategy() -> None:
    data = with_index(TrainingSet(normal(30, 24, dtype=torch.float32)))
    x = data[:2]

    def strategy(**how) -> str:
        how = {"x": x, "data": data, "sigma": 0.1} | how
        return memokern.explain(**how).strategy

    assert strategy(method="dense") == "dense, as asked"
    assert strategy(data=data[:]).startswith("dense: the data have no index")
    assert strategy(weighting="log") == "dense: the index has no bounds for weighting 'log'"
    assert strategy(method="pruned").startswith("pruned, as asked, with the plain index")
    assert strategy().startswith("pruned with the plain index, or dense, whichever is faster")
    seen = []
    torch.func.vmap(lambda q: seen.append(strategy(x=q)) or q)(x)
    assert seen[0].startswith("dense: rows cannot be selected under a transform")


def test_wrong_input_is_refused_as_it_would_be() -> None:
    with pytest.raises(ValueError, match="sigma finite and >= 0"):
        memokern.explain(X, ROWS, -1.0)
    with pytest.raises(ValueError, match=r"call build_index\(\)"):
        memokern.explain(X, ROWS, 1.0, method="pruned")
    with pytest.raises(ValueError, match="1 <= k <= N = 10"):
        memokern.explain(X, ROWS, 1.0, k=11)
