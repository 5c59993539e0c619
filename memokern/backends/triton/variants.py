"""Every variant that a launcher can ask for."""

from __future__ import annotations

import importlib

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.variant import Variant
from memokern.backends.triton.posterior import fused

# The modules that have kernels of their own.
MODULES = (
    "core.centering", "core.pairs", "core.state", "posterior.queries", "posterior.fused",
    "posterior.marked", "posterior.products", "posterior.weigh", "posterior.finish",
    "gradient.coefficients", "gradient.backward_reduce", "gradient.zero_sigma",
    "gradient.far_queries", "gradient.backward_rows", "nearest.kernels", "scan.kernels",
    "listed.kernels",
)  # fmt: skip


def variants() -> list[Variant]:
    """All of them. This imports Triton and compiles nothing."""
    modules = [importlib.import_module(f"memokern.backends.triton.{name}") for name in MODULES]
    listed = [variant for module in modules for variant in module.variants()]
    chosen = [choice for variant in listed for choice in tuning.choices(variant)]
    # The sweep lists its unaligned variants itself, because their tiles differ.
    unaligned = [v.unaligned() for v in listed if v.aligned and v.kernel is not fused.sweep_kernel]
    return chosen + unaligned
