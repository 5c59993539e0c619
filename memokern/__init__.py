"""memokern: fused kernels for closed-form diffusion scores over large training sets.

>>> import torch, memokern
>>> data = memokern.TrainingSet.digits()
>>> x = 2.0 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
>>> memokern.posterior(x, data, sigma=2.0).score.shape
torch.Size([4, 8, 8])
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from memokern.by_row import draw, row_weights, weights
from memokern.data.streamed import StreamedSet
from memokern.data.training_set import TrainingSet
from memokern.denoiser import Denoiser
from memokern.explaining import explain
from memokern.functional import (
    Nearest,
    Posterior,
    denoise,
    jvp,
    log_density,
    nearest,
    posterior,
    score,
)
from memokern.given import Given
from memokern.partial import PosteriorState, merge, posterior_state
from memokern.strategies.certificate import Certificate
from memokern.util.version import VERSION

__version__ = VERSION
# What is imported when it is first asked for, as memokern.samplers: most programs need few of them.
_MODULES = (
    "distributed", "integrations", "kde", "likelihood", "memorization", "processes",
    "regularizers", "samplers", "training",
)  # fmt: skip
__all__ = [
    "Certificate",
    "Denoiser",
    "Given",
    "Nearest",
    "Posterior",
    "PosteriorState",
    "StreamedSet",
    "TrainingSet",
    "denoise",
    "draw",
    "explain",
    "jvp",
    "log_density",
    "merge",
    "nearest",
    "posterior",
    "posterior_state",
    "row_weights",
    "score",
    "weights",
]


if not TYPE_CHECKING:  # which knows what there is, and would take any name for a module

    def __getattr__(name: str) -> ModuleType:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
