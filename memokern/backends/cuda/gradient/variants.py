"""The small programs of the backward sweep; the sweep itself is listed with the forward one, whose
loop it has."""

from __future__ import annotations

import torch

from memokern.backends.cuda.core.variant import ROW_CODES, Variant

ROWS_OF_BIAS = 256  # of a block of the kernel of biases


def terms_variant(rows: torch.dtype) -> Variant:
    """Splits the gradients of the means into terms."""
    return _of_rows("terms", rows)


def ties_variant(rows: torch.dtype) -> Variant:
    """Queries of which only the nearest rows have weight."""
    return _of_rows("ties", rows)


def _of_rows(stem: str, rows: torch.dtype) -> Variant:
    entries = (f"memokern_gradient_{stem}",)
    return Variant(f"gradient/{stem}.cu", entries, (("MK_ROWS", ROW_CODES[rows]),))


def bias_variant() -> Variant:
    """Adds up the gradients for the biases over the queries."""
    return Variant("gradient/bias.cu", ("memokern_gradient_bias",))


def finish_variant() -> Variant:
    """Joins the clusters' parts."""
    return Variant("gradient/finish_gradient.cu", ("memokern_gradient_finish",), threads=512)


def variants() -> list[Variant]:
    """All that the launcher can ask for, but for the sweep."""
    of_rows = [make(t) for make in (terms_variant, ties_variant) for t in ROW_CODES]
    return [*of_rows, bias_variant(), finish_variant()]
