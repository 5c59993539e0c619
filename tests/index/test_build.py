"""Building an index, and its files."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from memokern.data import files, storage
from memokern.data.training_set import TrainingSet
from memokern.index import build
from memokern.index.index import evenly_spaced_rows, fingerprint, restored
from tests.data.rows import DTYPES, Largest, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("coarse", "fine", "center")


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)


# --- building -----------------------------------------------------------------------------------


def test_what_is_chosen_by_default():
    def built(*shape, n=40):
        return TrainingSet(torch.randn(n, *shape)).build_index().index

    cifar = built(3, 32, 32)
    assert (cifar.basis, cifar.dims) == ("dct", (32, 64, 128, 256, 512))
    assert cifar.edges == (32, 64, 128, 256, 512, 768, 1024, 3072)
    assert (cifar.bands, cifar.first_band) == (7, (0, 1, 2, 3, 4))
    assert cifar.coarse.shape == (40, 32 + 7 + 1)
    assert cifar.fine.shape == (40, 480)
    assert (cifar.n, cifar.dim) == (40, 3072)
    plain = built(700)
    assert (plain.basis, plain.edges) == ("pca", (32, 64, 128, 256, 512, 700))
    assert built(100).dims == (32, 64, 100)
    small = built(20)
    assert (small.dims, small.edges, small.first_band) == ((10, 20), (10, 20), (0, 1))
    only = TrainingSet(torch.randn(5, 20)).build_index(dims=(20,)).index
    assert (only.bands, only.first_band, only.coarse.shape) == (0, (0,), (5, 21))


def test_build_returns_the_set_and_says_so():
    data = TrainingSet.digits()
    assert data.index is None
    before = data.nbytes
    assert data.build_index() is data
    assert ", dct index, cpu)" in repr(data)
    assert repr(data.index) == (
        "Index(dct: 1797 rows, 32 to 64 of 64 dimensions, 1 band, float16, 632.8 kB, cpu)"
    )
    assert data.nbytes == before + 1797 * 8 + 64 * 4 + data.index.nbytes


def test_build_refuses():
    data = TrainingSet(torch.zeros(3, 20))
    for arguments, error, match in (
        ({"basis": "svd"}, ValueError, "basis one of 'auto', 'pca', 'dct', got 'svd'"),
        ({"basis": "dct"}, ValueError, r"for basis='dct', got \[20\]: use basis='pca'"),
        ({"storage": "int8"}, ValueError, "'float16' or 'float32', got 'int8'"),
        ({"dims": ()}, ValueError, r"dims ascending, such as .*, got \(\)"),
        ({"dims": (8, 8)}, ValueError, "dims ascending"),
        ({"dims": (0, 8)}, ValueError, r"dims in 1\.\.20, got 0"),
        ({"dims": (8, 21)}, ValueError, r"dims in 1\.\.20, got 21"),
        ({"dims": (8.0,)}, TypeError, "dims as an int, got float"),
    ):
        with pytest.raises(error, match=match):
            data.build_index(**arguments)
        assert data.index is None
    with pytest.raises(ValueError, match="more than 16 features for an index, got 16: the dense"):
        TrainingSet(torch.zeros(3, 4, 4)).build_index()
    with pytest.raises(ValueError, match=r"no basis by default for rows \[5000\].*\[C, H, W\]"):
        TrainingSet(torch.zeros(3, 5000)).build_index()
    with pytest.raises(ValueError, match="at most 4096 features for basis='pca', got 5000"):
        TrainingSet(torch.zeros(3, 5000)).build_index("pca")
    with pytest.raises(ValueError, match="scale them down"):
        TrainingSet(torch.randn(3, 20) * 1e16).build_index()


def test_many_features_take_no_square_matrix():
    data = TrainingSet(torch.randn(4, 64, 32, 32))
    with Largest(data.rows) as largest:
        data.build_index("dct")
    # The bytes of the rows, of which a hash is taken.
    assert largest.elements == 16 * data.dim


@pytest.mark.parametrize("basis", ["dct", "pca"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.one_of(3)
def test_building_makes_nothing_larger_than_a_chunk(monkeypatch, dtype, basis):
    rows = rows_of(dtype, n=1000, shape=(3, 8, 8))
    whole = TrainingSet(rows).build_index(basis, dims=(4, 8)).index
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", 7 * 192)
    monkeypatch.setattr(build, "CHUNK_ELEMENTS", 7 * 192)
    monkeypatch.setattr(build, "FIT_ROWS", 60)
    monkeypatch.setattr(build, "ORDER_ROWS", 60)
    monkeypatch.setattr("memokern.index.index.FINGERPRINT_BYTES", 5 * 192)
    with Largest(rows) as largest:
        data = TrainingSet(rows).build_index(basis, dims=(4, 8))
    # The index is 1000 x 12 numbers at most, the directions 192 x 192; the rows are 192,000.
    assert largest.elements <= max(1000 * (4 + data.index.bands + 1), 192 * 192)
    assert data.index.coarse.shape == whole.coarse.shape
    monkeypatch.setattr("memokern.index.index.AT_ONCE", 7)
    with Largest(data.index.coarse) as largest:
        mean_square = data.index.mean_square
    assert largest.elements <= 7 * (4 + data.index.bands)
    assert mean_square == pytest.approx(whole.mean_square)


def test_pieces_make_the_same_index(monkeypatch):
    rows = rows_of(torch.uint8, n=50, shape=(3, 8, 8))
    whole = TrainingSet(rows).build_index().index
    monkeypatch.setattr(build, "CHUNK_ELEMENTS", 7 * 192)
    pieces = TrainingSet(rows).build_index().index
    for part in PARTS:
        one, other = (getattr(index, part).double() for index in (whole, pieces))
        # Products of other sizes may be summed in another order; float16 then rounds elsewhere.
        torch.testing.assert_close(one, other, rtol=2.0**-10, atol=1e-6)


def test_storage_follows_the_range_of_the_rows():
    for size, expected in ((1.0, torch.float16), (1e-4, torch.float32), (1e5, torch.float32)):
        data = TrainingSet(size * torch.randn(20, 3, 8, 8)).build_index()
        assert data.index.fine.dtype == expected
        assert torch.isfinite(data.index.fine).all()
    exact = TrainingSet(torch.randn(20, 3, 8, 8)).build_index(storage="float32").index
    assert exact.fine.dtype == torch.float32


def test_progress(capsys):
    data = TrainingSet(rows_of(torch.uint8, n=50, shape=(3, 8, 8)))
    data.build_index()
    data.build_index(progress=False)
    assert capsys.readouterr().err == ""
    data.build_index(progress=True)
    assert "building the index" in capsys.readouterr().err


def test_mean_and_norms_far_from_zero_are_kept_with_the_index():
    data = TrainingSet(torch.randn(30, 40) + 1e4).build_index()
    assert data.index.center is data.center
    assert data.index.y_max >= float(data.sq_norms.max().sqrt())
    assert data.index.y_max <= float(data.sq_norms.max().sqrt()) * (1 + 1e-9)


# --- other sets, copies, files ------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [[5, 1, 1], slice(3, 40, 2), "mask"])
def test_a_subset_has_its_part_of_the_index(tmp_path, chosen):
    data = TrainingSet.digits()
    index = data.labels == 3 if chosen == "mask" else chosen
    assert data.subset(index).index is None
    data.build_index()
    part = data.subset(index)
    assert torch.equal(part.index.coarse, data.index.coarse[index])
    assert torch.equal(part.index.fine, data.index.fine[index])
    assert torch.equal(part.center, data.center) and part.index.center is part.center
    assert torch.equal(part.sq_norms, data.sq_norms[index])
    assert part.index.n == part.n and part.index.y_max == data.index.y_max
    assert part.rows.is_contiguous() and part.index.coarse.is_contiguous()
    path = tmp_path / "part.safetensors"
    part.save(path)  # whose rows are its own
    assert same(TrainingSet.load(path).index, part.index)
    assert same(part.subset(slice(0, 2)).index, data.index.take(index, "").take(slice(0, 2), ""))


def test_a_copy_has_the_index():
    data = TrainingSet.digits().build_index()
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert same(twin.index, data.index)
        assert twin.index.center is twin.center
    assert data.to("cpu").index is data.index
    assert same(data.index.to("cpu"), data.index)
    assert repr(data.index.to("cpu")) == repr(data.index)
    assert data.to("meta").index is None


@pytest.mark.parametrize("basis", ["dct", "pca"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files(tmp_path, dtype, basis):
    path = tmp_path / "set.safetensors"
    data = TrainingSet(rows_of(dtype, shape=(3, 8, 8)), shift=1 / 3, name="mine")
    data.build_index(basis, dims=(8, 50)).save(path)
    x, alpha = torch.randn(3, 192), torch.ones(3, dtype=torch.float64)
    expected = data.index.project(x, alpha)
    for back in (TrainingSet.load(path), TrainingSet(path), TrainingSet(path, key="rows")):
        assert same(back.index, data.index)
        for name in ("basis", "dims", "edges", "first_band", "y_max", "row_error", "fingerprint"):
            assert getattr(back.index, name) == getattr(data.index, name)
        # To the bit: what is computed about another center would not be bounded.
        assert torch.equal(back.center, data.center)
        assert torch.equal(back.sq_norms, data.sq_norms)
        found = back.index.project(x, alpha)
        for part, wanted in zip(found, expected, strict=True):
            # A mapped matrix may lie otherwise in memory, and be summed in another order.
            torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5)
        assert back.name == "mine"
    for other in (
        TrainingSet.load(path, index=False),
        TrainingSet(path, index=False),
        TrainingSet(path, scale=2.0),
        TrainingSet(path, shift=0.0),
        TrainingSet(path, key="index.coarse"),
    ):
        assert other.index is None
    # Over the file that the index is mapped from.
    back = TrainingSet.load(path)
    back.save(path)
    assert same(TrainingSet.load(path).index, data.index)


def rewritten(path, change) -> None:
    """The file with its tensors and metadata changed."""
    tensors, metadata = safetensors.torch.load_file(path), files.read_metadata(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def test_an_index_of_other_rows_is_refused(tmp_path):
    path = tmp_path / "set.safetensors"
    data = TrainingSet(rows_of(torch.uint8, shape=(3, 8, 8))).build_index()

    def brighter(tensors, metadata):
        tensors["rows"] = tensors["rows"].clamp(1)

    def shuffled(tensors, metadata):
        tensors["rows"] = tensors["rows"].flip(0)

    def fewer(tensors, metadata):
        tensors["rows"] = tensors["rows"][:-1]

    def scaled(tensors, metadata):
        metadata["scale"] = "1.0"

    for change in (brighter, shuffled, fewer, scaled):
        data.save(path)
        rewritten(path, change)
        with pytest.raises(ValueError, match=r"does not belong to these .*build_index\(\) anew"):
            TrainingSet.load(path)
        fresh = TrainingSet.load(path, index=False).build_index()
        assert fresh.index.fingerprint != data.index.fingerprint


def test_a_damaged_index_is_refused(tmp_path):
    path = tmp_path / "set.safetensors"
    data = TrainingSet(rows_of(torch.uint8, shape=(3, 8, 8)))

    def described(**changes):
        def change(tensors, metadata):
            metadata["index"] = json.dumps({**json.loads(metadata["index"]), **changes})

        return change

    def tensor(name, value):
        def change(tensors, metadata):
            tensors["index." + name] = value(tensors["index." + name]).contiguous()

        return change

    def without(name):
        def change(tensors, metadata):
            del tensors["index." + name]

        return change

    def garbled(tensors, metadata):
        metadata["index"] = "{"

    for basis, change, match in (
        ("dct", described(version=1), "expected version 3, got 1"),
        ("dct", described(basis="wavelets"), "the basis 'wavelets' of the index is damaged"),
        ("dct", described(dims=[32, 16]), "cannot be used"),
        ("dct", described(dims=[]), "cannot be used"),
        ("dct", described(edges=[32, 64, 128, 191]), "cannot be used"),
        ("dct", described(y_max=math.nan), "do not fit"),
        ("dct", described(row_error=None), "cannot be used"),
        ("dct", without("fine"), "'fine'"),
        ("dct", without("sq_norms"), "'sq_norms'"),
        ("dct", without("basis.order"), "is damaged"),
        ("dct", garbled, "cannot be used"),
        ("dct", tensor("coarse", lambda t: t[:-1]), "do not fit"),
        ("dct", tensor("coarse", lambda t: t.half()), "do not fit"),
        ("dct", tensor("fine", lambda t: t[:, :-1]), "do not fit"),
        ("dct", tensor("center", lambda t: t[:-1]), "cannot be used"),
        ("dct", tensor("sq_norms", lambda t: t.float()), "sq_norms do not fit"),
        ("dct", tensor("basis.order", lambda t: t * 0), "is damaged"),
        ("dct", tensor("basis.order", lambda t: t + 1), "is damaged"),
        ("pca", tensor("basis.matrix", lambda t: t.float()), "is damaged"),
        ("pca", tensor("basis.matrix", lambda t: t[:-1]), "do not fit"),
        ("pca", tensor("basis.matrix", lambda t: t * math.nan), "is damaged"),
    ):
        data.build_index(basis).save(path)
        rewritten(path, change)
        with pytest.raises(ValueError, match=rf"cannot be used.*{match}|{match}.*") as raised:
            TrainingSet.load(path)
        assert "index=False, then build_index() anew" in str(raised.value)
        assert TrainingSet.load(path, index=False).n == 37


def test_a_scaled_basis_is_paid_for_not_trusted():
    """A matrix that is not orthonormal widens the margin of every query."""
    data = TrainingSet(torch.randn(37, 40)).build_index("pca")
    described, tensors = data.index.state(data.rows, data.sq_norms)
    tensors["basis.matrix"] = tensors["basis.matrix"] * 1.01
    stretched, _ = restored(described, tensors, data.shape)
    x, alpha = torch.randn(3, 40), torch.ones(3, dtype=torch.float64)
    margin = stretched.project(x, alpha).margin
    assert (margin > 100 * data.index.project(x, alpha).margin).all()


def test_rows_mapped_from_a_file(tmp_path):
    rows = rows_of(torch.uint8, n=300, shape=(3, 8, 8))
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = TrainingSet(tmp_path / "rows.npy").build_index()
    assert same(mapped.index, TrainingSet(rows).build_index().index)


def test_the_fingerprint_is_of_everything_that_counts():
    rows = rows_of(torch.float32).flatten(1)
    marks = [fingerprint(rows, 1.0, 0.0), fingerprint(rows, 2.0, 0.0), fingerprint(rows, 1.0, 1.0)]
    marks.append(fingerprint(rows.half(), 1.0, 0.0))
    marks.append(fingerprint(rows[:-1], 1.0, 0.0))
    changed = rows.clone()
    changed[17, 3] += 1
    marks.append(fingerprint(changed, 1.0, 0.0))
    assert len(set(marks)) == 6
    assert fingerprint(rows.clone(), 1.0, 0.0) == marks[0]


def test_evenly_spaced_rows():
    assert evenly_spaced_rows(5, 5).tolist() == [0, 1, 2, 3, 4]
    for n in (6, 1000, 10**9):
        chosen = evenly_spaced_rows(n, 5)
        assert int(chosen.min()) >= 0 and int(chosen.max()) < n
        assert len(chosen.unique()) == 5
        # No gap much larger than the even one.
        assert int(chosen.diff().max()) <= 2 * n / 5 + 1
