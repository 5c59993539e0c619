"""Queries in the coordinates of an index, by the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cpu.native import module

_F64 = torch.float64


class CosineProjection:
    """Float32 queries to the coordinates of an index whose basis is a cosine transform:
    `memokern.index.projection.Projected`, computed in one pass over the queries.

    Args: tensors as `csrc/kernels.h` names them; sizes of the axes (C, H, W).
    """

    SIDE = 16  # to whose multiples the kernel pads a box

    def __init__(
        self, *, axes: tuple[int, int, int], channels_last: bool, turn: Tensor, down: Tensor,
        across: Tensor, box: Tensor, size: int, place: Tensor, kept: int, edges: Tensor,
        center: Tensor, worth: Tensor, largest: float,
    ) -> None:  # fmt: skip
        self._held = (turn, down, across, box, place, edges, center, worth)
        self._kept, self._bands = kept, len(edges) - 1
        self._basis = module().Cosine(
            *axes, channels_last, turn.data_ptr(), down.data_ptr(), across.data_ptr(),
            box.data_ptr(), size, place.data_ptr(), len(place), kept, edges.data_ptr(),
            self._bands, center.data_ptr(), worth.data_ptr(), largest,
        )  # fmt: skip

    def __call__(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, norms, margin, sq of x [B, D] float32 with alpha [B] float64."""
        x, alpha, b = x.contiguous(), alpha.to(_F64).contiguous(), len(x)
        z, norms = x.new_empty(b, self._kept), x.new_empty(b, self._bands + 1)
        margin, sq = alpha.new_empty(b), alpha.new_empty(b)
        module().project(
            self._basis, x.data_ptr(), alpha.data_ptr(), b, torch.get_num_threads(),
            z.data_ptr(), norms.data_ptr(), margin.data_ptr(), sq.data_ptr(),
        )  # fmt: skip
        return z, norms, margin, sq
