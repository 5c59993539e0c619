"""Reading and writing files of arrays.

Readers map the file into memory where its format allows that, and refuse what could run code
(object arrays, pickles). Writers go through :func:`memokern.util.writing.atomic`: whoever reads the
target sees the old file or the complete new one.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from memokern.util.tensor_file import Stream, write_tensors
from memokern.util.writing import atomic

# Up to so many bytes, a member of an .npz is compared with its checksum before it is mapped.
CHECKED_BYTES = 1 << 28
FORMATS = (".npy", ".npz", ".safetensors")
# Where a file has several arrays and none is asked for by name, the first of these names is read.
USUAL_KEYS = ("rows", "images", "samples", "data", "x", "arr_0")


# --- reading ----------------------------------------------------------------------------------


class Pinned(NamedTuple):
    """A file: its name, for messages, and where to open it."""

    path: Path
    at: Path


@contextlib.contextmanager
def pinned(path: str | os.PathLike[str]) -> Iterator[Pinned]:
    """The file that is there now, for several reads, also where another takes its place meanwhile.
    Where the system has no names for open files, as Linux has, each read opens the path.

    Errors: as `read_tensor`.
    """
    path = _existing(path).path
    try:
        handle = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    with handle:
        own = Path(f"/proc/self/fd/{handle.fileno()}")
        yield Pinned(path, own if own.exists() else path)


def read_tensor(path: str | os.PathLike[str] | Pinned, key: str | None = None) -> torch.Tensor:
    """One array of a `.npy`, `.npz` or `.safetensors` file as a CPU tensor.

    Args:
        path: the file. `.npy` and `.safetensors` are memory-mapped copy-on-write: nothing is read
            until it is used, and writing to the tensor changes neither the file nor other
            processes. The members of an uncompressed `.npz` that happen to be aligned to their item
            size (uint8 always is) are mapped too, after their checksum was compared; those above
            256 MiB without; others are read. Nobody may cut a mapped file short while it is in use:
            the system then ends the process (SIGBUS). To put another file in its place, as the
            writers here do, is safe.
        key: which array of an `.npz` or `.safetensors`. By default the only one, or the first of
            "rows", "images", "samples", "data", "x", "arr_0" that the file has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a damaged file, pickled contents, an unknown or ambiguous key.
        TypeError: an array of strings, records, or another type that a tensor cannot hold.

    Example:
        >>> import tempfile, os, numpy as np
        >>> from memokern.data.files import read_tensor, write_npz
        >>> path = os.path.join(tempfile.mkdtemp(), "a.npz")
        >>> write_npz(path, rows=np.arange(6.0).reshape(3, 2))
        >>> read_tensor(path).shape
        torch.Size([3, 2])
    """
    file = _existing(path)
    if file.path.suffix.lower() == ".safetensors":
        with _safetensors(file) as opened:
            return opened.get_tensor(_choose(file.path, list(opened.keys()), key))
    return as_tensor(_read_numpy(file, key), str(file.path))


def read_array(path: str | os.PathLike[str] | Pinned, key: str | None = None) -> np.ndarray:
    """As `read_tensor`, but a numpy array; TypeError for bfloat16, which numpy lacks."""
    file = _existing(path)
    if file.path.suffix.lower() != ".safetensors":
        return _read_numpy(file, key)
    return _to_numpy(read_tensor(file, key), file.path)


def read_table(path: str | os.PathLike[str] | Pinned) -> dict[str, np.ndarray]:
    """All arrays of a file by name; the array of a `.npy` is "arr_0". Errors as `read_array`."""
    file = _existing(path)
    suffix = file.path.suffix.lower()
    if suffix == ".safetensors":
        with _safetensors(file) as opened:
            names = list(opened.keys())
            return {key: _to_numpy(opened.get_tensor(key), file.path) for key in names}
    if suffix == ".npz":
        with _zip(file) as archive:
            return {key: _read_member(file, archive, key) for key in _members(archive)}
    return {"arr_0": _read_numpy(file, None)}


def keys(path: str | os.PathLike[str] | Pinned) -> list[str]:
    """The names of the arrays in a file; [] for a `.npy`, whose one array has no name."""
    file = _existing(path)
    if file.path.suffix.lower() == ".safetensors":
        with _safetensors(file) as opened:
            return list(opened.keys())
    if file.path.suffix.lower() == ".npz":
        with _zip(file) as archive:
            return _members(archive)
    return []


def read_metadata(path: str | os.PathLike[str] | Pinned) -> dict[str, str]:
    """The string metadata of a `.safetensors` file; {} for the other formats, which carry none."""
    file = _existing(path)
    if file.path.suffix.lower() != ".safetensors":
        return {}
    with _safetensors(file) as opened:
        return dict(opened.metadata() or {})


def as_tensor(array: np.ndarray, what: str = "array") -> torch.Tensor:
    """A tensor that shares the memory of a numpy array. It is a copy only where strides are
    negative or the bytes are in the other order.

    The memory of a read-only array is shared too, so do not write to the tensor. torch.from_numpy
    would warn of such an array; it does not of a view taken through the array interface.
    """
    if array.dtype.hasobject:
        raise ValueError(_pickled(what))
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask a tensor loses: fill or drop first")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = np.asarray(_Shared(array))
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise TypeError(
            f"{what} has dtype {array.dtype}; expected a number type that torch "
            "has, such as float32 or uint8: convert it with .astype()"
        ) from None


class _Shared:
    """The memory of a read-only array, offered as writable; keeps the array alive."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _existing(path: str | os.PathLike[str] | Pinned) -> Pinned:
    """A file that is there and has a suffix that can be read."""
    if isinstance(path, Pinned):
        return path
    path = Path(path)
    if not path.suffix and not path.exists():  # it may have been meant as a folder
        raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    if path.suffix.lower() not in FORMATS:
        hint = (
            ": memokern never loads pickles, which can run code; "
            "save the tensor with safetensors.torch.save_file"
            if path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
            else ""
        )
        raise ValueError(f"expected a file ending in {', '.join(FORMATS)}, got {str(path)!r}{hint}")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    return Pinned(path, path)


