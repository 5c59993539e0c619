"""memokern.TrainingSet: what it is made from, arrays, files and torch Datasets."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from memokern.data import files
from memokern.data.training_set import TrainingSet
from tests.data.rows import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_from_numpy_read_only_and_writable_share_memory():
    array = rows_of(torch.float32).numpy().copy()
    for writeable in (True, False):
        array.flags.writeable = writeable
        data = TrainingSet(array)
        assert data.rows.data_ptr() == array.ctypes.data
        assert np.array_equal(data[3].numpy(), array[3])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_from_files(tmp_path, suffix):
    rows = rows_of(torch.uint8)
    path = tmp_path / f"photos{suffix}"
    if suffix == ".npy":
        np.save(path, rows.numpy())
    elif suffix == ".npz":
        np.savez(path, rows=rows.numpy(), labels=np.arange(37, dtype=np.uint8), other=np.zeros(2))
    else:
        tensors = {"rows": rows, "labels": torch.arange(37), "other": torch.zeros(2)}
        safetensors.torch.save_file(tensors, path)
    for source in (path, str(path)):
        data = TrainingSet(source)
        assert torch.equal(data.rows, rows.flatten(1))
        assert (data.shape, data.name) == ((2, 3, 5), "photos")
        if suffix == ".npy":
            assert data.labels is None
        else:
            assert data.labels.tolist() == list(range(37))
    if suffix != ".npy":
        assert TrainingSet(path, key="other").shape == ()
        assert TrainingSet(path, labels=[1] * 37).labels.tolist() == [1] * 37
        with pytest.raises(ValueError, match="no array 'nothing'"):
            TrainingSet(path, key="nothing")


def test_one_hot_labels_of_a_file_are_left_to_the_user(tmp_path):
    np.savez(tmp_path / "a.npz", rows=np.zeros((3, 2)), labels=np.eye(3))
    assert TrainingSet(tmp_path / "a.npz").labels is None


def test_object_arrays_are_refused(tmp_path):
    array = np.array([{}], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    for source in (array, tmp_path / "a.npy"):
        with pytest.raises(ValueError, match="Python objects"):
            TrainingSet(source)


class Items(Dataset):
    def __init__(self, items):
        self.items = items
        self.reads = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        return self.items[index]


def test_from_datasets():
    rows = rows_of(torch.uint8, n=6)
    plain = Items(list(rows))
    assert torch.equal(TrainingSet(plain).rows, rows.flatten(1))
    assert plain.reads == 6
    labelled = TrainingSet(Items([(row.numpy(), i * i) for i, row in enumerate(rows)]))
    assert torch.equal(labelled.rows, rows.flatten(1))
    assert labelled.labels.tolist() == [0, 1, 4, 9, 16, 25]
    assert TrainingSet(TensorDataset(rows, torch.arange(6))).labels.tolist() == list(range(6))
    assert TrainingSet(TensorDataset(rows)).labels is None
    # A label that is not an integer, even once, is no class label.
    assert TrainingSet(Items([(rows[0], 1), (rows[1], 0.5)])).labels is None
    assert TrainingSet(Items(list(rows)), labels=torch.zeros(6, dtype=int)).labels.sum() == 0


def test_wrong_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(2)

    with pytest.raises(TypeError, match=r"map-style Dataset with a length, got Stream"):
        TrainingSet(Stream())
    with pytest.raises(ValueError, match="no items"):
        TrainingSet(Items([]))
    with pytest.raises(TypeError, match=r"item 1 of the data set.*got str"):
        TrainingSet(Items([torch.zeros(2), "a"]))
    with pytest.raises(ValueError, match=r"item 0 is \[2\].*item 1 is \[3\]"):
        TrainingSet(Items([torch.zeros(2), torch.zeros(3)]))
    with pytest.raises(ValueError, match=r"torch.float32, item 1 is \[2\] torch.float64"):
        TrainingSet(Items([torch.zeros(2), torch.zeros(2, dtype=torch.float64)]))


class Columns:
    """What a Hugging Face data set looks like from here."""

    def __init__(self, **columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


class Picture:
    """As PIL's: an array by its interface only."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.kept = array


