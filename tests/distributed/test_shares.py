"""How rows and queries may be shared out."""

from __future__ import annotations

import shutil

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
    folder = tmp_path / "parts"
    assert len(list(folder.iterdir())) == 2
    # All parts or none: a save that was killed leaves the folder as it was.
    same(pool.run(2, programs.saved_again, str(folder), "killed"), {"n": torch.tensor(1797)}, 0)
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["parts"]
    same(pool.run(2, programs.saved_again, str(folder), "whole"), {"n": torch.tensor(50)}, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["parts"]
    one, two = sorted(folder.iterdir())
    shutil.copy(one, folder / "part-00000-of-00001.safetensors")  # of another save
    for found in pool.run(2, programs.from_folder, str(folder)):
        assert isinstance(found, Raised) and "no other rows" in found.said
    (folder / "part-00000-of-00001.safetensors").unlink()
    two.unlink()
    for found in pool.run(2, programs.from_folder, str(folder)):
        assert isinstance(found, Raised) and "copy what is missing" in found.said
    (folder / "notes.txt").write_text("mine")
    for found in pool.run(2, programs.saved_again, str(folder), "whole"):
        assert isinstance(found, Raised) and "something else than parts" in found.said


def test_a_shared_build_goes_on(pool, tmp_path):
    folder = str(tmp_path / "kept")
    stopped = pool.run(3, programs.resumed, folder, True)
    assert all(isinstance(v, Raised) for v in stopped), stopped
    for found in pool.run(3, programs.resumed, folder, False):
        assert not isinstance(found, Raised), found
        done, equal = found
        assert 0 < done < 599 and equal  # rows that were projected now


def test_ranks_that_stream(pool, tmp_path):
    rows, _ = programs.problem()
    np.save(tmp_path / "rows.npy", rows.numpy())
    expected = programs.streamed("one", "")
    same(pool.run(3, programs.streamed, str(tmp_path)), expected, 1e-5)


def test_a_rank_without_rows_beside_ranks_that_stream(pool, tmp_path):
    expected = programs.streamed_here_and_there("one", "")
    found = pool.run(3, programs.streamed_here_and_there, str(tmp_path))
    same(found, expected, 1e-5)
