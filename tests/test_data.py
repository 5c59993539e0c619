"""memokern.TrainingSet: what it accepts, keeps, computes once, and refuses."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from memokern import data as data_module
from memokern.data import TrainingSet
from memokern.datasets import sources

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def rows_of(dtype: torch.dtype, n: int = 37, shape: tuple[int, ...] = (2, 3, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return (torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 3).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """Sweeps in chunks of 4 rows of 30 features, so that 37 rows end in a ragged chunk."""
    monkeypatch.setattr(data_module, "CHUNK_ELEMENTS", 4 * 30)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_type_shape_and_memory(dtype):
    rows = rows_of(dtype)
    data = TrainingSet(rows)
    assert data.rows.dtype == data.dtype == dtype
    assert data.rows.shape == (data.n, data.dim) == (37, 30)
    assert data.shape == (2, 3, 5)
    assert data.rows.data_ptr() == rows.data_ptr()
    assert data.rows.is_contiguous()
    assert len(data) == 37
    assert data.device == rows.device
    assert (data.scale, data.shift) == ((2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0))


def test_uint8_extremes_are_minus_one_and_one():
    data = TrainingSet(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert data[0].dtype == torch.float32
    # 255 * (2 / 255) - 1 in float32: a rounding of a number near 2.
    torch.testing.assert_close(data[0], torch.tensor([-1.0, 1.0]), rtol=0, atol=2**-23)


def test_scalar_rows_and_one_row():
    data = TrainingSet(torch.arange(4.0))
    assert (data.n, data.dim, data.shape) == (4, 1, ())
    assert data.gather(torch.tensor([[3, 1]])).tolist() == [[3.0, 1.0]]
    assert [float(row) for row in data] == [0, 1, 2, 3]
    single = TrainingSet(torch.ones(1, 3))
    assert single.sq_norms.tolist() == [0.0]


def test_other_layouts_are_made_contiguous():
    rows = rows_of(torch.float32).transpose(1, 3)[::2]
    data = TrainingSet(rows)
    assert data.rows.is_contiguous()
    assert torch.equal(data.rows, rows.reshape(19, 30))
    assert torch.equal(TrainingSet(torch.ones(1, 3).expand(5, 3)).rows, torch.ones(5, 3))


# --- sources ------------------------------------------------------------------------------------


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


# --- refusals -----------------------------------------------------------------------------------


def test_wrong_types():
    for source in ([[1.0]], 3, None):
        with pytest.raises(TypeError, match="tensor, a numpy array, a path or a torch Dataset"):
            TrainingSet(source)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.int8):
        with pytest.raises(TypeError, match=r"expected rows of type .*uint8, got .*\.to\(torch"):
            TrainingSet(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match="expected dense rows"):
        TrainingSet(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="key='x' names an array in a file"):
        TrainingSet(torch.zeros(2, 2), key="x")


def test_wrong_shapes():
    for shape in ((), (0, 3), (3, 0), (2, 0, 4)):
        with pytest.raises(ValueError, match="N >= 1 and D >= 1"):
            TrainingSet(torch.zeros(shape))
    with pytest.raises(ValueError, match="require a gradient"):
        TrainingSet(torch.zeros(2, 2, requires_grad=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
@pytest.mark.parametrize("row", [0, 3, 4, 36])
def test_the_first_row_that_is_not_finite_is_named(small_chunks, dtype, bad, row):
    rows = rows_of(dtype)
    rows[row, 1, 2, 4] = bad
    rows[36, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=f"in row {row}:"):
        TrainingSet(rows)
    assert TrainingSet(rows, check=False).n == 37


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_scale_and_shift(name):
    rows = torch.ones(2, 2)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"finite {name}"):
            TrainingSet(rows, **{name: value})
    assert getattr(TrainingSet(rows, **{name: 3}), name) == 3.0
    with pytest.raises(ValueError, match="scale other than 0"):
        TrainingSet(rows, scale=0)


def test_labels():
    rows = torch.zeros(3, 2)
    for labels in ([2, 0, 1], np.array([2, 0, 1], np.uint8), torch.tensor([2, 0, 1]).int()):
        data = TrainingSet(rows, labels=labels)
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"expected labels \[3\].*got \[2\]"):
        TrainingSet(rows, labels=[0, 1])
    with pytest.raises(TypeError, match="integer type"):
        TrainingSet(rows, labels=[0.0, 1.0, 2.0])
    with pytest.raises(TypeError, match="list of numbers, got list"):
        TrainingSet(rows, labels=["a", "b", "c"])


def test_log_weights():
    rows = torch.zeros(3, 2)
    given = np.array([0.0, -np.inf, 2.0])
    data = TrainingSet(rows, log_weights=given)
    assert data.log_weights.dtype == torch.float64
    assert data.log_weights.tolist() == [0.0, -math.inf, 2.0]
    given[:] = np.nan
    assert data.log_weights.tolist() == [0.0, -math.inf, 2.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"finite or -inf, got .* at row 1"):
            TrainingSet(rows, log_weights=[0.0, bad, 0.0])
    with pytest.raises(ValueError, match="all log_weights are -inf"):
        TrainingSet(rows, log_weights=[-math.inf] * 3)
    with pytest.raises(ValueError, match=r"expected log_weights \[3\]"):
        TrainingSet(rows, log_weights=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="give them as bias="):
        TrainingSet(rows, log_weights=torch.zeros(3, requires_grad=True))


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_center_and_norms(small_chunks, dtype):
    rows = rows_of(dtype)
    data = TrainingSet(rows)
    values = rows.flatten(1).to(torch.float64) * data.scale + data.shift
    assert data.center.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # center: the float64 mean rounded once; 37 float64 additions are far below a float32 rounding.
    eps = torch.finfo(data.center.dtype).eps
    tolerance = 64 * eps if dtype == torch.float64 else eps
    torch.testing.assert_close(
        data.center.double(), values.mean(0), rtol=tolerance, atol=tolerance * values.abs().max()
    )
    assert data.sq_norms.dtype == torch.float64
    # Belongs to the center as stored: 30 squares in float64.
    expected = (values - data.center.double()).square().sum(1)
    torch.testing.assert_close(data.sq_norms, expected, rtol=64 * 2.0**-52, atol=0)


def test_center_and_norms_far_from_the_origin():
    """Mean 1e4, spread 1: norms about the mean, not a difference of large squares."""
    rows = (rows_of(torch.float64, n=500, shape=(20,)) + 1e4).float()
    data = TrainingSet(rows)
    exact = (rows.double() - rows.double().mean(0)).square().sum(1)
    # The center is rounded to float32: an error of 1e4 * 2^-24 in each of 20 features.
    slack = 2 * exact.sqrt().max() * 20**0.5 * 1e4 * 2**-24
    torch.testing.assert_close(data.sq_norms, exact, rtol=0, atol=float(slack))


def test_caches_are_computed_once_and_counted():
    data = TrainingSet(rows_of(torch.uint8))
    assert data.nbytes == 37 * 30
    center, norms = data.center, data.sq_norms
    assert data.center is center
    assert data.sq_norms is norms
    assert data.nbytes == 37 * 30 + 4 * 30 + 8 * 37


class Largest(TorchDispatchMode):
    """The most elements of any tensor made outside the memory of `rows`."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() != self.rows
            ):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_sweeps_make_nothing_larger_than_a_chunk(small_chunks, dtype):
    rows = rows_of(dtype, n=1000)
    with Largest(rows) as largest:
        data = TrainingSet(rows)
        norms = data.sq_norms
    assert len(norms) == 1000
    # The norms themselves are 1000 numbers, a chunk is 120, the rows are 30,000.
    assert largest.elements == 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_indexing(dtype):
    rows = rows_of(dtype)
    data = TrainingSet(rows)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = rows.to(compute) * data.scale + data.shift
    index = torch.tensor([[3, 36], [0, 3]])
    assert data.compute_dtype == compute
    assert torch.equal(data.gather(index), values[index])
    assert torch.equal(data.gather(index.int()), values[index])
    assert data.gather(torch.zeros(0, 4, dtype=int)).shape == (0, 4, 2, 3, 5)
    assert torch.equal(data[-1], values[-1])
    assert torch.equal(data[2:9:3], values[2:9:3])
    mask = torch.arange(37) % 5 == 0
    assert torch.equal(data[mask], values[mask])
    assert torch.equal(data.dequantize(data.rows), values.flatten(1))
    assert len(list(data)) == 37


def test_wrong_indices():
    data = TrainingSet(rows_of(torch.float32))
    for index in ([37], [-1], [0, 99]):
        with pytest.raises(IndexError, match=r"indices in 0\.\.36"):
            data.gather(torch.tensor(index))
    with pytest.raises(TypeError, match="index of int64"):
        data.gather(torch.tensor([0.0]))
    with pytest.raises(IndexError):
        data[37]
    with pytest.raises(TypeError, match="one index"):
        data[0, 1]


# --- other sets ---------------------------------------------------------------------------------


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
