"""The values that stored rows stand for: one definition for all that reads rows."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantized(stored: Tensor, scale: float, shift: float) -> Tensor:
    """stored * scale + shift in float64 for float64, else in float32, each operation rounded.

    A float32 query that was computed so is at distance exactly 0 from its row: kernels use these
    values wherever a row is evaluated by direct differences, and bounds allow for their rounding.
    """
    kind = torch.float64 if stored.dtype == torch.float64 else torch.float32
    value = stored.to(kind)
    return value if (scale, shift) == (1.0, 0.0) else value * scale + shift
