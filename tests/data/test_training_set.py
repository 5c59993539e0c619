"""memokern.TrainingSet: what it keeps, computes once, and refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from memokern.data import storage
from memokern.data.training_set import TrainingSet
from tests.data.rows import DTYPES, Largest, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_chunks(monkeypatch):
    """Sweeps in chunks of 4 rows of 30 features, so that 37 rows end in a ragged chunk."""
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", 4 * 30)
    monkeypatch.setattr(storage, "SAMPLE_ELEMENTS", 4 * 30)


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


# --- refusals -----------------------------------------------------------------------------------


def test_wrong_types():
    for source in (3, None):
        with pytest.raises(TypeError, match="tensor, a numpy array, a path, a list of tensors, or"):
            TrainingSet(source)
    with pytest.raises(TypeError, match="item 0 of the data set to be a tensor"):
        TrainingSet([[1.0]])
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
        with pytest.raises(ValueError, match=f"expected {name} finite, got"):
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
    with pytest.raises(TypeError, match="labels as integers, got strings"):
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
    values = data.dequantize(rows.flatten(1)).to(torch.float64)
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
