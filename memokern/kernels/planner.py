"""How a sweep is divided: which path, which tiles, how many parts. Pure arithmetic, deterministic.

The rules: a program for every multiprocessor, twice over, however few the queries; chunks of rows
that stay in half of the L2 cache between the two products that read them; work space within a
stated bound. A change of tiles changes only the order of sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memokern.kernels.products import TILES
from memokern.kernels.weigh import CHUNKS

WORKSPACE = 64 << 20  # bytes of the products of a block of queries with a chunk of rows, at most
_WAVES = 2  # programs for each multiprocessor


class Machine(NamedTuple):
    """What a plan depends on."""

    multiprocessors: int
    l2_bytes: int


class Chunked(NamedTuple):
    """The sweep as two products for each chunk of rows.

    few: tiles for up to 16 queries. queries: of a block. rows: of a chunk, at most. parts_d: of the
    features in the first product. parts_n: of the chunk's rows in the second.
    """

    few: bool
    queries: int
    rows: int
    parts_d: int
    parts_n: int


def _parts(programs: int, wanted: int, most: int) -> int:
    """A power of two of parts that makes `programs` at least `wanted`, if `most` allows it."""
    parts = 1
    while parts * programs < wanted and 2 * parts <= most:
        parts *= 2
    return parts


def chunked(b: int, n: int, d: int, size: int, machine: Machine, products: int = 1) -> Chunked:
    """For b queries, n rows of d features of `size` bytes. products: of each pair that are kept.

    >>> chunked(1, 50_000, 3072, 2, Machine(132, 50 << 20))
    Chunked(few=True, queries=1, rows=4096, parts_d=4, parts_n=4)
    """
    few = b <= 16
    block_b, block_n = TILES[few]
    rows = CHUNKS[0]
    for chunk in CHUNKS[1:]:
        if chunk * d * size <= machine.l2_bytes // 2:
            rows = chunk
    queries = min(b, max(block_b, WORKSPACE // (4 * products * rows) // block_b * block_b))
    tiles_b = -(-queries // block_b)
    wanted = _WAVES * machine.multiprocessors
    used = min(rows, n)
    parts_d = _parts(tiles_b * -(-used // block_n), wanted, min(8, max(1, d // 256)))
    parts_n = _parts(tiles_b * -(-d // 64), wanted, min(8, max(1, used // 128)))
    return Chunked(few, queries, rows, parts_d, parts_n)


def share(total: int, parts: int, step: int) -> int:
    """The size of a part of `total`, a multiple of `step`."""
    return -(-total // (parts * step)) * step


def element_size(dtype: torch.dtype) -> int:
    """Bytes of a stored number."""
    return torch.empty(0, dtype=dtype).element_size()