def test_data_sets_whose_items_are_mappings():
    rows = rows_of(torch.uint8, shape=(4, 5, 3))
    labels = list(range(37))
    for column in (rows, rows.numpy(), [Picture(row.numpy()) for row in rows]):
        data = TrainingSet(Columns(image=column, label=labels))
        assert torch.equal(data.rows, rows.flatten(1)) and data.labels.tolist() == labels
        assert data.shape == (4, 5, 3)
    assert TrainingSet(Columns(image=rows, label=["a"] * 37)).labels is None
    assert TrainingSet(Columns(image=rows, label=labels), layout="hwc").shape == (3, 4, 5)
    nested = Columns(values=rows.float().tolist())
    assert torch.equal(TrainingSet(nested)[:], rows.float())
    two = Columns(a=rows, b=rows + 1, label=labels)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] hold arrays: say which with key="):
        TrainingSet(two)
    assert torch.equal(TrainingSet(two, key="b").rows, (rows + 1).flatten(1))
    with pytest.raises(ValueError, match="no column 'c'"):
        TrainingSet(two, key="c")


def test_lists_of_tensors_arrays_and_labelled_items():
    rows = rows_of(torch.float32)
    for given in (list(rows), [row.numpy() for row in rows]):
        assert torch.equal(TrainingSet(given)[:], rows)
    assert TrainingSet([(row, i) for i, row in enumerate(rows)]).labels.tolist() == list(range(37))
    for given, match in (
        ([torch.zeros(2), torch.zeros(3)], "item 1 is"),
        ([1.0, 2.0], "item 0"),
        ([], "no items"),
        ((rows, torch.arange(37)), "give the rows alone, and labels="),
        ({"rows": rows}, "give the rows alone, and labels="),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            TrainingSet(given)


def test_labels_that_are_no_integers_leave_the_rows_readable(tmp_path):
    rows = np.zeros((3, 2))
    for name, labels, kept in (
        ("strings", np.array(["a", "b", "c"]), None),
        ("objects", np.array(["a", None, 3], dtype=object), None),
        ("column", np.array([[3], [4], [5]]), [3, 4, 5]),
    ):
        np.savez(tmp_path / f"{name}.npz", images=rows, labels=labels)
        for key in ("images", None):
            data = TrainingSet(tmp_path / f"{name}.npz", key=key)
            assert (None if data.labels is None else data.labels.tolist()) == kept
    given = TrainingSet(rows, labels=torch.tensor([[3], [4], [5]]))
    assert given.labels.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"one-hot labels take labels\.argmax\(1\)"):
        TrainingSet(rows, labels=np.eye(3, dtype=int))
    for labels in (["a", "b", "c"], np.array(["a", "b", "c"])):
        with pytest.raises(TypeError, match=r"np\.unique\(labels, return_inverse=True\)\[1\]"):
            TrainingSet(rows, labels=labels)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_replaced_while_it_is_read_is_one_version(tmp_path, suffix, monkeypatch):
    """The second version takes the place of the first after each step of reading."""
    path, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"

    def write(to, value):
        rows, labels = torch.full((3, 2), float(value)), torch.full((3,), value)
        if suffix == ".npz":
            np.savez(to, rows=rows.numpy(), labels=labels.numpy())
        else:
            TrainingSet(rows, labels=labels, scale=1.0 + value).save(to)

    read = files.read_tensor
    write(path, 1)
    write(other, 2)

    def replacing(*arguments):
        found = read(*arguments)
        if other.exists():
            other.replace(path)
        return found

    monkeypatch.setattr(files, "read_tensor", replacing)
    data = TrainingSet(path)
    assert not other.exists() and data.labels.tolist() == [1, 1, 1]
    assert data.rows.unique().tolist() == [1.0] and data.scale == (2.0 if suffix != ".npz" else 1.0)
    assert TrainingSet(path).labels.tolist() == [2, 2, 2]
