"""What the launches of every operation have in common: the call's device, memory on it, and the
types that there are kernels for."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from memokern.backends.cuda.core import driver, machine
from memokern.backends.cuda.core.variant import ROW_CODES, Variant
from memokern.calls import Rows
from memokern.calls.checks import check_rows, name_of

_F32 = torch.float32
# Blocks that share a list, or its sums: so many for each multiprocessor.
_BLOCKS_OF_ALL = 8


def check_types(x: Tensor, rows: Rows) -> None:
    """TypeError for what there are no kernels for; callers ask ``Cuda.refuses`` first."""
    check_rows(rows)
    if x.dtype != _F32 or rows.data.dtype not in ROW_CODES:
        known = ", ".join(name_of(t) for t in ROW_CODES)
        raise TypeError(
            f"the CUDA kernels take float32 queries and rows of {known}, not"
            f" {name_of(x.dtype)} and {name_of(rows.data.dtype)}"
        )


def stride_of(data: Tensor) -> int:
    """Elements from a row to the next."""
    return data.stride(0) if data.shape[0] > 1 else data.shape[1]


def largest(bias: Tensor | None, center: Tensor, sq_norms: Tensor) -> Tensor:
    """The largest |y - center|^2, |center|^2, and the largest |bias| that is not -inf: [3] float64
    on the device."""
    most = sq_norms.new_zeros(())
    if bias is not None:
        size = torch.where(torch.isneginf(bias), 0.0, bias.abs())
        most = torch.where(torch.isnan(size), torch.inf, size).max()
    return torch.stack([sq_norms.max(), center.to(torch.float64).square().sum(), most])


class DeviceCall:
    """A device, and what is launched on it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.machine = device, machine.of(device)

    def new(self, *shape: int, dtype: torch.dtype = _F32) -> Tensor:
        """Memory on the device, of PyTorch's allocator."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(
        self, variant: Variant, entry: str, grid: tuple[int, int], argument: ctypes.Structure,
        shared: int = 0,
    ) -> None:  # fmt: skip
        """Run a kernel of the variant on the current stream."""
        found = driver.kernel(variant, entry, self.machine.arch, self.device)
        driver.launch(found, grid, shared, argument, self.device)

    def parts(self, each: int, most: int) -> int:
        """Blocks for each of so many lists of at most so many steps: enough for the device."""
        return max(1, min(_BLOCKS_OF_ALL * self.machine.multiprocessors // max(1, each), most))
