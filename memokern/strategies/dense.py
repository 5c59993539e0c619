"""What is answered densely, in plain PyTorch, for small problems."""

from __future__ import annotations

from torch import Tensor

from memokern.backends.reference import dense
from memokern.calls import Query, Rows


def weights(query: Query, rows: Rows) -> Tensor:
    """softmax(l / T) [B, N] float64."""
    return dense.weights(query, rows)
