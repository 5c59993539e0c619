"""An index in a file is refused once a byte of it, or of any row, is not what it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memokern import TrainingSet, posterior
from memokern.data import derived
from memokern.index.checksum import checksum

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    rows = torch.randn(1000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    TrainingSet(rows).build_index(dims=(16, 64)).save(path)
    return path


def contents(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return {k: opened.get_tensor(k).clone() for k in list(opened.keys())}, opened.metadata()


@pytest.fixture(params=["at load", "at first use"])
def when(request, monkeypatch):
    if request.param == "at first use":
        monkeypatch.setattr(derived, "AT_ONCE_BYTES", 0)
    return request.param


PARTS = ["rows", "index.coarse", "index.fine", "index.center", "index.sq_norms"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("use", ["mean", "dense", "index", "save", "subset"])
@pytest.mark.one_of(4)
def test_one_changed_bit_is_found(file, when, part, use) -> None:
    tensors, metadata = contents(file)
    TrainingSet(file)[:2]
    flat = tensors[part].view(torch.uint8).reshape(-1)
    flat[len(flat) * 5 // 7] ^= 1
    save_file(tensors, file, metadata)
    x = torch.randn(2, 3, 8, 8)

    def run() -> None:
        data = TrainingSet(file)
        assert when == "at first use"
        if use in ("mean", "dense"):
            posterior(x, data, 0.3, method="auto" if use == "mean" else "dense")
        elif use == "index":
            data.index  # noqa: B018
        elif use == "save":
            data.save(file.with_name("b.safetensors"))
        else:
            data.subset([1, 2])

    with pytest.raises(
        ValueError, match=r"index.*(damaged|does not belong).*load with index=False"
    ):
        run()
    TrainingSet(file, index=False)


def test_a_changed_description_is_found(file) -> None:
    tensors, metadata = contents(file)
    described = json.loads(metadata["index"])
    for name, value in (("y_max", 1.0), ("row_error", 0.0), ("checksums", {}), ("checksum", "0")):
        other = metadata | {"index": json.dumps(described | {name: value})}
        save_file(tensors, file, other)
        with pytest.raises(ValueError, match="index"):
            TrainingSet(file)


def test_what_is_whole_is_read(file, when) -> None:
    data = TrainingSet(file)
    assert data.index is not None and data.index.dims == (16, 64)
    part = data.subset(slice(3, 500))
    part.save(file.with_name("b.safetensors"))
    assert torch.equal(TrainingSet(file.with_name("b.safetensors")).index.coarse, part.index.coarse)


def test_a_checksum_is_of_bytes_type_and_shape() -> None:
    value = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))  # several parts
    marks = {checksum(v) for v in (value, value.reshape(2, -1), value.view(torch.int32))}
    other = value.clone()
    other[-1] += 1
    assert len(marks | {checksum(other)}) == 4 and checksum(value.clone()) in marks
    assert checksum(value[::2]) == checksum(value[::2].clone())
    assert checksum(value[:0]) == checksum(value[:0])
