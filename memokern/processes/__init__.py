r"""Diffusion processes: x_t = alpha(t) y + sigma(t) z, y a row, z standard normal.

A process gives alpha(t) and sigma(t) on float64 tensors, and the times where it begins and ends.
The linear SDE dx = f x dt + g dW with those marginals, the derivatives and the time grids follow.

A process of your own, here with (alpha, sigma) on the unit circle:

>>> import torch
>>> from memokern.processes import Process
>>> class Circle(Process):
...     t_noise, t_data = 1.5, 0.0
...     def alpha(self, t):
...         return torch.cos(t)
...     def sigma(self, t):
...         return torch.sin(t)
>>> t = torch.tensor(0.5, dtype=torch.float64)
>>> round(Circle().diffusion(t).square().item() / (2 * torch.tan(t).item()), 12)
1.0
>>> round(Circle().time_of_sigma(torch.sin(t)).item(), 12)
0.5
"""

from __future__ import annotations

from collections.abc import Callable

from memokern.processes.base import RHO, SIGMA_MIN, Process
from memokern.processes.continuous import EDM, VE, VP, FlowMatching, ScoreSDEVP
from memokern.processes.schedules import DDPM, Cosine

__all__ = [
    "DDPM",
    "EDM",
    "NAMES",
    "RHO",
    "SIGMA_MIN",
    "VE",
    "VP",
    "Cosine",
    "FlowMatching",
    "Process",
    "ScoreSDEVP",
    "get",
]

_KNOWN: dict[str, Callable[[], Process]] = {
    "ve": VE,
    "vp": VP,
    "score-sde-vp": ScoreSDEVP,
    "edm": EDM,
    "flow-matching": FlowMatching,
    "ddpm": DDPM,
    "cosine": Cosine,
}
NAMES = tuple(_KNOWN)


def get(name: str) -> Process:
    """The process of that name with its default constants.

    Raises: ValueError, which lists `NAMES`, for an unknown name.

    Example:
        >>> from memokern import processes
        >>> processes.get("edm")
        EDM(sigma_min=0.002, sigma_max=80, rho=7)
    """
    if name not in _KNOWN:
        raise ValueError(f"unknown process {name!r}; expected one of {', '.join(NAMES)}")
    return _KNOWN[name]()