@contextlib.contextmanager
def _safetensors(file: Pinned) -> Iterator[Any]:
    try:
        handle = safetensors.safe_open(file.at, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file.path)!r} is not a valid .safetensors file ({error})"
        ) from error
    with handle as opened:
        yield opened


@contextlib.contextmanager
def _zip(file: Pinned) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(file.at)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(
            f"{str(file.path)!r} is not a valid .npz file ({error}): write it with np.savez"
        ) from error
    with archive:
        yield archive


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name[:-4] for name in archive.namelist() if name.endswith(".npy")]


def _choose(path: Path, known: list[str], key: str | None) -> str:
    """The name of the array asked for, or of the one to read where none is asked for."""
    if key is not None:
        if key in known:
            return key
        raise ValueError(f"{str(path)!r} has no array {key!r}; it has {known}")
    if len(known) == 1:
        return known[0]
    for usual in USUAL_KEYS:
        if usual in known:
            return usual
    raise ValueError(f"{str(path)!r} holds the arrays {known}: say which with key=")


def _read_numpy(file: Pinned, key: str | None) -> np.ndarray:
    if file.path.suffix.lower() == ".npz":
        with _zip(file) as archive:
            return _read_member(file, archive, _choose(file.path, _members(archive), key))
    if key is not None:
        raise ValueError(
            f"{str(file.path)!r} holds one array without a name: leave out key={key!r}"
        )
    with open(file.at, "rb") as opened:
        if opened.read(6) != np.lib.format.MAGIC_PREFIX:
            raise ValueError(
                f"{str(file.path)!r} is not a valid .npy file: write it with np.save(path, array)"
            )
    return _guarded(file.path, lambda: np.load(file.at, mmap_mode="c", allow_pickle=False))


def _read_member(file: Pinned, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    info = archive.getinfo(key + ".npy")

    def read() -> np.ndarray:
        if info.compress_type == zipfile.ZIP_STORED:
            mapped = _map_member(file.at, info)
            if mapped is not None:
                if info.file_size <= CHECKED_BYTES:
                    _compare_checksum(archive, info)
                return mapped
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    return _guarded(file.path, read)


def _compare_checksum(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raises BadZipFile where a member's bytes are not those that were written."""
    with archive.open(info) as member:
        while member.read(1 << 24):
            pass


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray | None:
    """The stored (uncompressed) member as a copy-on-write map, or None where it is not aligned."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        # The central directory may state other lengths than the local header, which is the one
        # here.
        name, extra = struct.unpack("<HH", header[26:30])
        file.seek(info.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            return None
        offset = file.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or size == 0 or offset % dtype.alignment:
        return None
    if offset + size > info.header_offset + 30 + name + extra + info.file_size:
        raise ValueError("the array is cut short")
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape, order=order)


def _guarded(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` returns; ValueError with the path for whatever numpy raises."""
    try:
        with np.errstate(over="ignore"):  # of sizes in a damaged header, which is refused
            return read()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises almost anything, such as a TokenError
        # These are numpy's words for an object array that is read, and for one that is mapped.
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(_pickled(repr(str(path)))) from None
        raise ValueError(f"{str(path)!r} cannot be read ({error})") from error


def _pickled(what: str) -> str:
    return (
        f"{what} holds Python objects (a pickle), which memokern never loads because it can run "
        "code: save one array of numbers, with all rows of the same shape"
    )


def _to_numpy(tensor: torch.Tensor, path: Path) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{str(path)!r} holds bfloat16, which numpy lacks: use read_tensor")
    return tensor.numpy()


# --- writing ----------------------------------------------------------------------------------


def write_npz(path: str | os.PathLike[str], **arrays: np.ndarray | torch.Tensor) -> None:
    """Write named arrays as a compressed `.npz`; equal arrays give equal bytes.

    Raises ValueError for another suffix or an array of Python objects, and as `atomic`.
    """
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"expected a path ending in .npz, got {str(path)!r}")
    plain = {}
    for key, value in arrays.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        plain[key] = np.asarray(value)
        if plain[key].dtype.hasobject:
            raise ValueError(f"array {key!r}: expected numbers, rows of one shape; got objects")
    with atomic(path) as temporary:
        np.savez_compressed(temporary, **plain)  # type: ignore[arg-type]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | Stream],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named tensors and string metadata as `.safetensors`, piece by piece, so that what is
    mapped or streamed is never in memory as a whole.

    Raises ValueError for another suffix, and as `atomic`.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise ValueError(f"expected a path ending in .safetensors, got {str(path)!r}")
    with atomic(path) as temporary, open(temporary, "wb") as file:
        write_tensors(file, tensors, metadata or {})
