"""memokern.TrainingSet: sets made from it, files of its own, copies, and how it shows itself."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import safetensors.torch
import torch

from memokern.data import sources
from memokern.data.training_set import TrainingSet
from tests.data.rows import DTYPES, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_subset():
    rows = rows_of(torch.uint8, n=5)
    weights = torch.tensor([0.0, 1.0, -math.inf, 2.0, 3.0])
    data = TrainingSet(rows, labels=range(5), log_weights=weights, scale=0.5, shift=2, name="five")
    mask = torch.tensor([True, False, True, True, False])
    chosen = [0, 2, 3]
    for index in (mask, mask.numpy(), chosen, torch.tensor(chosen, dtype=torch.uint8)):
        part = data.subset(index)
        assert torch.equal(part.rows, data.rows[chosen])
        assert part.labels.tolist() == chosen
        assert part.log_weights.tolist() == [0.0, -math.inf, 2.0]
        assert (part.shape, part.scale, part.shift, part.name) == ((2, 3, 5), 0.5, 2.0, "five")
    part = data.subset(slice(1, 3))
    assert part.rows.data_ptr() == data.rows[1].data_ptr()
    assert part.labels.tolist() == [1, 2]
    for nothing in ([], slice(5, 9), torch.zeros(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="no rows"):
            data.subset(nothing)
    with pytest.raises(ValueError, match="all log_weights are -inf"):
        data.subset([2])
    with pytest.raises(ValueError, match="mask of 5 entries, got 2"):
        data.subset(torch.tensor([True, False]))
    with pytest.raises(TypeError, match="one-dimensional"):
        data.subset([[0, 1]])
    with pytest.raises(IndexError):
        data.subset([5])


def test_where():
    data = TrainingSet(torch.arange(4.0)[:, None], labels=[1, 0, 1, 2])
    assert data.where(1).rows.flatten().tolist() == [0.0, 2.0]
    assert data.where([0, 2]).rows.flatten().tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"no row has the label 7; the labels are \[0, 1, 2\]"):
        data.where(7)
    for wrong in (1.0, [1.0], "1", None, True, 2**70, []):
        with pytest.raises(TypeError, match=r"several, of integers \(int64\), got"):
            data.where(wrong)
    with pytest.raises(ValueError, match="no labels"):
        TrainingSet(torch.zeros(1, 1)).where(0)


def test_to_moves_everything_and_is_free_in_place():
    data = TrainingSet(rows_of(torch.uint8), labels=range(37), log_weights=[0.0] * 37)
    assert data.to("cpu") is data
    data = TrainingSet(rows_of(torch.float32))
    norms, center = data.sq_norms, data.center
    moved = data.to("meta")
    assert moved.nbytes == data.nbytes  # the caches came along, not computed anew
    assert {moved.device.type, moved.center.device.type, moved.sq_norms.device.type} == {"meta"}
    assert (moved.center.shape, moved.sq_norms.shape) == (center.shape, norms.shape)
    assert (moved.shape, moved.scale, moved.shift) == (data.shape, data.scale, data.shift)
    assert data.device.type == "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path, dtype):
    path = tmp_path / "set.safetensors"
    weights = torch.linspace(-1, 1, 37, dtype=torch.float64)
    data = TrainingSet(
        rows_of(dtype), labels=range(37), log_weights=weights, scale=0.1, shift=1 / 3, name="mine"
    )
    data.save(path)
    for back in (TrainingSet.load(path), TrainingSet(path)):
        assert torch.equal(back.rows, data.rows)
        assert back.dtype == dtype
        assert torch.equal(back.labels, data.labels)
        assert torch.equal(back.log_weights, weights)
        assert (back.shape, back.name) == (data.shape, "mine")
        assert (back.scale, back.shift) == (0.1, 1 / 3)
        assert torch.equal(back.sq_norms, data.sq_norms)
    # What the caller says wins over what the file says.
    assert TrainingSet(path, scale=1.0, name="other").scale == 1.0
    # Over the file that the rows are mapped from.
    loaded = TrainingSet.load(path)
    loaded.subset(slice(0, 2)).save(path)
    assert TrainingSet.load(path).n == 2
    assert torch.equal(loaded.rows, data.rows)


def test_save_and_load_refuse(tmp_path):
    data = TrainingSet(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        data.save(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.save(tmp_path / "none" / "a.safetensors")
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"rows": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"not written by TrainingSet\.save.*TrainingSet\(path\)"):
        TrainingSet.load(path)
    metadata = {"format": sources.FORMAT, "version": "99", "scale": "1.0", "shift": "0.0"}
    safetensors.torch.save_file({"rows": torch.zeros(2, 2)}, path, metadata)
    with pytest.raises(ValueError, match="version '99'"):
        TrainingSet.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_copies_and_pickles():
    data = TrainingSet.digits()
    norms = data.sq_norms
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(twin.rows, data.rows)
        assert twin.rows.data_ptr() != data.rows.data_ptr()
        assert torch.equal(twin.sq_norms, norms)
        assert repr(twin) == repr(data)


def test_digits():
    data = TrainingSet.digits()
    assert (data.n, data.shape, data.dtype) == (1797, (8, 8), torch.uint8)
    assert (float(data[:].min()), float(data[:].max())) == (-1.0, 1.0)
    assert data.where(3).n == 183


def test_repr():
    assert repr(TrainingSet(torch.zeros(2, 3))) == "TrainingSet(2 rows [3] float32, 24 B, cpu)"
    shown = repr(TrainingSet.digits())
    assert shown == (
        "TrainingSet(digits: 1797 rows [8, 8] uint8, y = 0.125 r - 1, 129.4 kB, labels, cpu)"
    )
    weighted = TrainingSet(torch.zeros(1000, 1000, dtype=torch.bfloat16), log_weights=[0.0] * 1000)
    assert repr(weighted) == ("TrainingSet(1000 rows [1000] bfloat16, 2.008 MB, log_weights, cpu)")
