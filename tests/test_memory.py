"""Memory beyond the inputs: a few B x D buffers for each thread, whatever N is."""

import sys

import pytest

import memokern
from bench import memory
from tests.cases import normal

B, N, D, THREADS = 256, 40_000, 256, 2
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads Linux's record of the peak"
)


@pytest.mark.parametrize("op", ["mean", "backward", "nearest", "condition"])
@pytest.mark.one_of(8)
def test_memory_of_a_call(op):
    # measure() refuses to answer unless it sees a temporary of 100 MB as such
    taken = memory.measure(op, "memokern", B, N, D, THREADS)["bytes"]
    assert taken < memory.allowed(B, D, THREADS)
    assert taken < N * B * 4 / 2


@pytest.mark.long
def test_the_method_sees_an_n_x_b_matrix():
    """The plain formula keeps two of them."""
    taken = memory.measure("mean", "cached", 256, N, 64, THREADS)["bytes"]
    matrix = 4 * 256 * N
    assert 1.9 * matrix < taken < 2.5 * matrix


def test_what_is_kept_lies_not_between_what_is_freed():
    """Of many parts each, whose large tensors would leave holes in the heap. In this process, for
    measure() has the allocator give back what is freed."""
    rows = normal(141, 1024)
    x = normal(2000, 1024)
    memokern.weights(x[:2], rows, 1.0)  # needed once
    assert memory.peak(lambda: memokern.weights(x, rows, 1.0)) < 600e6  # 70 parts of 32 MB
