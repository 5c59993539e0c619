"""The ladder of bound_scan: dimensions of its levels, and the bands that they leave."""

from __future__ import annotations

import math

from torch import Tensor

# At most: the rounding that the bounds allow for (csrc/bounds-inl.h) is that of so many.
LEVELS = 16


def bands_of(coarse: Tensor, dims: list[int], first_band: list[int]) -> int:
    """The number of bands; ValueError unless these are a ladder."""
    if not 1 <= len(dims) <= LEVELS or len(first_band) != len(dims):
        raise ValueError(
            f"dims must have 1 to {LEVELS} levels and first_band as many,"
            f" not {len(dims)} and {len(first_band)}"
        )
    bands = coarse.shape[-1] - dims[0] - 1
    ups = all(a < b for a, b in zip([0, *dims], dims, strict=False))
    in_order = all(a <= b for a, b in zip([0, *first_band], first_band, strict=False))
    if not ups or not in_order or first_band[0] != 0 or first_band[-1] > bands:
        raise ValueError(
            f"dims must increase from 1 and first_band from 0 to at most the {bands} bands of"
            f" coarse; got dims={dims}, first_band={first_band}"
        )
    return bands


def check_limits(rows: int, eps: float, cap: int) -> None:
    """ValueError unless eps is a share of the weight and lists may hold something."""
    if not 0 < eps < 1 or not math.isfinite(rows / eps):
        raise ValueError(f"eps must lie between 0 and 1, both excluded; got {eps}")
    if cap < 1 or rows >= 2**32:
        raise ValueError(f"cap must be at least 1 and rows below 2^32, not {cap} and {rows}")
