"""What a block of the sweep holds: rows, queries, features, and the shared memory for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

QUERIES = (16, 32, 64)  # those that a launch is compiled for


class Tile(NamedTuple):
    """What a block of the sweep holds. cluster: C, blocks that own the features of a row together.
    features: DS, those of each. queries: Q, rows: NT, stages: tiles in shared memory."""

    cluster: int
    features: int
    queries: int
    rows: int
    stages: int


# How rows are divided: blocks of a cluster and features of a block. Machine code depends on both,
# so that there is a list. The last two serve where a cluster of 16 does not fit.
DIVISIONS = (
    (2, 256), (4, 256), (8, 256), (8, 384), (16, 256), (16, 384), (16, 768), (16, 1536), (8, 768),
    (8, 1536),
)  # fmt: skip
ROWS = (128, 64, 32, 16)
STAGES = (4, 3, 2)
# Registers of a thread's sums, of 255: products, addresses and what is loaded take the rest.
_MOST_SUMS = 96
_WARPS = 8


def terms_of(rows: torch.dtype) -> int:
    """Terms that a query is split into for rows of this type."""
    return 3 if rows in (torch.float32, torch.bfloat16) else 2


def size_of(rows: torch.dtype) -> int:
    """Bytes of a stored number."""
    return int(rows.itemsize)


def holds_sums(features: int, queries: int) -> bool:
    """Whether a block's registers hold the sums of so many features and queries."""
    return -(-features // 128) * 8 * queries // 16 <= _MOST_SUMS


def at_once(tile: Tile) -> int:
    """Groups of 8 rows that a warp multiplies by the queries' terms that it has read once."""
    most, groups = 4 if tile.queries == 16 else 2, tile.rows // 8
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
    c, ds, q, nt, stages = tile
    size = size_of(rows)
    pitch = ds * size + (0 if ds * size // 16 % 2 else 16)  # odd in units of 16: no bank conflicts
    own = -(-q // c)
    parts = (
        8 * stages,  # barriers
        terms_of(rows) * q * (ds + 8) * 2,  # the queries' terms
        stages * nt * pitch,  # the rows
        splits(tile) * q * (nt + 8) * 4,  # products
        2 * 2 * q * (nt + 8) * 2,  # weights, two terms of them, two tiles
        2 * q * 4,  # the largest logit and the factor of each query
        own * nt * 4, own * nt * 8, own * 192,  # what a rank does for all
        16 * 8 * 8, 16 * 4,  # parts of distances of 16 pairs
    )  # fmt: skip
    return sum(-(-p // 128) * 128 for p in parts)
