"""Every variant that a launcher can ask for."""

from __future__ import annotations

from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.gradient import variants as gradient
from memokern.backends.cuda.posterior import variants as posterior


def variants() -> list[Variant]:
    """Of all kernels, each with a name of its own."""
    return [*posterior.variants(), *gradient.variants()]
