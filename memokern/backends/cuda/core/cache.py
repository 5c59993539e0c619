"""Machine code on disk, so that a kernel is compiled once and not in every process.

An entry is one file: a line with the format, a line with the digest of what follows, and the cubin.
It is written beside its place and renamed, so that processes that compile the same kernel at once
each leave a whole file; what does not match its digest counts as missing, and is replaced.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from memokern.backends.cuda.core import compiler, sources
from memokern.backends.cuda.core.variant import Variant
from memokern.util import env, writing

FORMAT = b"memokern cubin 1\n"
SUFFIX = ".cubin"


def folder() -> Path:
    """Where MEMOKERN_CUDA_CACHE says, else memokern/cuda in the user's cache folder."""
    named = env.cuda_cache()
    if named is not None:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memokern" / "cuda"


def key(variant: Variant, arch: str) -> str:
    """The file's name: all that the machine code depends on, of which a reader learns the
    program and the architecture."""
    parts = (
        sources.digest(), variant.program, variant.macros, arch, compiler.STANDARD,
        compiler.version(),
    )  # fmt: skip
    found = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
    program = re.sub(r"\W+", "-", variant.program.rsplit("/", 1)[-1].removesuffix(".cu"))
    return f"{program}.{arch}.{found}{SUFFIX}"


def packed(code: bytes) -> bytes:
    """The content of an entry."""
    return FORMAT + hashlib.sha256(code).hexdigest().encode() + b"\n" + code


def unpacked(content: bytes) -> bytes | None:
    """The machine code of an entry, or None where it is damaged or of another format.

    >>> unpacked(packed(b"code")), unpacked(packed(b"code")[:-1]), unpacked(b"")
    (b'code', None, None)
    """
    if not content.startswith(FORMAT):
        return None
    said, _, code = content[len(FORMAT) :].partition(b"\n")
    return code if hashlib.sha256(code).hexdigest().encode() == said else None


def read(path: Path) -> bytes | None:
    """The machine code in a file, or None where there is none that is whole."""
    try:
        return unpacked(path.read_bytes())
    except OSError:
        return None


def machine_code(variant: Variant, arch: str) -> bytes:
    """The cubin of a variant: from the cache, else compiled, and kept there if the folder can be
    written."""
    path = folder() / key(variant, arch)
    code = read(path)
    if code is None:
        code = compiler.compile_variant(variant, arch).code
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writing.write_bytes(path, packed(code))
        except (OSError, ValueError) as error:
            _tell(path.parent, str(error))
    return code


@functools.cache
def _tell(folder: Path, error: str) -> None:
    """Once for a folder and what is wrong with it."""
    warnings.warn(
        f"{folder} cannot be written ({error}): CUDA kernels are compiled anew in each process."
        f" {env.CUDA_CACHE} names another folder",
        RuntimeWarning,
        stacklevel=3,
    )


class Kept(NamedTuple):
    """What a folder holds: how many kernels for each architecture, and their bytes."""

    kernels: dict[str, int]
    bytes: int


def kept(folder: Path) -> Kept:
    """Of a folder, by the names of its files alone; nothing where there is none."""
    kernels: dict[str, int] = {}
    total = 0
    try:
        entries = [e for e in os.scandir(folder) if e.name.endswith(SUFFIX)]
        sizes = [e.stat().st_size for e in entries]
    except OSError:
        return Kept({}, 0)
    for entry, size in zip(entries, sizes, strict=True):
        parts = entry.name.split(".")
        if len(parts) == 4 and parts[0]:  # else it is being written
            kernels[parts[1]] = kernels.get(parts[1], 0) + 1
            total += size
    return Kept(dict(sorted(kernels.items())), total)


def writable(folder: Path) -> bool:
    """Whether entries can be kept there: in the folder, or in the first above it that exists."""
    for found in (folder, *folder.parents):
        if found.exists():
            return found.is_dir() and os.access(found, os.W_OK | os.X_OK)
    return False
