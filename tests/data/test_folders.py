"""Folders of pictures as rows: their order, their classes, and what is refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from memokern import TrainingSet
from memokern.data import folders

pytestmark = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is missing")


def draw(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> None:
    """A picture, wide x high, whose pixels are value, value + 1, ... row by row."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    pixels = (np.arange(np.prod(shape)) + value).astype(np.uint8).reshape(shape)
    Image.fromarray(pixels, mode if mode in ("RGB", "RGBA", "L") else None).convert(mode).save(path)


def test_pictures_come_in_the_order_of_their_names(tmp_path) -> None:
    for i, name in enumerate(("b.png", "a.PNG", "B.png", "10.png", "9.png")):
        draw(tmp_path / name, 40 * i)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    data = TrainingSet(tmp_path)
    assert (data.n, data.shape, data.dtype, data.labels) == (5, (3, 4, 5), torch.uint8, None)
    assert data.name == tmp_path.name
    # Upper case before lower case, and no numbers: as Python sorts.
    assert data.rows[:, 0].tolist() == [120, 160, 80, 40, 0]
    plain = torch.arange(60, dtype=torch.uint8).reshape(4, 5, 3).permute(2, 0, 1)
    assert torch.equal(data.rows[4].reshape(3, 4, 5), plain)
    with torch.device("meta"):  # which stands for an accelerator
        assert torch.equal(TrainingSet(tmp_path).rows, data.rows)
    assert data[4].amin() == -1  # pixels are in [-1, 1]


@pytest.mark.parametrize("given", [str, Path, lambda path: f"{path}/"])
def test_folders_are_classes(tmp_path, given) -> None:
    """The files, their order and their numbers are those of torchvision's ImageFolder."""
    for i, name in enumerate(("dog/z.png", "dog/y/a.png", "cat/1.png", "cat/0.png", "Ant/2.png")):
        draw(tmp_path / name, 50 * i, "L")
    (tmp_path / ".cache").mkdir()
    data = TrainingSet(given(tmp_path))
    assert data.shape == (4, 5)
    assert data.labels is not None and data.labels.tolist() == [0, 1, 1, 2, 2]
    # Ant/2, cat/0, cat/1, dog/z, dog/y/a
    assert data.rows[:, 0].tolist() == [200, 150, 100, 0, 50]
    assert data.where(1).n == 2
    other = TrainingSet(given(tmp_path), labels=[4, 3, 2, 1, 0])
    assert other.labels is not None and other.labels.tolist() == [4, 3, 2, 1, 0]


def test_jpegs_are_read(tmp_path) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 7).save(tmp_path / "a.jpg", quality=100)
    Image.new("L", (8, 8), 200).save(tmp_path / "b.JPEG", "JPEG", quality=100)
    rows, _ = folders.read_folder(tmp_path)
    assert rows[:, 0, 0].tolist() == [7, 200]


BAD = {
    "sizes": (
        [("a.png", "RGB", (5, 4)), ("b.png", "RGB", (4, 5))],
        r"a.png' is RGB, 4 x 5, .*b.png",
    ),
    "kinds": ([("a.png", "RGB", (5, 4)), ("b.png", "L", (5, 4))], r"b.png' is grey, 4 x 5"),
    "transparent": ([("a.png", "RGBA", (5, 4))], r"a.png' is of Pillow's mode 'RGBA'"),
    "palette": ([("a.png", "P", (5, 4))], r"a.png' is of Pillow's mode 'P'"),
    "mixed": ([("a.png", "L", (5, 4)), ("x/b.png", "L", (5, 4))], "beside folders of pictures"),
    "other": ([("a.png", "L", (5, 4)), ("b.bmp", "L", (5, 4))], r"b.bmp' is neither PNG nor JPEG"),
    "nothing": ([], "holds no pictures"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused_is_named(tmp_path, kind) -> None:
    pictures, message = BAD[kind]
    for name, mode, size in pictures:
        draw(tmp_path / name, 0, mode, size)
    with pytest.raises(ValueError, match=message):
        TrainingSet(tmp_path)


def test_damaged_pictures_and_empty_classes_are_named(tmp_path) -> None:
    draw(tmp_path / "one" / "a.png")
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match=r"the class 'two' in .* has no pictures"):
        TrainingSet(tmp_path)
    whole = (tmp_path / "one" / "a.png").read_bytes()
    (tmp_path / "two" / "b.png").write_bytes(whole[:45])
    with pytest.raises(ValueError, match=r"two.b.png' cannot be read"):
        TrainingSet(tmp_path)


def test_what_is_for_files_is_refused(tmp_path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a folder"):
        TrainingSet(tmp_path, key="rows")
    with pytest.raises(ValueError, match="channels first"):
        TrainingSet(tmp_path, layout="hwc")


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    draw(tmp_path / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'memokern\[images\]'"):
        TrainingSet(tmp_path)
