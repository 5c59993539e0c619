"""A slice of the differential fuzz; `make fuzz` runs it for as long as one likes."""

from __future__ import annotations

import random

import pytest

from tests import fuzz


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_random_problems(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2):
        case = fuzz.draw(rng, most=4_000)
        assert not list(fuzz.findings(case)), case
