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


def _aligned(values: Tensor | None) -> Tensor | None:
    """The values at an address that is a multiple of 16."""
    return values if values is None or values.data_ptr() % 16 == 0 else values.clone()


class Rows:
    """The rows of a call as the kernels take them: contiguous features, their squared norms.

    unaligned: whether their features, their stride or their address is not in multiples of 16: they
    are read number by number. described: whether they are read through a tensor descriptor, which
    wants their address and their stride in multiples of 16 bytes, and rows that do not overlap;
    else by pointers.
    """

    def __init__(self, rows: Tensor, sq_norms: Tensor, bias: Tensor | None) -> None:
        # Rows stay where they are; all else can be moved to where kernels read it fast.
        self.rows, self.sq_norms, self.bias = rows, _aligned(sq_norms), _aligned(bias)
        self.n, self.d = rows.shape
        self.stride = stride_of(rows)
        self.unaligned = bool(self.d % 16 or self.stride % 16 or rows.data_ptr() % 16)
        step = self.stride * rows.element_size()
        self.described = (
            has_descriptors(rows.device) and rows.data_ptr() % 16 == 0 and step % 16 == 0
            and self.d <= self.stride and step < 2**40 and self.n < 2**31
        )  # fmt: skip
