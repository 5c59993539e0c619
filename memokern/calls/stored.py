"""Rows as kernels read them that take them into products as they are stored: on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.calls.arguments import Rows
from memokern.calls.values import dequantized

_SAMPLE = 64  # rows whose median is the center where none is given


def sharp(rows: Rows) -> Rows:
    """The rows as products may read them. Their numbers enter products as they are stored, which
    costs digits where a scale and a shift cancel: except for plain rows and the usual uint8, they
    are written out as float32 values, a copy of all rows in each call."""
    plain = rows.scale == 1.0 and rows.shift == 0.0
    if plain or (rows.data.dtype == torch.uint8 and abs(rows.shift) <= 257 * abs(rows.scale)):
        return rows
    data = dequantized(rows.data, rows.scale, rows.shift)
    return rows._replace(data=data, scale=1.0, shift=0.0)


def sample_center(rows: Rows) -> Tensor:
    """A center [D] float64 where the rows' owner keeps none: any is right, and the median of a few
    rows, which no far one moves, centres well."""
    step = max(1, rows.n // _SAMPLE)
    return rows.values(slice(None, _SAMPLE * step, step)).median(0).values


def lost_with_a_row(center: Tensor, sq_norms: Tensor) -> Tensor:
    """The center, NaN where the norm of a row is, so that every query is lost with that row: sums
    that compare logits would leave it out without a word."""
    return center + torch.where(sq_norms.amax().isnan(), torch.nan, 0.0)
