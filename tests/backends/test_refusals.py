"""Which calls each backend refuses, in full: elsewhere a refusal skips a case, so what is lost to a
skip is what is listed here."""

from __future__ import annotations

import itertools

import pytest
import torch

from memokern.backends import protocol
from memokern.backends.protocol import OPERATIONS, Call
from tests import harness
from tests.cases import ROW_TYPES
from tests.harness import DEVICE, plain_backends

# By operation: the words of the reason. Everything else is taken.
BY_OPERATION = {
    "reference": {},
    "cpu": {
        "posterior_double_backward": "second derivatives are taken in plain PyTorch",
        "posterior_listed_double_backward": "second derivatives are taken in plain PyTorch",
        "posterior_backward_rows": "the gradient for the rows is taken in plain PyTorch",
    },
    "triton": {
        "posterior_double_backward": "second derivatives are taken in plain PyTorch",
        "posterior_listed_double_backward": "second derivatives are taken in plain PyTorch",
    },
}


def _expected(name: str, operation: str, call: Call) -> str | None:
    home = harness.device_of(name).type
    if name == "reference":
        return None
    if call.device != home:
        return f"these are on {call.device}"
    if call.transform:
        return "no torch.func transforms and no forward mode"
    if name == "triton" and call.own_bias:
        return "differ from query to query"
    if name == "triton" and torch.float64 in (call.x, call.rows):
        return "no kernel for float64"
    if name == "triton" and call.k > 64:
        return "at most 64 neighbours, and"
    return BY_OPERATION[name].get(operation)


@pytest.mark.parametrize("operation", OPERATIONS)
@plain_backends
def test_exactly_these_calls_are_refused(backend: str, operation: str) -> None:
    devices, ks = {"cpu", "cuda", "mps", DEVICE.type}, (0, 1, 64, 65)
    ks = ks if operation == "nearest" else (0,)
    both = (False, True)
    for device, x, rows, k, transform, own_bias in itertools.product(
        devices, (torch.float32, torch.float64), ROW_TYPES, ks, both, both
    ):
        call = Call(device, x, rows, 3, 100, 8, k, transform, own_bias)
        reason, words = protocol.get(backend).refusal(operation, call), _expected(
            backend, operation, call
        )  # fmt: skip
        assert (reason is None) == (words is None), (call, reason)
        assert words is None or words in reason, (call, reason)
        assert reason is None or "\n" not in reason


@pytest.mark.parametrize("operation", OPERATIONS)
@plain_backends
def test_what_is_not_refused_is_there(backend: str, operation: str) -> None:
    """Every operation is a method of its own, or (posterior) is made of the state."""
    call = Call(harness.device_of(backend).type, torch.float32, torch.float32, 1, 1, 1)
    if protocol.get(backend).refusal(operation, call) is None:
        mine = getattr(type(protocol.get(backend)), operation)
        base = getattr(protocol.Backend, operation)
        assert mine is not base or operation == "posterior"


def test_every_backend_is_installed_where_the_tests_run() -> None:
    """Without the compiled module or Triton half of these tests would be skipped in silence; a
    machine that lacks one says so here."""
    # The CUDA kernels need a GPU: backends/cuda/ has what they refuse.
    wanted = [name for name in protocol.NAMES if name != "cuda"]
    missing = [name for name in wanted if name not in harness.INSTALLED]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    assert set(BY_OPERATION) == set(wanted) <= set(harness.INSTALLED)
