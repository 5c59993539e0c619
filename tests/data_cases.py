"""What the tests of TrainingSet share: rows of every type that is stored."""

from __future__ import annotations

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def rows_of(dtype: torch.dtype, n: int = 37, shape: tuple[int, ...] = (2, 3, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return (torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 3).to(dtype)
