"""What a block of the sweep holds: rows, queries, features, and the shared memory for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

QUERIES = (16, 32, 64)  # those that a launch is compiled for
BACKWARD_QUERIES = (16,)  # of the backward sweep


class Tile(NamedTuple):
    """What a block of the sweep holds. cluster: C, blocks that own the features of a row together.
    features: DS, those of each. queries: Q, rows: NT, stages: tiles in shared memory. resident:
    blocks that share a multiprocessor, so that one multiplies while another waits for its
    cluster. backward: of the backward sweep, which multiplies rows by the gradients of the means
    too."""

    cluster: int
    features: int
    queries: int
    rows: int
    stages: int
    resident: int = 1
    backward: bool = False


# How rows are divided: blocks of a cluster, features of a block, and the most queries of a launch,
# beyond which there is nothing to gain by count. Machine code depends on all, so that there is a
# list. The last one serves where a cluster of 16 does not fit.
DIVISIONS = (
    (2, 256, 64), (4, 256, 64), (8, 256, 64), (8, 384, 32), (16, 192, 32), (16, 256, 32),
    (16, 768, 32), (16, 1536, 16), (8, 768, 16),
)  # fmt: skip
RESIDENT = (1, 2)
ROWS = (128, 64, 32, 16)
STAGES = (4, 3, 2)
# Registers of a thread's sums, of 255, or of 128 where two blocks share a multiprocessor: products,
# addresses and what is loaded take the rest.
_MOST_SUMS = {1: 96, 2: 32}
# Shared memory of a multiprocessor, of which each block takes 1 KiB for itself.
_SHARED_OF_ALL, _RESERVED = 228 << 10, 1 << 10
_WARPS = 8


def terms_of(rows: torch.dtype) -> int:
    """Terms that a query is split into for rows of this type."""
    return 3 if rows in (torch.float32, torch.bfloat16) else 2


def size_of(rows: torch.dtype) -> int:
    """Bytes of a stored number."""
    return int(rows.itemsize)


def holds_sums(features: int, queries: int, resident: int = 1) -> bool:
    """Whether a block's registers hold the sums of so many features and queries."""
    return -(-features // 128) * 8 * queries // 16 <= _MOST_SUMS[resident]


def room(shared: int, resident: int) -> int:
    """Bytes of shared memory for each of so many blocks of a multiprocessor. shared: what one block
    may use at most."""
    return min(shared, _SHARED_OF_ALL // resident - _RESERVED)


def vectors(tile: Tile) -> int:
    """What the first product multiplies rows by: queries, and gradients of their means."""
    return tile.queries * (2 if tile.backward else 1)


def at_once(tile: Tile) -> int:
    """Groups of 8 rows that a warp multiplies by the vectors' terms that it has read once."""
    most, groups = 4 if vectors(tile) == 16 else 2, tile.rows // 8
    return groups // 2 if groups < 2 * most else most


def splits(tile: Tile) -> int:
    """Parts of the features in the first product, so that all warps have work."""
    busy = tile.rows // 8 // at_once(tile)
    return _WARPS // busy if busy < _WARPS else 1


def shared_bytes(rows: torch.dtype, tile: Tile) -> int:
    """Dynamic shared memory of a block of the sweep, as csrc/cuda/sweep lays it out.

    >>> shared_bytes(torch.uint8, Tile(8, 384, 16, 64, 3))
    132864
    """
    c, ds, q, nt, stages, *_ = tile
    size = size_of(rows)
    pitch = ds * size + (0 if ds * size // 16 % 2 else 16)  # odd in units of 16: no bank conflicts
    own, both = -(-q // c), vectors(tile)
    # Of a query, and of a pair: what is kept, and what is evaluated by direct differences.
    asked, kept, exact = (272, 2, 3) if tile.backward else (160, 1, 1)
    parts = (
        8 * stages,  # barriers
        terms_of(rows) * both * (ds + 8) * 2,  # the vectors' terms
        stages * nt * pitch,  # the rows
        splits(tile) * both * (nt + 8) * 4,  # products
        2 * 2 * q * (nt + 8) * 2,  # weights, two terms of them, two tiles
        2 * q * 4,  # the largest logit and the factor of each query
        kept * own * nt * 4, exact * own * nt * 8, own * asked,  # what a rank does for all
        16 * 8 * 8 * exact, 16 * 4,  # parts of distances of 16 pairs
    )  # fmt: skip
    return sum(-(-p // 128) * 128 for p in parts)
