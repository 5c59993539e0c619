"""The programs of the dense sweep, and every variant of them that its planner can ask for."""

from __future__ import annotations

import itertools

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant
from memokern.backends.cuda.posterior.planner import tiles
from memokern.backends.cuda.posterior.tiles import QUERIES, Tile, shared_bytes

TARGETS = ("sm_90a", "sm_100a")  # that have clusters
FINISH_FEATURES = 512  # of a block of the last kernel
ROWS_OF_NORMS = 8  # of a block of the kernel of norms
SHARED_OF_QUERIES = 512  # bytes of a block of a kernel that owns a query


def queries_variant(rows: torch.dtype) -> Variant:
    """Splits the queries into terms, and makes their table."""
    return Variant("sweep/queries.cu", ("memokern_queries",), (("MK_ROWS", ROW_CODES[rows]),))


def norms_variant(rows: torch.dtype) -> Variant:
    """Squared norms of the rows about their center, where their owner keeps none."""
    return Variant("sweep/norms.cu", ("memokern_sq_norms",), (("MK_ROWS", ROW_CODES[rows]),))


def finish_variant() -> Variant:
    """Joins the clusters' parts."""
    entries = ("memokern_finish_state", "memokern_finish_sums")
    return Variant("sweep/finish.cu", entries, threads=128)


def sweep_variant(rows: torch.dtype, tile: Tile, bulk: bool, log: bool) -> Variant:
    """The sweep, or the backward sweep. bulk: whether rows are aligned, so that the device's copy
    engine takes them. Where they pass through registers, those for two blocks on a multiprocessor
    are not enough. The backward sweep of the weighting "log" takes all rows as if they were not."""
    bulk = bulk and not (log and tile.backward)
    macros: tuple[tuple[str, int], ...] = (
        ("MK_ROWS", ROW_CODES[rows]), ("MK_QUERIES", tile.queries), ("MK_CLUSTER", tile.cluster),
        ("MK_FEATURES", tile.features), ("MK_TILE", tile.rows), ("MK_STAGES", tile.stages),
        ("MK_RESIDENT", tile.resident if bulk else 1), ("MK_BULK", int(bulk)), ("MK_LOG", int(log)),
    )  # fmt: skip
    program, entry = "sweep/sweep.cu", "memokern_sweep"
    if tile.backward:
        program, entry = "gradient/gradient.cu", "memokern_gradient"
        macros = (*macros, ("MK_GRADIENT", 1))
    matrix = ("HMMA", "UBLKCP") if bulk else ("HMMA",)
    return Variant(
        program, (entry,), macros, cluster=tile.cluster, matrix=matrix,
        targets=TARGETS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """All that the launchers can ask for."""
    sweeps = [
        sweep_variant(t, tile, bulk, log)
        for t in ROW_CODES
        for backward in (False, True)
        for tile in tiles(t, backward)
        for bulk, log in itertools.product((True, False), (False, True))
        if tile.queries == QUERIES[0] or not is_rare(bulk, log)
        if not (backward and bulk and log)
    ]
    small = [make(t) for make in (queries_variant, norms_variant) for t in ROW_CODES]
    return [*small, finish_variant(), *sweeps]


def is_rare(bulk: bool, log: bool) -> bool:
    """Whether there are tiles of the fewest queries only."""
    return log or not bulk


def shared_of(variant: Variant) -> int:
    """Dynamic shared memory of a block of one of these, in bytes."""
    stem = variant.program.rsplit("/", 1)[-1]
    if stem in ("queries.cu", "terms.cu", "ties.cu", "finish_gradient.cu"):
        return SHARED_OF_QUERIES
    if stem not in ("sweep.cu", "gradient.cu"):
        return 0
    macros = dict(variant.macros)
    rows = next(t for t, code in ROW_CODES.items() if code == macros["MK_ROWS"])
    names = ("CLUSTER", "FEATURES", "QUERIES", "TILE", "STAGES", "RESIDENT")
    tile = Tile._make([*(macros[f"MK_{name}"] for name in names), "MK_GRADIENT" in macros])
    return shared_bytes(rows, tile)
