"""The rows of a call as the kernels take them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the device copies tiles by itself, given a descriptor: NVIDIA's, from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def stride_of(rows: Tensor) -> int:
    """Elements from a row to the next."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


class Rows:
    """The rows of a call as the kernels take them: contiguous features, their squared norms.

    described: whether they are read through a tensor descriptor, which wants their address and
    their stride in multiples of 16 bytes, and rows that do not overlap; else by pointers.
    """

    def __init__(self, rows: Tensor, sq_norms: Tensor, bias: Tensor | None) -> None:
        self.rows, self.sq_norms, self.bias = rows, sq_norms, bias
        self.n, self.d = rows.shape
        self.stride = stride_of(rows)
        step = self.stride * rows.element_size()
        self.described = (
            has_descriptors(rows.device) and rows.data_ptr() % 16 == 0 and step % 16 == 0
            and self.d <= self.stride and step < 2**40 and self.n < 2**31
        )  # fmt: skip
