"""The programs of the sweep over rows of few features, and which calls they are for."""

from __future__ import annotations

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant

WIDTHS = (2, 4, 8)  # features that the sweep is compiled for; fewer are zeros
LEAST_QUERIES = 256  # those of a block: with fewer, most threads would have none
TILE = 128  # rows of a tile
FINISH_QUERIES = 128  # of a block that joins the parts
SUMS = 6  # of a part, besides those of its features
# Bytes of dynamic shared memory of a block, as the source lays it out.
SHARED = {width: 12 * TILE * (width + 1) for width in WIDTHS}


def width_of(d: int) -> int | None:
    """The features that rows of d are swept with; None where there is no kernel for them."""
    return next((width for width in WIDTHS if d <= width), None)


def takes(b: int, d: int) -> bool:
    """Whether the sweep is for so many queries and features."""
    return width_of(d) is not None and b >= LEAST_QUERIES


def sweep_variant(rows: torch.dtype, width: int) -> Variant:
    """The sweep; the kernel for eight features has smaller blocks, and more registers."""
    macros = (("MK_ROWS", ROW_CODES[rows]), ("MK_FEATURES", width))
    threads = 128 if width == 8 else 256
    return Variant(
        "plane/plane_sweep.cu", ("memokern_plane_sweep",), macros, threads=threads,
        matrix=("MUFU.EX2",),
    )  # fmt: skip


def finish_variant() -> Variant:
    """Joins the parts of the rows."""
    entries = ("memokern_plane_state", "memokern_plane_sums")
    return Variant("plane/plane_finish.cu", entries, threads=FINISH_QUERIES)


def variants() -> list[Variant]:
    """All that the launcher can ask for."""
    return [*(sweep_variant(t, width) for t in ROW_CODES for width in WIDTHS), finish_variant()]


def shared_of(variant: Variant) -> int:
    """Dynamic shared memory of a block of one of these, in bytes."""
    return SHARED.get(dict(variant.macros).get("MK_FEATURES", 0), 0)
