"""memokern.data.files: what is read, what is refused, and that writing is all or nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from memokern.data import files
from memokern.util import writing

pytestmark = pytest.mark.usefixtures("one_thread")


class Bomb:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def save(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, rows=array)
    else:
        safetensors.torch.save_file({"rows": torch.from_numpy(array)}, path)
    return path


FORMATS = pytest.mark.parametrize("suffix", files.FORMATS)


@FORMATS
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64", "bool"])
def test_every_format_gives_back_values_and_type(tmp_path, suffix, dtype):
    array = (np.arange(24).reshape(4, 2, 3) % 2).astype(dtype)
    path = save(tmp_path / f"a{suffix}", array)
    read = files.read_array(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    assert torch.equal(files.read_tensor(str(path)), torch.from_numpy(array))


@FORMATS
def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", np.zeros((5, 3), np.uint8))
    before = path.read_bytes()
    tensor = files.read_tensor(path)
    tensor.fill_(7)
    assert path.read_bytes() == before
    assert files.read_tensor(path).sum() == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from /proc")
@FORMATS
def test_files_are_mapped_not_read(tmp_path, suffix):
    path = save(tmp_path / f"mapped{suffix}", np.ones((1000, 100), np.uint8))
    tensor = files.read_tensor(path)
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(str(path)), line
            break
    else:
        pytest.fail("the tensor's address is in no mapping")
    assert tensor.sum() == 100_000


def test_a_mapped_member_is_compared_with_its_checksum(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, rows=np.arange(30_000, dtype=np.uint8).reshape(300, 100))
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    with pytest.raises(ValueError, match=r"a.npz' cannot be read \(Bad CRC"):
        files.read_tensor(path)
    monkeypatch.setattr(files, "CHECKED_BYTES", 1000)  # what is larger is not read for it
    assert files.read_tensor(path).shape == (300, 100)


def test_a_compressed_member_and_an_unaligned_one_are_read(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    np.savez_compressed(tmp_path / "a.npz", rows=array)
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npz"), array)
    # Names of several lengths put the arrays at all offsets modulo 8; each must come out right.
    many = {"k" * length: array + length for length in range(1, 10)}
    np.savez(tmp_path / "b.npz", **many)
    for key, expected in many.items():
        np.testing.assert_array_equal(files.read_array(tmp_path / "b.npz", key), expected)
        assert files.read_tensor(tmp_path / "b.npz", key).data_ptr() % 8 == 0


def test_fortran_order_and_foreign_bytes(tmp_path):
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.save(tmp_path / "f.npy", array)
    np.savez(tmp_path / "f.npz", a=array.astype(np.uint8))
    np.save(tmp_path / "b.npy", array.astype(">f8"))
    expected = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    assert torch.equal(files.read_tensor(tmp_path / "f.npy"), expected)
    assert torch.equal(files.read_tensor(tmp_path / "f.npz"), expected.to(torch.uint8))
    assert torch.equal(files.read_tensor(tmp_path / "b.npy"), expected)


def test_bfloat16_needs_a_tensor(tmp_path):
    rows = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    files.write_safetensors(tmp_path / "a.safetensors", {"rows": rows})
    assert torch.equal(files.read_tensor(tmp_path / "a.safetensors"), rows)
    with pytest.raises(TypeError, match=r"bfloat16.*use read_tensor"):
        files.read_array(tmp_path / "a.safetensors")


def test_keys(tmp_path):
    one, two = np.zeros((2, 1)), np.ones((2, 1))
    np.savez(tmp_path / "a.npz", first=one, images=two)
    assert files.keys(tmp_path / "a.npz") == ["first", "images"]
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npz"), two)
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npz", "first"), one)
    np.savez(tmp_path / "b.npz", first=one, second=two)
    with pytest.raises(ValueError, match=r"\['first', 'second'\]: say which with key="):
        files.read_array(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"no array 'third'; it has \['first', 'second'\]"):
        files.read_array(tmp_path / "b.npz", "third")
    np.save(tmp_path / "c.npy", one)
    assert files.keys(tmp_path / "c.npy") == []
    with pytest.raises(ValueError, match="leave out key='first'"):
        files.read_array(tmp_path / "c.npy", "first")
    assert list(files.read_table(tmp_path / "b.npz")) == ["first", "second"]
    assert list(files.read_table(tmp_path / "c.npy")) == ["arr_0"]


def test_pickles_are_never_loaded(tmp_path):
    mark = tmp_path / "mark"
    objects = np.array([Bomb(mark), None], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", rows=objects)
    np.savez_compressed(tmp_path / "b.npz", rows=objects)
    for name in ("a.npy", "a.npz", "b.npz"):
        with pytest.raises(ValueError, match=r"Python objects.*never loads"):
            files.read_tensor(tmp_path / name)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"not a valid \.npy"):
        files.read_tensor(tmp_path / "c.npy")
    torch.save(torch.zeros(2), tmp_path / "d.pt")
    with pytest.raises(ValueError, match=r"never loads pickles.*safetensors\.torch\.save_file"):
        files.read_tensor(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="Python objects"):
        files.as_tensor(objects)
    assert not mark.exists()


@FORMATS
def test_missing_damaged_and_unknown_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read_tensor(path)
    path.mkdir()
    with pytest.raises(ValueError, match="not a file"):
        files.read_tensor(path)
    path.rmdir()
    save(path, np.ones((50, 50)))
    whole = path.read_bytes()
    for content in (b"", b"no such format", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a" + suffix):
            files.read_tensor(path)
    with pytest.raises(ValueError, match=r"ending in \.npy, \.npz, \.safetensors"):
        files.read_tensor(tmp_path / "a.csv")


def test_a_damaged_compressed_member(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, rows=np.random.default_rng(0).normal(size=(50, 50)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        files.read_array(path)


def test_arrays_that_no_tensor_holds():
    for array in (np.array(["a"]), np.zeros(2, dtype=[("x", "f4")])):
        with pytest.raises(TypeError, match="expected a number type"):
            files.as_tensor(array)


def test_as_tensor_shares_memory_even_when_read_only():
    array = np.arange(6.0).reshape(2, 3)
    assert files.as_tensor(array).data_ptr() == array.ctypes.data
    array.flags.writeable = False
    tensor = files.as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data
    address = array.ctypes.data
    del array
    # The tensor keeps the memory alive.
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    back = np.arange(3)[::-1]
    assert files.as_tensor(back).tolist() == [2, 1, 0]


# --- writing ------------------------------------------------------------------------------------


def test_write_npz_is_deterministic_and_readable(tmp_path):
    arrays = {"x": torch.arange(3.0, requires_grad=True), "y": np.ones((2, 2), np.uint8), "z": 3}
    files.write_npz(tmp_path / "a.npz", **arrays)
    files.write_npz(tmp_path / "b.npz", **arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    table = files.read_table(tmp_path / "a.npz")
    assert table["x"].tolist() == [0, 1, 2]
    assert table["y"].dtype == np.uint8
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    with pytest.raises(ValueError, match=r"array 'x'.*objects"):
        files.write_npz(tmp_path / "c.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        files.write_npz(tmp_path / "c.dat", x=np.zeros(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_write_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"x": torch.arange(6).reshape(2, 3).T}, {"unit": "pixels"})
    assert files.read_tensor(path).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert files.read_metadata(path) == {"unit": "pixels"}
    assert list(files.read_table(path)) == files.keys(path) == ["x"]
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        files.write_safetensors(tmp_path / "a.bin", {})
    np.save(tmp_path / "a.npy", np.zeros(1))
    assert files.read_metadata(tmp_path / "a.npy") == {}


def test_every_writer_respects_the_umask(tmp_path):
    """Also safetensors', which makes a file of its own for the owner only."""
    previous = os.umask(0o027)
    try:
        files.write_safetensors(tmp_path / "a.safetensors", {"rows": torch.zeros(2)})
        files.write_npz(tmp_path / "a.npz", rows=torch.zeros(2))
        writing.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}
