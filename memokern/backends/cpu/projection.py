"""Queries in the coordinates of an index, by the compiled kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.cpu.native import ASKED, addresses, module, native_bounds, threads
from memokern.calls import LogitBounds

_F64 = torch.float64


class CosineProjection:
    """Float32 queries to the coordinates of an index whose basis is a cosine transform:
    `memokern.index.projection.Projected`, computed in one pass over the queries.

    Args:
        axes: C, H, W. channels_last: whether x is [H, W, C].
        turn: [C, C], down: [H, H], across: [W, W] float32, the transforms along the three axes.
        box: [C, 2] int64, how many frequencies down and across are computed of each channel.
        size: numbers of all boxes together, each [across, down], the latter padded to multiples of
            :meth:`side`. place: [M] int32, where in the boxes each coordinate is.
        kept: how many coordinates are handed out. edges: [bands + 1] int64, of the bands.
        center: [D] float32.
        bound_weights: [3, 4] float64, what |xc|, |alpha| and 1 count in four bounds: |xc| from
            above, |xc| from below, the error of the coordinates, the margin.
        largest: up to which |xc| no product overflows a float32.
    """

    def __init__(
        self,
        *,
        axes: tuple[int, int, int],
        channels_last: bool,
        turn: Tensor,
        down: Tensor,
        across: Tensor,
        box: Tensor,
        size: int,
        place: Tensor,
        kept: int,
        edges: Tensor,
        center: Tensor,
        bound_weights: Tensor,
        largest: float,
    ) -> None:
        self._kept, self._bands = kept, len(edges) - 1
        self._bounds_of: tuple[object, ...] = (None, None, None)
        self._bounds: tuple[Any, ...] = ()
        # The kernel has only the addresses.
        self._held = (turn, down, across, box, place, edges, center, bound_weights)
        # struct CosineTransform of csrc/include/memokern/abi.h
        self._native = (
            *axes, channels_last, *addresses((turn, down, across, box)), size, place.data_ptr(),
            len(place), kept, edges.data_ptr(), self._bands, center.data_ptr(),
            bound_weights.data_ptr(), largest,
        )  # fmt: skip

    @staticmethod
    def side() -> int:
        """To whose multiples the kernel pads a box."""
        return int(module().PROJECTION_SIDE)

    def native_bounds(self, bounds: LogitBounds) -> tuple[Any, ...]:
        """struct LogitBounds of the index that this projects to: what is the same in every call is
        made once."""
        index = (bounds.coarse, bounds.fine, bounds.blocks)
        if any(a is not b for a, b in zip(self._bounds_of, index, strict=True)):
            self._bounds_of, self._bounds = index, native_bounds(bounds)
        asked = (bounds.eps, bounds.most_listed, bounds.reading)
        return (*self._bounds[: ASKED.start], *asked, *self._bounds[ASKED.stop :])

    @property
    def native(self) -> tuple[Any, ...]:
        """struct CosineTransform."""
        return self._native

    def __call__(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, norms, margin, sq of x [B, D] float32 with alpha [B] float64."""
        x, alpha, b = x.contiguous(), alpha.to(_F64).contiguous(), len(x)
        z, norms = x.new_empty(b, self._kept), x.new_empty(b, self._bands + 1)
        out = (z, norms, alpha.new_empty(b), alpha.new_empty(b))
        module().project(
            self._native, x.data_ptr(), alpha.data_ptr(), b, addresses(out),
            threads(),
        )  # fmt: skip
        return out
