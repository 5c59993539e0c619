"""Tensors that are files mapped into memory: what the system reads of them, and may forget.

Where a page of a mapped file is missing, Linux reads what lies around it too: 128 kB as a rule, on
some machines 8 MB. That is right for a sweep. For single rows here and there it would read the
whole file many times over.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What `take` asks for at a time: enough to keep a disk busy, little beside a process's memory.
ASKED_BYTES = 1 << 24


@functools.cache
def _madvise() -> Any:
    """The system's function, or None where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def is_file(tensor: Tensor) -> bool:
    """Whether all of the tensor's memory is one mapping of a file. To forget any other memory would
    lose what is in it."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not tensor.is_contiguous():
        return False
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                where, _, _, _, inode, *_ = line.split(maxsplit=5)
                low, high = (int(v, 16) for v in where.split("-"))
                # The parts of a mapping that is used in several ways follow one another.
                if low <= start < high:
                    if inode == "0":
                        return False
                    start = high
                if end <= high:
                    return start >= end
    except (OSError, ValueError):
        return False
    return False


def forget(tensor: Tensor) -> None:
    """Takes what was read of a mapped file out of this process's memory; it is read anew when it is
    needed. The tensor must be one for which `is_file` holds, or a part of it."""
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    _advise("MADV_DONTNEED", start, end)


@contextlib.contextmanager
def at_random(tensor: Tensor) -> Iterator[None]:
    """While it is open, pages that are missing of a mapped file are read alone."""
    if tensor.device.type != "cpu":
        yield
        return
    start, end = _pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    _advise("MADV_RANDOM", start, end)
    try:
        yield
    finally:
        _advise("MADV_NORMAL", start, end)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows [k, D] with these numbers [k]. Of a mapped file no others are read, and many at a
    time: one after the other, each would wait for the disk."""
    out = rows.new_empty((len(index), *rows.shape[1:]))
    if not len(index):
        return out
    if rows.device.type != "cpu":
        return torch.index_select(rows, 0, index.to(rows.device), out=out)
    index = index.cpu()
    step = max(1, ASKED_BYTES // max(1, rows[0].numel() * rows.element_size()))
    parts, outs = index.split(step), out.split(step)
    with at_random(rows):
        ask_rows(rows, parts[0])
        for i, (part, to) in enumerate(zip(parts, outs, strict=True)):
            if i + 1 < len(parts):
                ask_rows(rows, parts[i + 1])
            torch.index_select(rows, 0, part, out=to)
    return out


def ask(part: Tensor) -> None:
    """Has the system begin to read a part of a mapped file."""
    if part.numel():
        start, end = _pages(part.data_ptr(), part.numel() * part.element_size())
        _advise("MADV_WILLNEED", start, end)


def ask_rows(rows: Tensor, index: Tensor) -> None:
    """The same for the rows with these numbers [k], and no others."""
    size = rows[0].numel() * rows.element_size()
    first = rows.data_ptr() + index.unique() * (rows.stride(0) * rows.element_size())
    begin = first.div(mmap.PAGESIZE, rounding_mode="floor")
    end = (first + size - 1).div(mmap.PAGESIZE, rounding_mode="floor") + 1
    # Rows whose pages touch are one piece.
    apart = torch.ones(len(first) + 1, dtype=torch.bool)
    apart[1:-1] = begin[1:] > end[:-1]
    pieces = zip(begin[apart[:-1]].tolist(), end[apart[1:]].tolist(), strict=True)
    for low, high in pieces:
        _advise("MADV_WILLNEED", low * mmap.PAGESIZE, high * mmap.PAGESIZE)


def _pages(start: int, size: int) -> tuple[int, int]:
    """Where the pages begin and end in which so many bytes lie."""
    page = mmap.PAGESIZE
    return start // page * page, -(-(start + size) // page) * page


def _advise(name: str, start: int, end: int) -> None:
    """Tells the system, where it can be told, how pages will be used."""
    call, flag = _madvise(), getattr(mmap, name, None)
    if call is not None and flag is not None and end > start:
        call(start, end - start, flag)
