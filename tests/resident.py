"""Which pages of a mapped file are in memory, as the system tells."""

import ctypes
import mmap
import os

import pytest
import torch

from memokern.util.mapped import forget


def pages_in_memory(rows: torch.Tensor) -> int:
    """How many pages of a mapped file's rows the system has in memory, whoever read them."""
    start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    count = -(-(rows.data_ptr() + rows.nbytes - start) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    call = ctypes.CDLL(None, use_errno=True).mincore
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert call(start, count * mmap.PAGESIZE, found) == 0
    return sum(one & 1 for one in found)


def forget_file(path, rows: torch.Tensor) -> None:
    """Takes the file whose rows are mapped out of the system's memory."""
    forget(rows)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(rows) > 2:
        pytest.skip("this file system keeps its files in memory")
