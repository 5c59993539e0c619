"""Which operations there are, and who is chosen to run them."""

from __future__ import annotations

import pytest
import torch

import memokern
from memokern.backends.protocol import OPERATIONS
from memokern.util import env


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_of_a_backend_is_registered(operation: str) -> None:
    assert isinstance(getattr(torch.ops.memokern, operation), torch._ops.OpOverloadPacket)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.BACKEND, "quantum")
    with pytest.raises(RuntimeError, match="MEMOKERN_BACKEND must be one of"):
        memokern.denoise(torch.zeros(1, 2), torch.ones(3, 2), 1.0)
