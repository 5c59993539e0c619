r"""Samplers: the probability-flow ODE and the reverse SDE of a :class:`memokern.Denoiser`.

With x0 and eps the denoiser's predictions, x = alpha x0 + sigma eps, the flow is
d(x / alpha) = eps d(sigma / alpha). Steps in these variables end exactly at alpha x0 when sigma
becomes 0, for every process.
"""

from __future__ import annotations

from memokern.samplers.base import Evaluation, Samples, Watch
from memokern.samplers.flow import ODE_STEPS, SOLVERS, TOLERANCES, ode
from memokern.samplers.reverse import SDE_STEPS, sde

__all__ = [
    "ODE_STEPS",
    "SDE_STEPS",
    "SOLVERS",
    "TOLERANCES",
    "Evaluation",
    "Samples",
    "Watch",
    "ode",
    "sde",
]
