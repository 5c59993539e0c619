"""How long the sweep takes, by count: what decides between tiles, and between this backend and
another. Nothing here was measured on a GPU; only ratios matter.

A block streams its share of a tile of rows from memory while it works on the tile before: two
products, whose operands come from shared memory, two barriers of the cluster, and the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memokern.backends.cuda.core.machine import Machine
from memokern.backends.cuda.posterior.tiles import Tile, at_once, size_of, splits, terms_of, vectors


class Rates(NamedTuple):
    """Bytes of memory, operations of half-precision products by a warp group and by a warp: all
    per second."""

    memory: float
    group: float
    warp: float


# Data sheets: H100 SXM, HGX B200. Products that a warp asks for reach about 0.6 of a warp group's
# on an H100 (Luo et al., "Dissecting the NVIDIA Hopper architecture", arXiv 2402.13499), and are
# taken to run as fast on each multiprocessor of a B200.
RATES = {
    "sm_90a": Rates(3.35e12, 989e12, 600e12),
    "sm_100a": Rates(8.0e12, 2250e12, 670e12),
}
CLOCK = 1.75e9
SHARED = 128 * CLOCK  # bytes per second of a multiprocessor's shared memory
TILE = 1.2e-6  # seconds of a tile: barriers, sums over the cluster, exponentials
LATENCY = 0.8e-6  # from asking for rows to having them
LAUNCH = 2.5e-6  # from the end of a kernel to the start of the next
_WARPS = 8


def products(rows: torch.dtype) -> tuple[int, int]:
    """How many products of 16-bit numbers each of the two products takes. float32 rows are three
    terms, of which six pairs matter; weights are two terms."""
    return (6, 5) if rows == torch.float32 else (terms_of(rows), 2)


def tile_seconds(rows: torch.dtype, tile: Tile, rates: Rates, multiprocessors: int) -> float:
    """From a tile to the next in each of the blocks that share a multiprocessor, of which so many
    work side by side."""
    numbers, size = tile.rows * tile.features, size_of(rows)
    moved = numbers * size / (rates.memory / multiprocessors)
    # Rows are written once and read twice. The queries' terms, 512 bytes of 16 queries and 16
    # features, are read again for each group of 8 rows that a warp does not do at once.
    terms = 4 * terms_of(rows) * vectors(tile) / 16 / at_once(tile) * numbers
    parts = 8 * splits(tile) * vectors(tile) * tile.rows
    weights = _WARPS * 64 * tile.queries * tile.rows / 16
    shared = (terms + parts + weights + 3 * numbers * size) / SHARED
    first, second = products(rows)
    arithmetic = 2.0 * numbers * (vectors(tile) * first + tile.queries * second)
    busy = max(shared, arithmetic / (rates.warp / multiprocessors))
    # Blocks share what is moved and multiplied; each waits for its own rows and its own cluster.
    together = tile.resident * max(moved, busy)
    return max(together, (moved + LATENCY) / (tile.stages - 1), busy + TILE)


def row_seconds(rows: torch.dtype, tile: Tile) -> float:
    """Of a row, on a full H100: what a tile is chosen by."""
    return tile_seconds(rows, tile, RATES["sm_90a"], 132) / tile.rows / tile.resident


def clusters_of(tile: Tile, machine: Machine) -> int:
    """How many clusters sweep at a time."""
    return max(1, machine.multiprocessors * tile.resident // tile.cluster)


def part_bytes(tile: Tile, n: int, machine: Machine) -> float:
    """Of the clusters' parts: two arrays of float32 each, written and read again."""
    clusters = min(clusters_of(tile, machine), -(-n // tile.rows))
    return 16.0 * tile.queries * tile.cluster * tile.features * clusters


def sweep_seconds(
    rows: torch.dtype, tile: Tile, b: int, n: int, machine: Machine, rates: Rates | None = None
) -> float:
    """Of b queries and n rows, with the launches before and after, which join the parts. rates:
    those of the machine's architecture unless given."""
    clusters = clusters_of(tile, machine)
    rates, all_tiles = rates or RATES[machine.arch], -(-n // tile.rows)
    used = -(-clusters * tile.cluster // tile.resident)
    each = tile_seconds(rows, tile, rates, used)
    join = part_bytes(tile, n, machine) / rates.memory
    sweep = -(-all_tiles // clusters) * each
    # The backward sweep splits the gradients of the means too.
    return -(-b // tile.queries) * (sweep + join + (4 if tile.backward else 3) * LAUNCH)


def chunked_seconds(
    rows: torch.dtype, b: int, n: int, d: int, machine: Machine, backward: bool = False
) -> float:
    """Of the same in chunks of rows that stay in the L2 cache between two products by warp groups,
    each a launch: what is done for rows of any width without clusters."""
    rates, size = RATES[machine.arch], size_of(rows)
    fit = max(1, machine.l2_bytes // 2 // (d * size))
    chunk = max(64, min(2048, 1 << (fit.bit_length() - 1)))
    # Three products of tf32 run at half the rate.
    first, second = (6, 6) if rows == torch.float32 else products(rows)
    work = 2.0 * b * n * d / rates.group
    moved = float(n) * d * size / rates.memory
    again = 0.0 if chunk * d * size <= machine.l2_bytes else moved
    if backward:  # a product with the gradients of the means too, for which chunks are still there
        first *= 2
    launches = (4 if backward else 3) * -(-n // chunk) + 2
    return max(moved, work * first) + max(again, work * second) + launches * LAUNCH
