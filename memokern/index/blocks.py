"""The rows of an index in blocks of rows that lie near each other, each with the box that holds it.

All rows of a block can be excluded at once where a query is too far from its box: the proof is in
``docs/pruning.md``. The rows themselves, and what the index keeps of them, stay in their order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memokern.calls import Blocks
from memokern.calls.checks import (
    BLOCK_ROWS,
    BOX_COORDINATES,
    PANEL_BLOCKS,
    box_numbers,
    prepared_boxes,
    shaped,
)

# Rows that are split among blocks together, and numbers of them at a time: these stay in the cache.
UNIT = 64 * BLOCK_ROWS
AT_ONCE = 1 << 18
# With fewer rows, to read all of them takes no longer.
FEWEST = 1 << 10
# Rows that show which coordinate varies most.
SEEN = 1 << 12


class Layout(NamedTuple):
    """Which rows the blocks have, and the boxes: all of :class:`.Blocks` but what is a copy."""

    order: Tensor
    half: Tensor
    boxes: Tensor
    hulls: Tensor
    excess: float

    def blocks(self, coarse: Tensor) -> Blocks:
        """With the copy of the index's level 0, in the order of the blocks."""
        ordered = coarse.index_select(0, self.order)
        return Blocks(self.order, ordered, self.half, self.boxes, self.hulls, self.excess)

    def require_consistent(self, n: int, k0: int, bands: int) -> None:
        """ValueError unless it is one of n rows with such a level 0."""
        order, half, boxes, hulls, excess = self
        shaped("order", order, (n,), torch.int32)
        shaped("half", half, (n,), torch.float32)
        prepared_boxes(boxes, hulls, n, k0, bands)
        # A number beyond the rows would have the scan read whatever lies there.
        known = torch.zeros(n, dtype=torch.bool)
        within = bool(((order >= 0) & (order < n)).all())
        if not within or not bool(known.index_fill_(0, order.to(torch.int64), True).all()):
            raise ValueError("its blocks do not have every row once")
        if not 0 <= excess < math.inf:
            raise ValueError(f"its excess is {excess!r}")

    def half_by_row(self) -> Tensor:
        """`half` in the order of the rows."""
        return torch.empty_like(self.half).index_copy_(0, self.order.to(torch.int64), self.half)


