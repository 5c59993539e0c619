"""The command line and damaged files, odd names and a full disk: one line, no traceback."""

from __future__ import annotations

import errno
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from memokern.data import files
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")


def npy(header: str) -> bytes:
    text = header.encode()
    text += b" " * ((64 - (11 + len(text)) % 64) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


def shaped(shape: str, descr: str = "'<f4'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


def tensors(header: object, size: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def rows_at(*offsets: int, **metadata: str) -> bytes:
    rows = {"dtype": "F32", "shape": [4, 4], "data_offsets": list(offsets)}
    return tensors({"rows": rows, **({"__metadata__": metadata} if metadata else {})})


OURS = {"format": "memokern.TrainingSet", "version": "1"}
AFFINE = {"scale": "1", "shift": "0"}
ARRAYS = {
    "negative": shaped("(-4, 4)"),
    "all negative": shaped("(-4, -4)"),
    "overflow": shaped("(4611686018427387904, 8)"),
    "beyond int64": shaped("(99999999999999999999999, 8)"),
    "no numbers": shaped("('a', 4)"),
    "open header": npy("{'descr': '<f4', 'fortran_order': "),
    "no type": shaped("(4, 4)", "[]"),
    "unknown type": shaped("(4, 4)", "'<q9'"),
    "cut": b"\x93NUMPY\x01\x00",
    "version": b"\x93NUMPY\x09\x00aaaaaaaaaaaa",
    "empty": b"",
}
TENSORS = {
    "beyond the end": rows_at(0, 128),
    "reversed": rows_at(64, 0),
    "negative": rows_at(-1, 0),
    "hole": rows_at(8, 72),
    "no affine": rows_at(0, 64, **OURS),
    "affine of words": rows_at(0, 64, **OURS, scale="x", shift="0"),
    "affine nan": rows_at(0, 64, **OURS, scale="nan", shift="0"),
    "no version": rows_at(0, 64, format="memokern.TrainingSet"),
    "number": rows_at(0, 64, format=3),
    "index list": rows_at(0, 64, **OURS, **AFFINE, index="[]"),
    "index open": rows_at(0, 64, **OURS, **AFFINE, index="{"),
    "index deep": rows_at(0, 64, **OURS, **AFFINE, index="[" * 100_000),
    "no text": tensors(b"\xff\xfe{}"),
    "empty": b"",
}


def refused(*arguments: object) -> str:
    done = call(*arguments)
    assert done.exit_code == 2, (arguments, done.exception, done.output)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    return done.stderr


def refused_everywhere(path) -> None:
    refused("sample", "--data", path, "--steps", 2, "-n", 1)
    if "index" not in path.name and "affine" not in path.name:  # which samples do not have
        refused("memorization", path, "digits")
    refused("memorization", path, path)
    if "index" not in path.name:
        refused("index", path, "-o", path.with_name("out.safetensors"))


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("suffix", ["npy", "stored", "deflated"])
def test_damaged_arrays(tmp_path, kind, suffix) -> None:
    path = tmp_path / ("a.npy" if suffix == "npy" else "a.npz")
    if suffix == "npy":
        path.write_bytes(ARRAYS[kind])
    else:
        method = zipfile.ZIP_STORED if suffix == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a.npy", ARRAYS[kind])
    refused_everywhere(path)


def test_a_damaged_archive(tmp_path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros((4, 4)))
    whole = path.read_bytes()
    central = whole.rfind(b"PK\x01\x02")
    far = whole[: central + 42] + b"\xff\xff\xff\x7f" + whole[central + 46 :]
    for content in (b"XXXX" + whole[4:], far, whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        refused_everywhere(path)


@pytest.mark.parametrize("kind", TENSORS)
def test_damaged_tensors(tmp_path, kind) -> None:
    path = tmp_path / f"{kind}.safetensors"
    path.write_bytes(TENSORS[kind])
    refused_everywhere(path)


@pytest.mark.parametrize("name", ["a" * 300, "caf\udce9"])
def test_odd_names(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    refused("sample", "--data", f"{name}.npy")
    refused("memorization", f"{name}.npy", "digits")
    refused("memorization", "digits", f"{name}.npy")
    if name != "caf\udce9":  # which is a name that Linux takes
        refused("sample", "-o", f"{name}.npz")
        refused("index", "digits", "-o", f"{name}.safetensors")
        refused("reproduce", "rate", "--out", name)


def test_a_full_disk_in_index(tmp_path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_tensors", full)
    done = call("index", "digits", "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.endswith("cannot write: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    real = type(tmp_path).exists

    def closed(self) -> bool:  # as of a folder without the x permission, for others than root
        if self.name in ("a.npy", "out.npz"):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(type(tmp_path), "exists", closed)
    assert "Permission denied" in refused("sample", "--data", tmp_path / "a.npy")
    assert "Permission denied" in refused("sample", "-o", tmp_path / "out.npz")
