"""Every variant that a launcher can ask for."""

from __future__ import annotations

import importlib

from memokern.kernels import tuning
from memokern.kernels.variant import Variant

# The modules that have kernels of their own.
MODULES = (
    "queries", "onepass", "products", "weigh", "finish", "backward", "backward_ends",
    "backward_limit", "backward_rows", "nearest", "scan", "support",
)  # fmt: skip


def variants() -> list[Variant]:
    """All of them; imports Triton, compiles nothing."""
    modules = [importlib.import_module(f"memokern.kernels.{name}") for name in MODULES]
    listed = [variant for module in modules for variant in module.variants()]
    return [choice for variant in listed for choice in tuning.choices(variant)]
