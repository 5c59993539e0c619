"""Tensors that are files mapped into memory, of which the system may forget what was read."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

from torch import Tensor


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
                if low <= start and end <= high:
                    return inode != "0"
    except (OSError, ValueError):
        return False
    return False


def forget(tensor: Tensor) -> None:
    """Takes what was read of a mapped file out of this process's memory; it is read anew when it is
    needed. The tensor must be one for which `is_file` holds, or a part of it."""
    call, page = _madvise(), mmap.PAGESIZE
    flag = getattr(mmap, "MADV_DONTNEED", None)
    if call is None or flag is None:
        return
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    start, end = start - start % page, end - end % page
    if end > start:
        call(start, end - start, flag)
