"""Every variant that a launcher can ask for."""

from __future__ import annotations

import importlib

from memokern.kernels import onepass, tuning
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
    chosen = [choice for variant in listed for choice in tuning.choices(variant)]
    # The sweep lists its own, whose tiles differ.
    twins = [v.unaligned() for v in listed if v.aligned and v.kernel is not onepass.sweep_kernel]
    return chosen + twins
