"""Folders of files of rows: the parts of one training set, all of them or none."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.safetensors")


def name(part: int, count: int) -> str:
    """The name of one part of so many.

    Example:
        >>> from memokern.data.parts import name
        >>> name(0, 4)
        'part-00000-of-00004.safetensors'
    """
    return f"part-{part:05d}-of-{count:05d}.safetensors"


def of_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of rows in a folder, by their names.

    Raises: ValueError where parts that say how many they are are not all there, or others are.
    """
    found = sorted(p for p in Path(folder).iterdir() if p.suffix in (".npy", ".safetensors"))
    counts = {int(match[2]) for p in found if (match := _NAME.fullmatch(p.name))}
    for count in counts:
        expected = [name(part, count) for part in range(count)]
        if [p.name for p in found] != expected:
            there = [p.name for p in found]
            raise ValueError(
                f"{str(folder)!r}: expected {expected[0]} to {expected[-1]} and no other rows, got"
                f" {len(there)} files, {there[0]} to {there[-1]}: copy what is missing, or write"
                " the folder anew"
            )
    return found


def require_replaceable(folder: Path) -> None:
    """FileExistsError for a path that has anything but parts, which new ones may replace."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {str(folder.parent)!r}; make it first")
    if not folder.exists():
        return
    if not folder.is_dir() or any(not _NAME.fullmatch(p.name) for p in folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} has something else than parts: choose another")


def clear(folder: Path) -> None:
    """Removes what a save that was killed left."""
    if folder.is_dir():
        shutil.rmtree(folder)


def put_in_place(partial: Path, folder: Path) -> None:
    """Gives the folder of new parts its name; that of old ones goes."""
    old = folder.with_name(f".{folder.name}.old")
    clear(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    clear(old)
