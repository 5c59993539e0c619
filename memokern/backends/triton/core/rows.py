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


def stride_of(data: Tensor) -> int:
    """Elements from a row to the next."""
    return data.stride(0) if data.shape[0] > 1 else data.shape[1]


def _aligned(values: Tensor) -> Tensor:
    """The values at an address that is a multiple of 16."""
    return values if values.data_ptr() % 16 == 0 else values.clone()


class KernelRows:
    """The rows of a call as the kernels take them: each contiguous, with their squared norms about
    the center, and the bias.

    unaligned: whether their features, their stride or their address is not a multiple of 16; they
    are then read number by number. described: whether they are read through a tensor descriptor,
    which wants their address and their stride in multiples of 16 bytes, and rows that do not
    overlap; else they are read by pointers.
    """

    def __init__(self, data: Tensor, sq_norms: Tensor, bias: Tensor | None) -> None:
        # Rows stay where they are; all else can be moved to where kernels read it fast.
        self.data, self.sq_norms = data, _aligned(sq_norms)
        self.bias = None if bias is None else _aligned(bias)
        self.n, self.d = data.shape
        self.stride = stride_of(data)
        self.unaligned = bool(self.d % 16 or self.stride % 16 or data.data_ptr() % 16)
        step = self.stride * data.element_size()
        self.described = (
            has_descriptors(data.device) and data.data_ptr() % 16 == 0 and step % 16 == 0
            and self.d <= self.stride and step < 2**40 and self.n < 2**31
        )  # fmt: skip

    @property
    def has_bias(self) -> int:
        """1 or 0, as kernels take it."""
        return int(self.bias is not None)

    @property
    def bias_or_any(self) -> Tensor:
        """What a kernel gets as a bias: where there is none it reads nothing of it, and any array
        of the right type will do."""
        return self.sq_norms if self.bias is None else self.bias
