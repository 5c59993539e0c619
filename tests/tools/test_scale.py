"""The simulated schedule of sharded and streamed rows keeps to what can be said without it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools import scale

PAGE = Path(__file__).parent.parent.parent / "docs" / "scale.md"


def test_one_rank_sweeps_and_exchanges_nothing():
    found = scale.simulate(scale.H200, 1, replace(scale.IMAGES, n=1000))
    assert found["total"] == found["sweep"] > 0 == found["exchange"] == found["read"]


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("b", [1, 256, 4096])
def test_ranks_take_no_less_than_their_parts(ranks, b):
    mine = replace(scale.IMAGES, b=b)
    one, many = (scale.simulate(scale.CPU_NODE, n, mine) for n in (1, ranks))
    assert many["sweep"] == pytest.approx(one["sweep"] / ranks)
    assert max(many["sweep"], many["exchange"]) <= many["total"]
    assert many["total"] <= many["sweep"] + many["exchange"] + 1e-9  # what overlaps saves


@pytest.mark.parametrize("b", [1, 256, 4096])
def test_a_disk_is_read_while_rows_are_swept(b):
    found = scale.simulate(scale.CPU_DISK, 4, replace(scale.LATENTS, b=b))
    longer = max(found["read"], found["sweep"])
    assert longer <= found["total"] - found["exchange"] <= 1.001 * longer + 1


def test_the_page_has_the_predictions():
    assert scale.table() in PAGE.read_text()
