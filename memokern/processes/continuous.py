"""Processes in continuous time whose derivatives are written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.processes.base import RHO, SIGMA_MIN, Process, RatioGrid, level_of
from memokern.util import checks


class VE(RatioGrid):
    """Variance exploding: alpha = 1, sigma^2 = (s0^(2t) - 1) / (2 ln s0), f = 0, g = s0^t, t in [0,
    1].

    Args:
        s0: > 1. The default 10 gives the process of the code released with arXiv 2501.15785.

    Raises: TypeError, ValueError for s0 out of range.

    Example:
        >>> import torch
        >>> from memokern.processes import VE
        >>> round(VE().sigma(torch.tensor(1.0, dtype=torch.float64)).item(), 4)
        4.6365
    """

    def __init__(self, s0: float = 10.0) -> None:
        self.s0 = checks.number("s0", s0, 1.0, strict=True)
        self._rate = 2 * math.log(self.s0)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (torch.expm1(self._rate * t) / self._rate).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.exp(self._rate * t) / (2 * self.sigma(t))

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.exp(self._rate / 2 * t)

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log1p(self._rate * sigma.square()) / self._rate

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        return self._time_of_sigma(level_of("ratio", ratio))


class VP(RatioGrid):
    """Variance preserving: alpha = exp(-A/2), sigma^2 = 1 - exp(-A), A the integral of beta.

    beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1], f = -beta/2, g = sqrt(beta).

    Args:
        beta_min, beta_max: 0 < beta_min < beta_max. The defaults 0.001 and 3 are those of the code
            released with arXiv 2501.15785. With them alpha is 0.47 at t = 1, so that the start of
            sampling neglects a good part of the data.

    Raises: TypeError, ValueError for parameters out of range.

    Example:
        >>> import torch
        >>> from memokern.processes import VP
        >>> t = torch.tensor(0.7, dtype=torch.float64)
        >>> round((VP().alpha(t) ** 2 + VP().sigma(t) ** 2).item(), 12)
        1.0
    """

    def __init__(self, beta_min: float = 0.001, beta_max: float = 3.0) -> None:
        self.beta_min = checks.number("beta_min", beta_min, 0.0, strict=True)
        self.beta_max = checks.number(
            "beta_max", beta_max, self.beta_min, strict=True, hint="; more than beta_min"
        )

    def beta(self, t: Tensor) -> Tensor:
        """beta_min + t (beta_max - beta_min)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _area(self, t: Tensor) -> Tensor:
        """A(t), the integral of beta."""
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._area(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return (0.0 - torch.expm1(-self._area(t))).sqrt()  # at t = 0 this is 0, not -0

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2 * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.beta(t) * torch.exp(-self._area(t)) / (2 * self.sigma(t))

    def drift(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def _time_of_area(self, area: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * area).sqrt()
        return 2 * area / (self.beta_min + root)  # (root - beta_min) / slope would cancel

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._time_of_area(-torch.log1p(-sigma.square().clamp(max=1.0)))

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        return self._time_of_area(torch.log1p(level_of("ratio", ratio).square()))


class ScoreSDEVP(VP):
    """VP with beta from 0.1 to 20, which is DDPM in continuous time (Song et al., arXiv
    2011.13456).

    Example:
        >>> import torch
        >>> from memokern.processes import ScoreSDEVP
        >>> round(ScoreSDEVP().alpha(torch.tensor(1.0, dtype=torch.float64)).item(), 4)
        0.0066
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__(beta_min, beta_max)


class EDM(RatioGrid):
    """alpha = 1, sigma = t, f = 0, g = sqrt(2t) (Karras et al., arXiv 2206.00364).

    With a = sigma_max^(1/rho) and b = sigma_min^(1/rho), its grid has the levels
    (a + i / (n - 1) (b - a))^rho, i = 0..n-1, and then 0.

    Args:
        sigma_min, sigma_max: the lowest level > 0 and the highest, in units of the data.
        rho: > 0, in the paper 7. A larger one puts more levels near sigma_min.

    Raises: TypeError, ValueError for parameters out of range.

    Example:
        >>> from memokern.processes import EDM
        >>> [round(t, 3) for t in EDM().times(4).tolist()]
        [80.0, 2.515, 0.002, 0.0]
    """

    def __init__(self, sigma_min: float = SIGMA_MIN, sigma_max: float = 80.0, rho: float = RHO):
        self.sigma_min = checks.number("sigma_min", sigma_min, 0.0, strict=True)
        self.sigma_max = checks.number(
            "sigma_max", sigma_max, self.sigma_min, strict=True, hint="; more than sigma_min"
        )
        self.rho = checks.number("rho", rho, 0.0, strict=True)

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        """sigma_max."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t).sqrt()

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        return level_of("ratio", ratio)


class FlowMatching(Process):
    """alpha = t, sigma = 1 - (1 - sigma_min) t: noise at t = 0, data at t = 1.

    This is the straight path of flow matching (Lipman et al., arXiv 2210.02747; its closed form is
    in arXiv 2506.03719), with velocity (x0 - (1 - sigma_min) x) / sigma. Times are evenly spaced.
    Where alpha = 0 drift and diffusion are infinite.

    Args:
        sigma_min: the noise that is left on the data, in [0, 1), as `sigma` of torchcfm's
            TargetConditionalFlowMatcher. With 0 the velocity grows without bound towards the data;
            at their time itself see :class:`memokern.Denoiser`.
        reverse: True lets time run from the data at t = 0 to noise at t = 1, as in rectified flow
            models of images; the velocity then has the other sign.

    Raises: TypeError, ValueError for sigma_min out of range.

    Example:
        >>> from memokern.processes import FlowMatching
        >>> FlowMatching().times(3).tolist(), FlowMatching(reverse=True).times(3).tolist()
        ([0.0, 0.5, 1.0], [1.0, 0.5, 0.0])
    """

    def __init__(self, sigma_min: float = 0.0, reverse: bool = False) -> None:
        self._lowest = checks.number("sigma_min", sigma_min, 0.0)
        if self._lowest >= 1:
            raise ValueError(f"expected sigma_min below 1, the noise of the start, got {sigma_min}")
        self._slope = 1 - self._lowest
        self.reverse = bool(reverse)
        if self._lowest > 0:
            self.sigma_min = self._lowest

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        """0, or 1 in reverse."""
        return 1.0 if self.reverse else 0.0

    @property
    def t_data(self) -> float:  # type: ignore[override]
        """1, or 0 in reverse."""
        return 0.0 if self.reverse else 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t if self.reverse else t

    def sigma(self, t: Tensor) -> Tensor:
        return self._lowest + self._slope * t if self.reverse else 1 - self._slope * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0 if self.reverse else 1.0)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self._slope if self.reverse else -self._slope)

    def drift(self, t: Tensor) -> Tensor:
        return self.d_alpha(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * self.sigma(t) / self.alpha(t)).sqrt()

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return ((sigma - self._lowest) if self.reverse else (1 - sigma)) / self._slope

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        r = level_of("ratio", ratio)
        if not self.reverse:
            return 1 / (self._slope + r)
        return torch.where(torch.isinf(r), 1.0, (r - self._lowest) / (self._slope + r))

    def __repr__(self) -> str:
        shown = [f"sigma_min={self._lowest:g}"] * (self._lowest > 0) + [
            "reverse=True"
        ] * self.reverse
        return f"FlowMatching({', '.join(shown)})"
