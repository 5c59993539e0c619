"""Training: the targets of denoising, losses, small networks, and a loop that trains them.

A network learns what the closed form says, up to its size and its steps: the paper's third kind of
regularisation. :class:`LearnedDenoiser` takes the place of :class:`memokern.Denoiser`.
"""

from __future__ import annotations

from memokern.training import losses, targets
from memokern.training.history import EarlyStopping, History
from memokern.training.learned import LearnedDenoiser, LearnedPrediction
from memokern.training.monitors import memorised
from memokern.training.networks import MLP, UNet
from memokern.training.trainer import Trainer

__all__ = [
    "MLP",
    "EarlyStopping",
    "History",
    "LearnedDenoiser",
    "LearnedPrediction",
    "Trainer",
    "UNet",
    "losses",
    "memorised",
    "targets",
]
