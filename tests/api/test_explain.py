"""What explains a call, and what chooses who runs it."""

from __future__ import annotations

import pytest
import torch

import memokern
from memokern.backends import protocol
from memokern.backends.protocol import Call
from tests import harness

X, ROWS = torch.zeros(4, 3), torch.ones(10, 3)


@pytest.mark.parametrize("name", protocol.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operation", protocol.OPERATIONS)
def test_what_explains_is_what_chooses(name: str, dtype: torch.dtype, operation: str) -> None:
    call = Call.of(X.to(dtype), ROWS)
    with harness.named(name):
        answers = protocol.explain(operation, call)
        runs = {answer.name: answer.runs for answer in answers}
        assert set(runs) == set(protocol.NAMES)
        if runs[name]:
            assert protocol.choose(operation, call).name == name
        else:
            reason = protocol.get(name).refusal(operation, call)
            with pytest.raises(RuntimeError, match="no backend runs this") as error:
                protocol.choose(operation, call)
            assert reason and reason in str(error.value)
            assert f"MEMOKERN_BACKEND={name}" in str(error.value)


def test_the_first_on_the_list_that_takes_a_call_runs_it(monkeypatch) -> None:
    monkeypatch.delenv("MEMOKERN_BACKEND", raising=False)
    first = harness.ON_CPU[0] if "cpu" in harness.INSTALLED else "reference"
    found = memokern.explain(X, ROWS, 1.0)
    assert found.runs == first and found.operation == "posterior"
    text = str(found)
    assert "4 queries of float32 on 10 rows [3] of float32, cpu" in text and "runs it" in text
    assert memokern.explain(X, ROWS, 1.0, k=2).operation == "nearest"
    second = protocol.choose("posterior_double_backward", Call.of(X, ROWS))
    assert second.name == "reference"


def test_a_named_backend_that_refuses_is_an_error_with_its_reason() -> None:
    with harness.named("triton"):
        found = memokern.explain(X.double(), ROWS, 1.0)
        assert found.runs is None and "an error" in str(found)
        with pytest.raises(RuntimeError, match="triton does not") as error:
            memokern.posterior(X.double(), ROWS, 1.0)
        assert protocol.get("triton").refusal("posterior", found.call) in str(error.value)


@pytest.mark.skipif("cpu" not in harness.INSTALLED, reason="there are no compiled kernels")
def test_second_derivatives_of_a_named_backend_that_has_none_are_an_error() -> None:
    x = torch.randn(2, 3).requires_grad_()
    with harness.named("cpu"):
        log_z = memokern.posterior(x, torch.randn(4, 3), 1.0).log_z.sum()
        (g,) = torch.autograd.grad(log_z, x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(g.sum(), x)


def test_strategies_are_explained() -> None:
    digits = memokern.TrainingSet.digits().build_index(progress=False)
    x = torch.zeros(2, 8, 8)
    assert "whichever is faster" in memokern.explain(x, digits, 0.1).strategy
    assert "pruned, as asked" in memokern.explain(x, digits, 0.1, method="pruned").strategy
    assert "dense, as asked" in memokern.explain(x, digits, 0.1, method="dense").strategy
    log = memokern.explain(x, digits, 0.1, weighting="log")
    assert "no bounds" in log.strategy
