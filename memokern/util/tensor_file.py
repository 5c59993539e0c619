"""The bytes of a `.safetensors` file, written piece by piece: of tensors in memory, of mapped ones,
and of such as are never in memory as a whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from memokern.util.mapped import forget, is_file

# How the format calls them.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WRITTEN_BYTES = 1 << 24  # at once


class Stream(NamedTuple):
    """A tensor that is written piece by piece. chunks: gives its pieces [n, ...], in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterable[torch.Tensor]]


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor | Stream], metadata: Mapping[str, str]
) -> None:
    """Writes named tensors and string metadata.

    Raises: ValueError for a type that the format lacks, and for a stream of another length.
    """
    # As the library has them: by the size of a number, the largest first, and then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if dtype not in NAMES:
            raise ValueError(f"tensor {name!r}: .safetensors has no type for {dtype}")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        wrote = sum(file.write(part) for part in _bytes_of(tensors[name]))
        low, high = header[name]["data_offsets"]
        if wrote != high - low:
            raise ValueError(f"tensor {name!r}: expected {high - low} bytes, got {wrote}")


def _bytes_of(tensor: torch.Tensor | Stream) -> Iterator[memoryview]:
    """The numbers of a tensor in memory, a mapped or a streamed one, piece by piece."""
    if isinstance(tensor, Stream):
        for chunk in tensor.chunks():
            yield from _bytes_of(chunk)
        return
    flat = tensor.detach().contiguous().reshape(-1)
    file = flat.nbytes > WRITTEN_BYTES and is_file(flat)
    for part in flat.split(WRITTEN_BYTES // flat.element_size()) if flat.numel() else ():
        yield memoryview(part.cpu().view(torch.uint8).numpy())
        if file:
            forget(part)
