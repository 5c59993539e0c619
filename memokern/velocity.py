"""dx/dt of a process's probability flow, also at the data and a little past them."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.processes import Process
from memokern.regularizers import Prediction
from memokern.util.torch_internals import traced
from memokern.validate import wide

# The noise level at which slopes stand for those at sigma = 0.
NEAR_ZERO = 1e-6


def held_at_data(process: Process, time: Tensor) -> Tensor:
    """The time, and t_data for times past it by the length of the process at most: solvers with
    steps of their own go there."""
    past = (process.t_data - time) / (process.t_noise - process.t_data)
    return torch.where((past > 0) & (past <= 1), process.t_data, time)


def velocity(found: Prediction, process: Process, time: Tensor) -> Tensor:
    """The velocity at this time. At sigma = 0 it is the limit where the score has one; else eps is
    the noise's mean there, 0."""
    d_alpha, d_sigma = process.d_alpha(time), process.d_sigma(time)
    value = found.velocity(d_alpha, d_sigma)
    singular = (found.sigma == 0) & ~torch.isfinite(d_sigma)
    if not traced(singular) and bool(singular.any()):
        # sigma' eps = -sigma sigma' score, and sigma sigma' has a limit where sigma' has none.
        near = process.time_of_sigma(NEAR_ZERO).to(time.device)
        slope = wide(process.sigma(near) * process.d_sigma(near), found.x)
        score = torch.nan_to_num(found.score, nan=0.0, posinf=0.0, neginf=0.0)
        value = torch.where(wide(singular, found.x) != 0, value - slope * score, value)
    return value