def layout(coarse: Tensor, k0: int, half: Tensor, excess: float) -> Layout:
    """The blocks of rows whose k0 coordinates, band norms and pads are coarse [N, k0 + bands + 1].
    half: -|y - center|^2 / 2 of the rows [N] float32. excess: :func:`excess_of` these rows, or
    more.

    Rows are split at the median of the coordinate that varies most, again and again. Few
    coordinates differ within a block then, and its box is small in all of them.

    Cost: some 2 us for a row on one thread.
    """
    n, bands = len(coarse), coarse.shape[1] - k0 - 1
    order = _ordered(coarse[:, : min(k0, BOX_COORDINATES)].numpy())
    blocks = math.ceil(n / BLOCK_ROWS)
    panels = math.ceil(blocks / PANEL_BLOCKS)
    box = box_numbers(k0, bands)
    # Of what is no block: no query comes near.
    bounds = torch.full((2, panels * PANEL_BLOCKS, box), math.inf)
    step = BLOCK_ROWS * max(1, AT_ONCE // (BLOCK_ROWS * coarse.shape[1]))
    for start in range(0, n, step):
        at = order[start : start + step]
        rows = coarse.index_select(0, at)[:, :-1].to(torch.float64)
        short = -len(at) % BLOCK_ROWS  # the last block is filled up with its last row
        rows = torch.cat([rows, rows[-1:].expand(short, -1)])
        low, high = _boxes(rows.view(-1, BLOCK_ROWS, k0 + bands), k0)
        first = start // BLOCK_ROWS
        bounds[0, first : first + len(low)], bounds[1, first : first + len(low)] = low, high
    hulls = torch.full((2, math.ceil(panels / PANEL_BLOCKS) * PANEL_BLOCKS, box), math.inf)
    by_panel = bounds.view(2, panels, PANEL_BLOCKS, box)
    hulls[0, :panels] = by_panel[0].amin(1)
    hulls[1, :panels] = torch.where(by_panel[1].isinf(), -math.inf, by_panel[1]).amax(1)
    boxes, hulls = _side_by_side(bounds), _side_by_side(hulls)
    return Layout(order.to(torch.int32), half[order], boxes, hulls, excess)


def worth_layout(coarse: Tensor, k0: int, half: Tensor, excess: float) -> Layout | None:
    """The same, or None where nobody would use it: on other devices, or for few rows."""
    use = coarse.device.type == "cpu" and len(coarse) >= FEWEST
    return layout(coarse, k0, half, excess) if use else None


def excess_of(coarse: Tensor, sq_norms: Tensor) -> float:
    """The most that a row's coordinates and band norms, squared, exceed its sq_norms by."""
    excess, most = 0.0, float(sq_norms.max())
    step = max(1, AT_ONCE // coarse.shape[1])
    for rows, known in zip(coarse.split(step), sq_norms.split(step), strict=True):
        over = rows[:, :-1].to(torch.float64).square().sum(1) - known
        excess = max(excess, float(over.max()))
    # The sums are of as many squares as a row has numbers.
    return excess + 2.0**-51 * (coarse.shape[1] + 8) * (most + excess)


def _boxes(rows: Tensor, k0: int) -> tuple[Tensor, Tensor]:
    """The least and the largest numbers [m, box] float32 of blocks of rows [m, rows, k0 + bands]
    float64, whose numbers are float32's own."""
    single = min(k0, BOX_COORDINATES)
    low, high = rows.amin(1), rows.amax(1)
    if single < k0:
        others = torch.linalg.vector_norm(rows[..., single:k0], dim=2)
        # The norms are rounded, here and to float32, by less than this.
        down, up = others.amin(1) * (1 - 2.0**-22), others.amax(1) * (1 + 2.0**-22) + 2.0**-120
        low = torch.cat([low[:, :single], down[:, None], low[:, k0:]], 1)
        high = torch.cat([high[:, :single], up[:, None], high[:, k0:]], 1)
    return low.to(torch.float32), high.to(torch.float32)


def _side_by_side(bounds: Tensor) -> Tensor:
    """[2, count, box] as [count / PANEL_BLOCKS, box, 2, PANEL_BLOCKS]."""
    _, count, box = bounds.shape
    panels = bounds.view(2, count // PANEL_BLOCKS, PANEL_BLOCKS, box)
    return panels.permute(1, 3, 0, 2).contiguous()


def _ordered(values: np.ndarray) -> Tensor:
    """The numbers of the rows of values [N, K] float32, block by block. [N] int64."""
    n = len(values)
    order = np.arange(n)
    _split(values, order, UNIT)
    whole = n // UNIT * UNIT
    _split(values, order[whole:], BLOCK_ROWS)
    found = torch.from_numpy(order)
    rows, units = torch.from_numpy(values), found[:whole].view(-1, UNIT)
    for at in units.split(max(1, AT_ONCE // (UNIT * values.shape[1]))) if whole else ():
        at.copy_(_halved(rows, at))
    return found


def _split(values: np.ndarray, order: np.ndarray, size: int) -> None:
    """Orders rows, in place, so that parts of `size` of them lie near each other."""
    left = [(0, len(order))]
    while left:
        start, stop = left.pop()
        if stop - start <= size:
            continue
        cut = math.ceil((stop - start) / size) // 2 * size
        part = order[start:stop]
        axis = values[part[:: math.ceil(len(part) / SEEN)]].var(0).argmax()
        order[start:stop] = part[np.argpartition(values[part, axis], cut)]
        left += [(start, start + cut), (start + cut, stop)]


def _halved(rows: Tensor, units: Tensor) -> Tensor:
    """Rows [m, UNIT] of rows [N, K], each unit ordered so that its blocks lie near each other."""
    shape = units.shape
    order, values = units, rows[units]
    while values.shape[1] > BLOCK_ROWS:
        axis = values.var(1, correction=0).argmax(1)[:, None, None].expand(*values.shape[:2], 1)
        at = values.gather(2, axis)[..., 0].argsort(1)
        half = (2 * len(values), values.shape[1] // 2)
        order = order.gather(1, at).view(half)
        values = values.gather(1, at[..., None].expand_as(values)).reshape(*half, -1)
    return order.view(shape)
