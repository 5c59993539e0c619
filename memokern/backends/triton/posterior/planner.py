"""How a sweep is divided: which path, which tiles, how many parts. Pure arithmetic, deterministic.

Three rules decide. There are two programs for every multiprocessor, however few the queries. Chunks
of rows fit half of the L2 cache, where they stay between the two products that read them. The work
space stays within a stated bound. A change of tiles changes only the order of sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memokern.backends.triton.core.machine import Machine
from memokern.backends.triton.posterior import fused
from memokern.backends.triton.posterior.products import accumulate_tile, dot_products_tile
from memokern.backends.triton.posterior.weigh import chunk_sizes

WORKSPACE = 64 << 20  # bytes of the products of a block of queries with a chunk of rows, at most
FEW_QUERIES = 16  # up to so many queries a tile holds 16 of them, else 32 or 64
_WAVES = 2  # programs for each multiprocessor, so that one computes while another waits
# Into how many parts a chunk's rows, or up to 8,000 features, are divided at most: what the parts
# have found must be read again.
_MOST_PARTS = 16


class OnePass(NamedTuple):
    """The sweep as one kernel.

    few_queries: whether tiles are those for up to 16 queries. features: those of a tile. queries:
    those of a launch. run: tiles of rows in a part. exact_parts: parts of the rows that are marked
    for exact evaluation.
    """

    few_queries: bool
    features: int
    queries: int
    run: int
    exact_parts: int


class Chunked(NamedTuple):
    """The sweep as two products for each chunk of rows.

    few_queries: whether tiles are those for up to 16 queries. queries: those of a block. rows:
    those of a chunk, at most. parts_d: parts of the features in the first product. parts_n: parts
    of the chunk's rows in the second.
    """

    few_queries: bool
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


def one_pass(
    b: int, n: int, d: int, dtype: torch.dtype, machine: Machine, weighting: str,
    unaligned: bool = False,
) -> OnePass | None:  # fmt: skip
    """For b queries and n rows of d features; None where their sums do not fit the registers: of
    more than 256 features, and with weighting "log", whose logarithms in float64 leave no room.
    unaligned: whether the rows are.

    >>> one_pass(1, 50_000, 64, torch.bfloat16, Machine(132, 50 << 20), "gaussian")
    OnePass(few_queries=True, features=64, queries=1, run=2, exact_parts=25)
    >>> one_pass(64, 50_000, 3072, torch.bfloat16, Machine(132, 50 << 20), "gaussian")
    """
    few_queries = b <= FEW_QUERIES
    features = next((f for f in fused.FEATURES if d <= f), None)
    if features is None or weighting == "log":
        return None
    tile = fused.tile(dtype, features, few_queries, unaligned)
    tiles_n, most = -(-n // tile.n), fused.PART // tile.n
    # The bytes of a query: the sums and the state of each part, of which there are at most twice as
    # many as there must be, and the marks.
    each = (4 * d + 48) * -(-tiles_n // most) * 2 + 4 * fused.words(n, tile)
    queries = min(b, max(tile.b, WORKSPACE // each // tile.b * tile.b))
    wanted = _WAVES * machine.multiprocessors
    run = max(1, min(most, -(-queries // tile.b) * tiles_n // wanted))
    # A part has a few thousand rows at least, because what the parts find must be joined.
    exact_parts = max(1, min(-(-n // 2048), -(-wanted // queries)))
    return OnePass(few_queries, features, queries, run, exact_parts)


def chunked(
    b: int, n: int, d: int, dtype: torch.dtype, machine: Machine, weighting: str = "gaussian",
    products: int = 1,
) -> Chunked:  # fmt: skip
    """For b queries and n rows of d features. products: how many are kept of each pair.

    >>> chunked(1, 50_000, 3072, torch.bfloat16, Machine(132, 50 << 20))
    Chunked(few_queries=True, queries=1, rows=2048, parts_d=16, parts_n=8)
    >>> chunked(1, 50_000, 196_608, torch.bfloat16, Machine(132, 50 << 20)).rows
    64
    """
    few_queries = b <= FEW_QUERIES
    dots = dot_products_tile(few_queries, dtype, "tf32x3")
    size = element_size(dtype)
    rows, *more = chunk_sizes(weighting, products)
    for chunk in more:
        if chunk * d * size <= machine.l2_bytes // 2:
            rows = chunk
    # A chunk is at least one tile of the first product, which of very wide rows is more than stays
    # in the cache.
    while rows > dots.n and rows * d * size > machine.l2_bytes // 2:
        rows //= 2
    queries = min(b, max(dots.b, WORKSPACE // (4 * products * rows) // dots.b * dots.b))
    tiles_b = -(-queries // dots.b)
    wanted = _WAVES * machine.multiprocessors
    used = min(rows, n)
    # Very wide rows make few tiles, and have features enough for more parts.
    most_d = max(min(_MOST_PARTS, max(1, d // 128)), d // 512)
    parts_d = _parts(tiles_b * -(-used // dots.n), wanted, most_d)
    tiles_d = -(-d // accumulate_tile(few_queries, dtype, "tf32x3").d)
    parts_n = _parts(tiles_b * tiles_d, wanted, min(_MOST_PARTS, max(1, used // 128)))
    return Chunked(few_queries, queries, rows, parts_d, parts_n)


def part_size(total: int, parts: int, step: int) -> int:
    """The size of a part of `total`, a multiple of `step`."""
    return -(-total // (parts * step)) * step


def element_size(dtype: torch.dtype) -> int:
    """Bytes of a stored number."""
    return torch.empty(0, dtype=dtype).element_size()
