"""Calls of the CUDA backend that go to the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from memokern.backends.cuda import Cuda
from memokern.backends.cuda.variants import shared_of
from memokern.backends.protocol import Call
from tests import cuda_emulator, harness
from tests.backends.cuda.fake_driver import Driver, Launch, installed


def _emulate(launch: Launch) -> None:
    assert launch.variant is not None
    library = cuda_emulator.library(launch.variant.program, dict(launch.variant.macros))
    assert launch.shared == shared_of(launch.variant)
    argument = ctypes.addressof(launch.argument)
    done = library.memokern_emulate(launch.entry.encode(), argument, *launch.grid, 0)
    assert done == 0, launch


@pytest.fixture
def emulated() -> Iterator[Driver]:
    with installed() as fake, harness.poisoned():
        fake.run = _emulate
        yield fake


@pytest.fixture
def taken(emulated: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Calls on the CPU go to the emulator."""
    monkeypatch.setattr(Cuda, "unavailable", lambda self: None)

    def refuses(self: Cuda, operation: str, call: Call) -> str | None:
        return "it has no kernel for float64" if torch.float64 in (call.x, call.rows) else None

    monkeypatch.setattr(Cuda, "refuses", refuses)
    yield emulated
