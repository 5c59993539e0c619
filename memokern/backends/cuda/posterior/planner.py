"""How a sweep is divided: the tile, and the queries of a launch. Pure arithmetic, deterministic."""

from __future__ import annotations

import functools
import itertools

import torch

from memokern.backends.cuda.core.machine import KNOWN, Machine
from memokern.backends.cuda.plane.variants import LEAST_QUERIES, takes
from memokern.backends.cuda.posterior import costs
from memokern.backends.cuda.posterior.tiles import (
    BACKWARD_QUERIES,
    DIVISIONS,
    QUERIES,
    RESIDENT,
    ROWS,
    STAGES,
    Tile,
    holds_sums,
    room,
    shared_bytes,
)

NARROWEST = 257  # features; below, a sweep in one pass without clusters holds a row
MOST_CLUSTER = 16


def can_share(rows: torch.dtype, tile: Tile) -> bool:
    """Whether two blocks on a multiprocessor, with half the registers each, do not spill. Those do
    not hold both products of the backward sweep; nor, by the assembler's word, what a block of a
    cluster of 16 reads of the others' products where rows are float16, or rows and queries many."""
    most = {torch.float16: 0, torch.bfloat16: 512}.get(rows, 1024)
    return not tile.backward and (tile.cluster < 16 or tile.rows * tile.queries <= most)


def has_registers(rows: torch.dtype, tile: Tile) -> bool:
    """Whether a block does not spill: beside the most sums that registers hold the assembler has no
    place for the three terms of a query that bfloat16 rows need."""
    if tile.resident > 1 and not can_share(rows, tile):
        return False
    wide = rows == torch.bfloat16 and tile.features > 384 and tile.queries > 16
    return holds_sums(tile.features, tile.queries, tile.resident) and not wide


@functools.cache
def tile_of(
    rows: torch.dtype, cluster: int, features: int, queries: int, backward: bool = False
) -> Tile | None:
    """The rows and stages of a tile; None where the block's registers or its shared memory do not
    hold one. The same on every target, so that the list of variants is finite.

    >>> tile_of(torch.uint8, 8, 384, 16)
    Tile(cluster=8, features=384, queries=16, rows=64, stages=2, resident=2, backward=False)
    """
    shared = min(shared for _, shared in KNOWN.values())
    sizes = itertools.product(ROWS, STAGES, RESIDENT)
    fitting = [
        tile for tile in (Tile(cluster, features, queries, *s, backward) for s in sizes)
        if has_registers(rows, tile)
        and shared_bytes(rows, tile) <= room(shared, tile.resident)
    ]  # fmt: skip
    return min(fitting, key=lambda t: costs.row_seconds(rows, t), default=None)


@functools.cache
def tiles(rows: torch.dtype, backward: bool = False) -> list[Tile]:
    """All that a sweep over rows of this type can be asked for."""
    sizes = BACKWARD_QUERIES if backward else QUERIES
    found = (
        tile_of(rows, c, ds, q, backward) for q in sizes for c, ds, most in DIVISIONS if q <= most
    )
    return [tile for tile in found if tile is not None]


def widest(rows: torch.dtype, backward: bool = False) -> int:
    """The most features that a sweep over rows of this type can have."""
    return max(t.cluster * t.features for t in tiles(rows, backward))


@functools.lru_cache(4096)
def plan(
    b: int, n: int, d: int, rows: torch.dtype, machine: Machine, most_cluster: int = MOST_CLUSTER,
    rare: bool = False, backward: bool = False,
) -> Tile | None:  # fmt: skip
    """The fastest tile by count for b queries and n rows of d features; None where no cluster of up
    to most_cluster blocks holds a row. rare: for rows that are not aligned and for the weighting
    "log" there are tiles of 16 queries only, so that there are not four times as many variants.
    backward: for the backward sweep.

    >>> plan(1, 50_000, 3072, torch.uint8, Machine("sm_90a", 132, 227 << 10, 50 << 20))
    Tile(cluster=8, features=384, queries=16, rows=64, stages=2, resident=2, backward=False)
    """

    def seconds(tile: Tile) -> float:
        return costs.sweep_seconds(rows, tile, max(1, b), n, machine)

    def fits(tile: Tile) -> bool:
        wide = tile.cluster <= most_cluster and d <= tile.cluster * tile.features
        return wide and (tile.queries == QUERIES[0] or not rare)

    return min(filter(fits, tiles(rows, backward)), key=seconds, default=None)


@functools.lru_cache(4096)
def refuses(
    b: int, n: int, d: int, rows: torch.dtype, machine: Machine, backward: bool = False
) -> str | None:
    """Why another backend should sweep, in one line, or None."""
    if not backward and takes(b, d):
        return None
    if not backward and takes(LEAST_QUERIES, d):
        return f"its sweep of {d} features is for {LEAST_QUERIES} queries and more, not {b}"
    if d < NARROWEST:
        return f"its sweep is for more than {NARROWEST - 1} features, and there are {d}"
    most = widest(rows, backward)
    if d > most:
        # Passes over parts of the features would read every row from memory twice, once for the
        # products and once for the sums, where chunks of rows are read once from memory and once
        # from the L2 cache; and beside a chunk of such rows a launch is nothing.
        return f"a cluster holds at most {most:,} features of such rows, not {d:,}"
    tile = plan(b, n, d, rows, machine, backward=backward)
    assert tile is not None
    here = costs.sweep_seconds(rows, tile, max(1, b), n, machine)
    chunks = costs.chunked_seconds(rows, max(1, b), n, d, machine, backward)
    if here > chunks:
        return (
            f"by count, {b} queries on {n:,} rows are faster in chunks of rows"
            f" ({1e3 * chunks:.2g} ms against {1e3 * here:.2g})"
        )
    return None
