"""The programs of the scan. None needs a cluster, and each row type or type of coordinates has one
for all shapes."""

from __future__ import annotations

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant

TILE_ROWS, TILE_QUERIES = 128, 32  # of a block of the first level
GROUPS = 2  # of a tile, of which each names the row that promises most
CHUNK_ROWS = 2048  # of a block that lists what the first level leaves
ROWS_OF_STEP = 32  # of a block of a later level
GATHERED = 256  # rows of a block that copies a list
STORED = (torch.float16, torch.float32)  # the types that the later levels' coordinates may have
# Bytes of dynamic shared memory of a block, as the sources lay it out.
SHARED = {
    "scan/scan_bounds.cu": 21504, "scan/scan_settle.cu": 512, "scan/scan_list.cu": 256,
    "scan/scan_end.cu": 2048,
}  # fmt: skip


def begin_variant() -> Variant:
    """What is known of the queries."""
    return Variant("scan/scan_begin.cu", ("memokern_scan_begin",), threads=128)


def bounds_variant() -> Variant:
    """The first level."""
    return Variant("scan/scan_bounds.cu", ("memokern_scan_bounds",))


def settle_variant(rows: torch.dtype) -> Variant:
    """The best row so far, by direct differences; what it leaves of a list."""
    entries = ("memokern_scan_settle_first", "memokern_scan_settle_next")
    return Variant("scan/scan_settle.cu", entries, (("MK_ROWS", ROW_CODES[rows]),))


def list_variant() -> Variant:
    """What the first level leaves."""
    return Variant("scan/scan_list.cu", ("memokern_scan_count", "memokern_scan_list"))


def refine_variant(stored: torch.dtype) -> Variant:
    """A later level, of coordinates that are stored in this type."""
    return Variant(
        "scan/scan_refine.cu", ("memokern_scan_refine",), (("MK_FINE", ROW_CODES[stored]),)
    )


def end_variant() -> Variant:
    """The lists as they are handed on."""
    return Variant("scan/scan_end.cu", ("memokern_scan_end", "memokern_scan_gather"))


def variants() -> list[Variant]:
    """All that the launcher can ask for."""
    return [
        begin_variant(), bounds_variant(), *(settle_variant(t) for t in ROW_CODES),
        list_variant(), *(refine_variant(t) for t in STORED), end_variant(),
    ]  # fmt: skip
