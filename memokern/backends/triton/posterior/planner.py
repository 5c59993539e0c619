"""How a sweep is divided: which path, which tiles, how many parts. Pure arithmetic, deterministic.

The rules: a program for every multiprocessor, twice over, however few the queries; chunks of rows
that stay in half of the L2 cache between the two products that read them; work space within a
stated bound. A change of tiles changes only the order of sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memokern.backends.triton.posterior import onepass
from memokern.backends.triton.posterior.products import accumulate_tile, dots_tile
from memokern.backends.triton.posterior.weigh import chunks

WORKSPACE = 64 << 20  # bytes of the products of a block of queries with a chunk of rows, at most
FEW = 16  # queries, up to which tiles are low
_WAVES = 2  # programs for each multiprocessor
_MOST_PARTS = 16  # of a chunk's rows, or of up to 8,000 features


class Machine(NamedTuple):
    """What a plan depends on."""

    multiprocessors: int
    l2_bytes: int


class OnePass(NamedTuple):
    """The sweep as one kernel. few: tiles for up to 16 queries. features: of a tile. queries: of a
    launch. run: tiles of rows of a part. exact_parts: of the rows marked for exact evaluation."""

    few: bool
    features: int
    queries: int
    run: int
    exact_parts: int


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


def one_pass(
    b: int, n: int, d: int, dtype: torch.dtype, machine: Machine, kernel: str,
    unaligned: bool = False,
) -> OnePass | None:  # fmt: skip
    """For b queries and n rows of d features; None where their sums do not fit the registers. The
    log kernel needs logarithms in float64, which leave no room for them at all. unaligned: whether
    the rows are.

    >>> one_pass(1, 50_000, 64, torch.bfloat16, Machine(132, 50 << 20), "gaussian")
    OnePass(few=True, features=64, queries=1, run=2, exact_parts=25)
    >>> one_pass(64, 50_000, 3072, torch.bfloat16, Machine(132, 50 << 20), "gaussian")
    """
    few = b <= FEW
    features = next((f for f in onepass.FEATURES if d <= f), None)
    if features is None or kernel == "log":
        return None
    tile = onepass.tile(dtype, features, few, unaligned)
    tiles_n, most = -(-n // tile.n), onepass.PART // tile.n
    # Of a query: sums of each part, at most twice as many as there must be, and marks.
    each = (4 * d + 48) * -(-tiles_n // most) * 2 + 4 * onepass.words(n, tile)
    queries = min(b, max(tile.b, WORKSPACE // each // tile.b * tile.b))
    wanted = _WAVES * machine.multiprocessors
    run = max(1, min(most, -(-queries // tile.b) * tiles_n // wanted))
    # A few thousand rows each at least: what they find is joined again.
    exact_parts = max(1, min(-(-n // 2048), -(-wanted // queries)))
    return OnePass(few, features, queries, run, exact_parts)


def chunked(
    b: int, n: int, d: int, dtype: torch.dtype, machine: Machine, kernel: str = "gaussian",
    products: int = 1,
) -> Chunked:  # fmt: skip
    """For b queries and n rows of d features. products: of each pair that are kept.

    >>> chunked(1, 50_000, 3072, torch.bfloat16, Machine(132, 50 << 20))
    Chunked(few=True, queries=1, rows=2048, parts_d=16, parts_n=8)
    >>> chunked(1, 50_000, 196_608, torch.bfloat16, Machine(132, 50 << 20)).rows
    64
    """
    few = b <= FEW
    dots = dots_tile(few, dtype, "tf32x3")
    size = element_size(dtype)
    rows, *more = chunks(kernel, products)
    for chunk in more:
        if chunk * d * size <= machine.l2_bytes // 2:
            rows = chunk
    # Very wide rows: a tile of the first product at least, which may be more than stays there.
    while rows > dots.n and rows * d * size > machine.l2_bytes // 2:
        rows //= 2
    queries = min(b, max(dots.b, WORKSPACE // (4 * products * rows) // dots.b * dots.b))
    tiles_b = -(-queries // dots.b)
    wanted = _WAVES * machine.multiprocessors
    used = min(rows, n)
    # Of very wide rows there are few tiles, and features enough for more parts.
    most_d = max(min(_MOST_PARTS, max(1, d // 128)), d // 512)
    parts_d = _parts(tiles_b * -(-used // dots.n), wanted, most_d)
    tiles_d = -(-d // accumulate_tile(few, dtype, "tf32x3").d)
    parts_n = _parts(tiles_b * tiles_d, wanted, min(_MOST_PARTS, max(1, used // 128)))
    return Chunked(few, queries, rows, parts_d, parts_n)


def share(total: int, parts: int, step: int) -> int:
    """The size of a part of `total`, a multiple of `step`."""
    return -(-total // (parts * step)) * step


def element_size(dtype: torch.dtype) -> int:
    """Bytes of a stored number."""
    return torch.empty(0, dtype=dtype).element_size()
