"""Who runs a call: one predicate chooses and explains, and nothing falls back in silence."""

from __future__ import annotations

import itertools

import pytest
import torch

import memokern
from memokern import ops
from memokern.backends import protocol
from memokern.backends.protocol import NAMES, OPERATIONS, Call
from memokern.calls import Rows
from memokern.util import env
from tests import harness
from tests.cases import F32, F64, Case, normal, query_of
from tests.harness import named


def calls() -> list[Call]:
    kinds = itertools.product(("cpu", "cuda", "mps"), (F32, F64), (F32, F64, torch.uint8), (0, 65))
    return [
        Call(device, x, rows, 3, 100, 8, k, transform)
        for device, x, rows, k in kinds
        for transform in (False, True)
    ]


@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_choosing_and_explaining_are_one_thing(name: str, monkeypatch) -> None:
    """For every operation and call: who is chosen runs it, who would come first does not; and where
    nobody is chosen the error has every reason."""
    monkeypatch.setenv(env.BACKEND, name)
    for operation, call in itertools.product(OPERATIONS, calls()):
        answers = protocol.explain(operation, call)
        assert sorted(a.name for a in answers) == sorted(NAMES)
        for answer in answers:
            reason = protocol.get(answer.name).refusal(operation, call)
            assert answer.runs == (reason is None)
            assert answer.detail == reason if reason else answer.detail
        asked = (name,) if name != "auto" else protocol.PREFERENCE.get(call.device, ("reference",))
        assert [a.name for a in answers][: len(asked)] == list(asked)
        able = [a.name for a in answers[: len(asked)] if a.runs]
        if able:
            assert protocol.choose(operation, call).name == able[0]
            continue
        with pytest.raises(RuntimeError, match=f"no backend runs this {operation}: ") as error:
            protocol.choose(operation, call)
        for answer in answers[: len(asked)]:
            assert f"{answer.name} does not: {answer.detail}" in str(error.value)
        assert (f"{env.BACKEND}={name} asks for it: unset it" in str(error.value)) == (
            name != "auto"
        )


def test_the_reference_takes_every_call() -> None:
    for operation, call in itertools.product(OPERATIONS, calls()):
        assert protocol.get("reference").refusal(operation, call) is None
        assert protocol.choose(operation, call).name in NAMES


@pytest.mark.skipif("triton" not in harness.INSTALLED, reason="Triton is not installed")
def test_triton_by_name_and_float64_is_an_error() -> None:
    x, rows = normal(2, 3, seed=1).to(harness.DEVICE), normal(9, 3).to(harness.DEVICE)
    with named("triton"):
        for call in (memokern.denoise, memokern.posterior, memokern.posterior_state):
            for asked in ((x, rows), (x.float(), rows), (x, rows.float())):
                with pytest.raises(RuntimeError) as error:
                    call(*asked, 0.5)
                text = str(error.value)
                assert "triton does not: it has no kernel for float64" in text
                assert "MEMOKERN_BACKEND=triton asks for it: unset it for another" in text
        with pytest.raises(RuntimeError, match="it has no kernel for float64"):
            memokern.nearest(x, rows)
        with pytest.raises(RuntimeError, match="at most 64 neighbours, and 65 are asked for"):
            memokern.nearest(x.float(), normal(70, 3).float().to(harness.DEVICE), 65)
        assert memokern.denoise(x.float(), rows.float(), 0.5).dtype == F32


@pytest.mark.parametrize("name", [n for n in harness.ON_CPU if n != "reference"])
def test_a_transform_goes_to_the_reference_unless_another_is_named(name: str) -> None:
    x, rows = normal(2, 3, dtype=F32), normal(9, 3, seed=1, dtype=F32)

    def total(q):
        return memokern.log_density(q, rows, 0.5).sum()

    with harness.preferred(name):
        got = torch.func.grad(total)(x)
        torch.testing.assert_close(got, memokern.score(x, rows, 0.5), rtol=1e-4, atol=1e-4)
    with named(name), pytest.raises(RuntimeError, match=r"it has no torch\.func transforms"):
        torch.func.grad(total)(x)


def test_gradients_for_the_rows_by_name() -> None:
    """The compiled kernels have none: by name it is an error, else the reference's."""
    if "cpu" not in harness.INSTALLED:
        pytest.skip("the compiled module is missing")
    query, rows = Case(2, 9, 3, F32).problem()
    data = rows.data.requires_grad_()
    ops.posterior(query, rows).log_z.sum().backward()
    assert data.grad is not None and torch.isfinite(data.grad).all()
    with named("cpu"), pytest.raises(RuntimeError, match="taken in plain PyTorch"):
        ops.posterior(query, rows).log_z.sum().backward()


def test_an_unknown_backend_is_refused() -> None:
    with named("quantum"), pytest.raises(RuntimeError, match="MEMOKERN_BACKEND must be one of"):
        memokern.denoise(torch.zeros(1, 2), torch.ones(3, 2), 1.0)
    with pytest.raises(ValueError, match="expected a backend of cpu, cuda, triton, ref"):
        protocol.get("quantum")


def test_the_variable_is_read_at_every_call(monkeypatch) -> None:
    call = Call("cpu", F32, F32, 1, 9, 3)
    monkeypatch.setenv(env.BACKEND, " Reference ")
    assert protocol.choose("posterior", call) is protocol.get("reference")
    monkeypatch.delenv(env.BACKEND)
    first = "cpu" if "cpu" in harness.INSTALLED else "reference"
    assert protocol.choose("posterior", call) is protocol.get(first)


def test_who_is_here() -> None:
    for answer in protocol.here():
        backend = protocol.get(answer.name)
        assert answer.runs == (answer.name in harness.INSTALLED)
        assert answer.detail == (backend.unavailable() or backend.detail())
        assert answer.detail and "\n" not in answer.detail


def test_a_backend_that_lacks_an_operation_raises() -> None:
    """What a new backend has not written yet returns no nonsense."""
    query, rows = query_of(normal(1, 2), 1.0), Rows(normal(3, 2))
    for call in (
        lambda backend: backend.posterior(query, rows),
        lambda backend: backend.nearest(query.x, rows, 1),
        lambda backend: backend.refuses("posterior", Call.of(query.x, rows.data)),
    ):
        with pytest.raises(NotImplementedError):
            call(protocol.Backend())
