"""Where the kernels' sources are: the package data of an installed memokern, or csrc/cuda of a
checkout, from which it is installed in place."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cuh", ".cu")
_PACKAGED = Path(__file__).resolve().parent.parent / "sources"
_CHECKOUT = Path(__file__).resolve().parents[4] / "csrc" / "cuda"


def folder() -> Path:
    """The root that programs are named from and that they include from."""
    return _PACKAGED if _PACKAGED.is_dir() or not _CHECKOUT.is_dir() else _CHECKOUT


def missing() -> str | None:
    """Why there are none, in one line, or None."""
    if any(folder().rglob("*.cu")):
        return None
    return f"the kernels' sources are not in {folder()}: install memokern anew"


def files(root: Path) -> list[str]:
    """The sources below a root, by their paths from it, in order."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in SUFFIXES)


@functools.cache
def digest() -> str:
    """Of every source: a program includes most of them, and all change together."""
    root, found = folder(), hashlib.sha256()
    for path in files(root):
        content = (root / path).read_bytes()
        found.update(f"{path} {len(content)}\n".encode() + content)
    return found.hexdigest()
