"""How rows and queries may be shared out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import programs
from tests.distributed.pool import Raised
from tests.distributed.test_sharded import same


@pytest.mark.parametrize("counts", [[30, 1, 6], [37, 0], [0, 0, 20, 17]], ids=str)
@pytest.mark.one_of(2)
def test_uneven_and_empty_ranks(pool, counts):
    expected = programs.apart("one", counts)
    same(pool.run(len(counts), programs.apart, counts), expected, 1e-5)


@pytest.mark.parametrize("counts", [[3, 3], [5, 0, 1], [0, 1, 4, 1]], ids=str)
@pytest.mark.one_of(3)
def test_split_queries(pool, counts):
    expected = programs.split("one", counts, 0.5)
    found = pool.run(len(counts), programs.split, counts, 0.5)
    assert not any(isinstance(v, Raised) for v in found), found
    joined = {k: torch.cat([mine[k] for mine in found]) for k in expected}
    same([joined], expected, 1e-8)


def test_files_and_folders_of_parts(pool, tmp_path):
    rows, _ = programs.problem()
    np.save(tmp_path / "rows.npy", rows.numpy())
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    for name, cuts in {"parts": [5, 20, 10, 2], "three": [12, 12, 13]}.items():
        (tmp_path / name).mkdir()
        for i, part in enumerate(rows.split(cuts)):
            np.save(tmp_path / name / f"{i}.npy", part.numpy())
    expected = programs.from_files("one", str(tmp_path))
    same(pool.run(3, programs.from_files, str(tmp_path)), expected, 1e-5)


def test_a_dtensor(pool):
    same(pool.run(4, programs.of_dtensor), programs.of_dtensor("one"), 1e-5)


def test_indices(pool, tmp_path):
    expected = programs.indexed("one", "")
    same(pool.run(2, programs.indexed, str(tmp_path / "parts")), expected, 1e-5)
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_ranks_that_stream(pool, tmp_path):
    rows, _ = programs.problem()
    np.save(tmp_path / "rows.npy", rows.numpy())
    expected = programs.streamed("one", "")
    same(pool.run(3, programs.streamed, str(tmp_path)), expected, 1e-5)
