"""Every variant that a launcher can ask for."""

from __future__ import annotations

from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.gradient import variants as gradient
from memokern.backends.cuda.listed import variants as listed
from memokern.backends.cuda.nearest import variants as nearest
from memokern.backends.cuda.plane import variants as plane
from memokern.backends.cuda.posterior import variants as posterior
from memokern.backends.cuda.scan import variants as scan

# Of programs that need the same for every variant.
SHARED = {**scan.SHARED, **listed.SHARED, **nearest.SHARED}


def variants() -> list[Variant]:
    """Of all kernels, each with a name of its own."""
    modules = (posterior, gradient, scan, listed, nearest, plane)
    return [variant for module in modules for variant in module.variants()]


def shared_of(variant: Variant) -> int:
    """Dynamic shared memory of a block of one of these, in bytes."""
    if variant.program.startswith("plane/"):
        return plane.shared_of(variant)
    return SHARED.get(variant.program) or posterior.shared_of(variant)
