"""Folders of pictures as rows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg")
# Other pictures, which would be missed without a word.
_OTHERS = (".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MISSING = "reading pictures needs Pillow: pip install 'memokern[images]'"
# Pillow's names of what a picture holds, that are rows as they are.
_MODES = {"L": "grey", "RGB": "RGB"}


def read_folder(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The PNG and JPEG pictures in a folder as uint8 rows, and their labels.

    Args:
        path: a folder that holds pictures, in the order of their names; or folders of pictures,
            one for each class, as torchvision's ImageFolder has them: classes are numbered in the
            order of their names, and what lies deeper belongs to the class above. Names that begin
            with a dot are left out.

    Returns: rows [N, H, W] of grey pictures or [N, 3, H, W] of RGB ones, and labels [N] int64, or
    None without folders of classes.

    Raises:
        ValueError: no pictures; pictures of different sizes or kinds, of a kind other than grey and
            RGB, or damaged, with the file's name; pictures beside folders of pictures; a class
            without any; pictures that are neither PNG nor JPEG.
        RuntimeError: Pillow is missing.

    Numerics: pictures are read as they are stored, without turning them as EXIF data may ask.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> from memokern.data.folders import read_folder
        >>> folder = tempfile.mkdtemp()
        >>> for kind in ("cat", "dog"):
        ...     os.mkdir(os.path.join(folder, kind))
        ...     Image.new("RGB", (8, 6)).save(os.path.join(folder, kind, "a.png"))
        >>> rows, labels = read_folder(folder)
        >>> rows.shape, labels
        (torch.Size([2, 3, 6, 8]), tensor([0, 1]))
    """
    found, labels = _pictures(Path(path))
    if importlib.util.find_spec("PIL") is None:
        raise RuntimeError(MISSING)
    rows: torch.Tensor | None = None
    first = ""
    # The bar appears only when reading takes more than two seconds, and only on a terminal.
    for i, file in enumerate(
        tqdm(found, desc="reading pictures", delay=2, leave=False, disable=None)
    ):
        pixels, kind = _read(file)
        if rows is None:
            shape = (len(found), *pixels.shape)
            rows, first = torch.empty(shape, dtype=torch.uint8, device="cpu"), kind
        if kind != first:
            raise ValueError(
                f"expected all pictures to be alike: {str(found[0])!r} is {first}, "
                f"{str(file)!r} is {kind}"
            )
        rows[i] = torch.from_numpy(pixels)
    assert rows is not None  # there is a picture
    return rows, None if labels is None else torch.tensor(labels, device="cpu")


def names(path: str | os.PathLike[str]) -> list[str]:
    """The pictures of a folder as names below it, in the order in which :func:`read_folder` makes
    rows of them. Errors: as there, but that no picture is opened.

    Example:
        >>> import os, tempfile
        >>> from memokern.data.folders import names
        >>> folder = tempfile.mkdtemp()
        >>> for kind in ("cat", "dog"):
        ...     os.mkdir(os.path.join(folder, kind))
        ...     open(os.path.join(folder, kind, "a.png"), "w").close()
        >>> names(folder)
        ['cat/a.png', 'dog/a.png']
    """
    return [file.relative_to(path).as_posix() for file in _pictures(Path(path))[0]]


def _pictures(path: Path) -> tuple[list[Path], list[int] | None]:
    """The files in their order, and the class of each."""
    try:
        entries = sorted(e.name for e in os.scandir(path) if not e.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    here = _of(path, [name for name in entries if not (path / name).is_dir()])
    classes = [(name, _below(path / name)) for name in entries if (path / name).is_dir()]
    if here and any(files for _, files in classes):
        raise ValueError(
            f"{str(path)!r} holds pictures, such as {here[0].name!r}, beside folders of pictures: "
            "give one folder of pictures, or a folder for each class"
        )
    if here:
        return here, None
    found: list[Path] = []
    labels: list[int] = []
    for i, (name, files) in enumerate(classes):
        if not files:
            raise ValueError(f"the class {name!r} in {str(path)!r} has no pictures")
        found += files
        labels += [i] * len(files)
    if not found:
        raise ValueError(f"{str(path)!r} holds no pictures ({', '.join(SUFFIXES)})")
    return found, labels


def _below(path: Path) -> list[Path]:
    """The pictures of a class, folder by folder as os.walk sorts them in torchvision."""
    found = []
    for root, _, names in sorted(os.walk(path, followlinks=True)):
        found += _of(Path(root), sorted(names))
    return found


def _of(folder: Path, names: list[str]) -> list[Path]:
    """The pictures among the files of a folder."""
    found = []
    for name in names:
        suffix = Path(name).suffix.lower()
        if name.startswith("."):
            continue
        if suffix in _OTHERS:
            raise ValueError(f"{str(folder / name)!r} is neither PNG nor JPEG: convert it")
        if suffix in SUFFIXES:
            found.append(folder / name)
    return found


def _read(file: Path) -> tuple[np.ndarray[Any, Any], str]:
    """Pixels [H, W] or [3, H, W], and what the picture is, in words."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            mode, (wide, high) = picture.mode, picture.size
            if mode in _MODES:
                pixels = np.array(picture)
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"{str(file)!r} cannot be read ({error})") from error
    if mode not in _MODES:
        raise ValueError(
            f"{str(file)!r} is of Pillow's mode {mode!r}, expected grey ('L') or 'RGB': "
            "convert all pictures to one of these"
        )
    if pixels.ndim == 3:
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels, f"{_MODES[mode]}, {high} x {wide}"
