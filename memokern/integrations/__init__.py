r"""memokern's denoisers in other projects' samplers and pipelines: one import and one line each.

| client | model |
| --- | --- |
| NVlabs/edm, edm2 | :class:`EDMModel` |
| k-diffusion | :class:`KDiffusionModel` |
| diffusers | :class:`DiffusersModel`, which needs diffusers to be installed |
| score_sde, score_sde_pytorch | :class:`ScoreSDEModel` |
| smalldiffusion | :class:`SmallDiffusionModel` |
| torchcfm (torchdyn, torchdiffeq) | :class:`VectorField` |

Each takes a TrainingSet, rows, or a denoiser (closed-form, conditional, or a trained network), and
answers as the client's own networks do: with the prediction that they give, from x and time as they
get them, in x's type, on x's device.
"""

from __future__ import annotations

import importlib
from typing import Any

from memokern.integrations.adapter import Adapter, Seen
from memokern.integrations.edm import EDMModel
from memokern.integrations.k_diffusion import KDiffusionModel
from memokern.integrations.score_sde import ScoreSDEModel
from memokern.integrations.smalldiffusion import SmallDiffusionModel
from memokern.integrations.torchcfm import VectorField

__all__ = [
    "Adapter",
    "EDMModel",
    "KDiffusionModel",
    "ScoreSDEModel",
    "Seen",
    "SmallDiffusionModel",
    "VectorField",
]


def __getattr__(name: str) -> Any:
    """DiffusersModel, whose base class is diffusers' own, at first use."""
    if name == "DiffusersModel":
        return importlib.import_module("memokern.integrations.diffusers").DiffusersModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
