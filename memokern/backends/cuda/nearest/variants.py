"""The programs of ``nearest``. None needs a cluster."""

from __future__ import annotations

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant

MOST_NEIGHBOURS = 64
GROUP_ROWS = 32  # of a block that writes all distances
TEAMS = (1, 4)  # queries of such a block
ROWS_OF_STEP = 256  # whose distances a block looks at together
# Bytes of dynamic shared memory of a block, as the sources lay it out: for the most queries.
SHARED = {
    "nearest/nearest_about.cu": 128, "nearest/nearest_bound.cu": 128,
    "nearest/nearest_exact.cu": 5248,
}  # fmt: skip


def about_variant(rows: torch.dtype, team: int) -> Variant:
    """All distances in float32, of so many queries in a block."""
    macros = (("MK_ROWS", ROW_CODES[rows]), ("MK_QUERIES", team))
    return Variant("nearest/nearest_about.cu", ("memokern_nearest_about",), macros)


def bound_variant() -> Variant:
    """How far a row may be."""
    return Variant("nearest/nearest_bound.cu", ("memokern_nearest_bound",))


def exact_variant(rows: torch.dtype) -> Variant:
    """The nearest rows of each part, and of all."""
    entries = ("memokern_nearest_exact", "memokern_nearest_join")
    return Variant("nearest/nearest_exact.cu", entries, (("MK_ROWS", ROW_CODES[rows]),))


def variants() -> list[Variant]:
    """All that the launcher can ask for."""
    return [
        *(about_variant(t, team) for t in ROW_CODES for team in TEAMS), bound_variant(),
        *(exact_variant(t) for t in ROW_CODES),
    ]  # fmt: skip
