"""What is kept while large tensors come and go."""

from __future__ import annotations

import pytest
import torch

from memokern.util.stack import Stack


@pytest.mark.parametrize("expected", [0, 1, 3, 9])
def test_any_number_in_their_order(expected: int) -> None:
    kept, values = Stack(torch.empty(2, 3, dtype=torch.float64), expected), torch.randn(7, 2, 3)
    assert kept.stacked().shape == (0, 2, 3)
    for value in values.double():
        kept.add(value)
    assert torch.equal(kept.stacked(), values.double())


def test_values_are_copied_into_one_tensor() -> None:
    kept, value = Stack(torch.empty(2), 2), torch.ones(2)
    kept.add(value)
    value.zero_()
    assert kept.stacked().tolist() == [[1.0, 1.0]]
