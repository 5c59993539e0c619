"""What the tests of TrainingSet share: rows of every type that is stored, and how much memory
a call takes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def rows_of(dtype: torch.dtype, n: int = 37, shape: tuple[int, ...] = (2, 3, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return (torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 3).to(dtype)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made outside the memory of `rows`."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() != self.rows
            ):
                self.elements = max(self.elements, tensor.numel())
        return made
