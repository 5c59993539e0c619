r"""Samplers: the probability-flow ODE and the reverse SDE of a :class:`memokern.Denoiser`.

With the denoiser's predictions x0 and eps, x = alpha x0 + sigma eps, and the flow is
d(x / alpha) = eps d(sigma / alpha). For every process, steps in these variables end exactly at
alpha x0 when sigma becomes 0.
"""

from __future__ import annotations

from memokern.samplers.base import Denoises, Evaluation, Samples, Watch
from memokern.samplers.flow import ODE_STEPS, SOLVERS, TOLERANCES, ode
from memokern.samplers.gaussian import Gaussian
from memokern.samplers.reverse import SDE_STEPS, sde

__all__ = [
    "ODE_STEPS",
    "SDE_STEPS",
    "SOLVERS",
    "TOLERANCES",
    "Denoises",
    "Evaluation",
    "Gaussian",
    "Samples",
    "Watch",
    "ode",
    "sde",
]
