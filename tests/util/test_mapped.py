"""What is read of a mapped file, and what counts as one."""

import numpy as np
import pytest
import torch

from memokern.util import mapped
from tests.resident import forget_file, pages_in_memory


@pytest.fixture
def rows(tmp_path):
    values = np.random.default_rng(0).standard_normal((4000, 768)).astype(np.float32)
    np.save(tmp_path / "rows.npy", values)
    return torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))


def test_rows_are_taken_alone(tmp_path, rows):
    index = torch.tensor([3999, 7, 2000, 7, 0])
    forget_file(tmp_path / "rows.npy", rows)
    taken = mapped.take(rows, index)
    # Each has 3072 bytes, on two pages at most.
    assert pages_in_memory(rows) <= 2 * 4 + 1
    assert torch.equal(taken, rows[index])
    many = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mapped.take(rows, many), rows[many])
    assert mapped.take(rows, many[:0]).shape == (0, 768)


def test_rows_in_memory_are_taken_as_well():
    rows = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(mapped.take(rows[::2], torch.tensor([2, 0])), rows[::2][[2, 0]])
    wide = torch.arange(12, dtype=torch.uint8).reshape(3, 4)[:, :3]
    assert torch.equal(mapped.take(wide, torch.tensor([1])), wide[1:2])


def test_a_mapping_that_is_used_in_two_ways_is_a_file(rows):
    some = rows[1000:2000]
    with mapped.at_random(some):  # the system keeps it in three parts then
        assert mapped.is_file(rows) and mapped.is_file(some) and mapped.is_file(rows[:1001])
    assert mapped.is_file(rows) and not mapped.is_file(rows.clone())
