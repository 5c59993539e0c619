"""The programs of the sums over lists. None needs a cluster."""

from __future__ import annotations

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant

PAIRS = 8  # that a block evaluates at a time
FEATURES = 256  # of a block that adds up rows
ROWS_OF_PART = 64  # at least, of a part of a list
# Bytes of dynamic shared memory of a block, as the sources lay it out.
SHARED = {"listed/listed_weights.cu": 128}


def pairs_variant(rows: torch.dtype, backward: bool) -> Variant:
    """Distances, and with backward what the gradient needs besides."""
    macros = (("MK_ROWS", ROW_CODES[rows]), ("MK_GRADIENT", int(backward)))
    return Variant("listed/listed_pairs.cu", ("memokern_listed_pairs",), macros)


def weights_variant() -> Variant:
    """Weights, and the rows' factors in the gradient."""
    return Variant(
        "listed/listed_weights.cu", ("memokern_listed_weights", "memokern_listed_factors")
    )


def sum_variant(rows: torch.dtype) -> Variant:
    """Sums of rows times weights or factors."""
    macros = (("MK_ROWS", ROW_CODES[rows]),)
    return Variant("listed/listed_sum.cu", ("memokern_listed_sum",), macros)


def finish_variant() -> Variant:
    """Joins the parts of the lists."""
    return Variant("listed/listed_finish.cu", ("memokern_listed_finish",))


def variants() -> list[Variant]:
    """All that the launcher can ask for."""
    return [
        *(pairs_variant(t, backward) for t in ROW_CODES for backward in (False, True)),
        weights_variant(), *(sum_variant(t) for t in ROW_CODES), finish_variant(),
    ]  # fmt: skip
