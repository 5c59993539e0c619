"""For yang-song/score_sde and score_sde_pytorch: model(x, labels), behind get_score_fn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.integrations.adapter import Adapter
from memokern.processes import DDPM, EDM, Process, ScoreSDEVP
from memokern.regularizers import Regularizer
from memokern.util import checks
from memokern.validate import PerQuery, one_of

SDES = {"VPSDE": "vp", "subVPSDE": "subvp", "VESDE": "ve"}
# What get_score_fn multiplies continuous times with.
LABELS_PER_TIME = 999


class SubVP(Process):
    """alpha = exp(-A/2) as in VP, sigma = 1 - exp(-A) (Song et al., arXiv 2011.13456).

    Example:
        >>> import torch
        >>> from memokern.integrations.score_sde import SubVP
        >>> t = torch.tensor(0.5, dtype=torch.float64)
        >>> round((SubVP().sigma(t) + SubVP().alpha(t) ** 2).item(), 12)
        1.0
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.vp = ScoreSDEVP(beta_min, beta_max)

    def alpha(self, t: Tensor) -> Tensor:
        return self.vp.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.vp.sigma(t).square()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.vp.d_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.vp.beta(t) * self.vp.alpha(t).square()

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        # With r = (1 - alpha^2) / alpha, 1 / alpha is exp(asinh(r / 2)), and VP's ratio is the root
        # of r / alpha.
        r = torch.as_tensor(ratio, dtype=torch.float64)
        return self.vp.time_of_ratio((r * torch.exp(torch.asinh(r / 2))).sqrt())


class ScoreSDEModel(Adapter):
    r"""The `model` that score_sde's samplers, likelihoods and losses hand to get_score_fn.

    get_score_fn(sde, model, train, continuous) calls model(x, labels). For VP and sub-VP it gives
    999 t, or (N - 1) t where `continuous` is False, and takes the result for eps; for VE it gives
    sigma(t), or the number of a level counted from the largest, and takes the result for the score.

    Args:
        source: a TrainingSet, rows [N, \*shape], or any denoiser (:class:`Adapter` says how).
        sde: that of the client (VPSDE, subVPSDE, VESDE), or "vp", "subvp", "ve" for its defaults.
        continuous: as the client's config.training.continuous. False, which the client has for
            VPSDE and VESDE, takes labels as numbers of its N discrete levels.
        regularizer: with rows; in the units of the SDE.

    forward(x, labels): x [B, \*shape], labels [B]; in x's type.

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`; ValueError for another SDE.

    Source: Song et al., arXiv 2011.13456.

    Example:
        >>> import torch
        >>> from memokern.integrations import ScoreSDEModel
        >>> model = ScoreSDEModel(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), "ve")
        >>> model(torch.tensor([[1.25, 0.5]]), torch.tensor([0.25]))
        tensor([[-4., -8.]])
    """

    def __init__(
        self,
        source: Any,
        sde: Any = "vp",
        regularizer: Regularizer | None = None,
        *,
        continuous: bool = True,
    ) -> None:
        name = SDES.get(type(sde).__name__, sde)
        if not isinstance(name, str):
            raise ValueError(f"expected sde of {', '.join(SDES)}, got {type(sde).__name__}")
        kind = one_of("sde", name, tuple(SDES.values()))
        count = checks.integer("N", getattr(sde, "N", 1000), 2)
        if kind == "subvp" and not continuous:
            raise ValueError("the client has no discrete levels for subVPSDE: continuous=True")
        super().__init__(source, _path(kind, sde, count, continuous), regularizer)
        self.kind, self.count, self.continuous = kind, count, bool(continuous)

    def _time(self, labels: Tensor) -> Tensor:
        """The process's time where the client says that x is."""
        if self.kind != "ve":
            # It divides the noise by that of the level below.
            return labels / LABELS_PER_TIME if self.continuous else labels.floor()
        if self.continuous:
            return labels
        path = self.path
        assert isinstance(path, EDM)
        share = labels / (self.count - 1)  # of the way from the largest level to the lowest
        return path.sigma_max * (path.sigma_min / path.sigma_max) ** share

    def forward(self, x: Tensor, labels: PerQuery) -> Tensor:
        time = self._time(self.numbers("labels", labels, x))
        found = self.at(x, self.path.alpha(time), self.path.sigma(time), time=time)
        return (found.score if self.kind == "ve" else found.eps).to(x.dtype)


def _path(kind: str, sde: Any, count: int, continuous: bool) -> Process:
    """The client's process."""
    if kind == "ve":
        low, high = getattr(sde, "sigma_min", 0.01), getattr(sde, "sigma_max", 50.0)
        return EDM(sigma_min=low, sigma_max=high)
    low, high = getattr(sde, "beta_0", 0.1), getattr(sde, "beta_1", 20.0)
    if kind == "subvp":
        return SubVP(low, high)
    if continuous:
        return ScoreSDEVP(low, high)
    betas = torch.linspace(low / count, high / count, count, dtype=torch.float64, device="cpu")
    return DDPM(torch.cumprod(1 - betas, 0))
