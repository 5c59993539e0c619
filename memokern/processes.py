r"""Forward processes x_t = alpha(t) y + sigma(t) z, z standard normal.

A process needs `alpha` and `sigma`; drift and diffusion of dx = f(t) x dt + g(t) dW follow:
f = alpha' / alpha, g^2 = (sigma^2)' - 2 f sigma^2. Times are float64 tensors of any shape; `t_noise`
is where sampling starts and `t_data` where it ends, with sigma = 0.

Example:
    A process of one's own, alpha = cos t, sigma = sin t:

    >>> import math, torch
    >>> from memokern.processes import Process
    >>> class Trigonometric(Process):
    ...     t_noise, t_data = math.pi / 2, 0.0
    ...     def alpha(self, t):
    ...         return torch.cos(t)
    ...     def sigma(self, t):
    ...         return torch.sin(t)
    >>> p = Trigonometric()
    >>> round(p.time_of_sigma(0.5).item(), 6), round(p.diffusion(torch.tensor(0.3)).item() ** 2, 4)
    (0.5236, 0.6187)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.enable_grad():
        at = t.detach().to(torch.float64).requires_grad_()
        value = function(at)
        if not value.requires_grad:
            return torch.zeros_like(at)
        return torch.autograd.grad(value.sum(), at)[0]


def _float64(t: Any) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


class Process:
    """The protocol: alpha(t), sigma(t), t_noise, t_data; everything else has a default."""

    t_noise: float = 1.0
    t_data: float = 0.0
    # Where sampling leaves the flow for the denoised mean, unless it is told to stop before.
    sigma_min: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """The signal's scale."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's standard deviation, monotone between t_data (0) and t_noise."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'(t); by automatic differentiation unless overridden."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'(t); by automatic differentiation unless overridden."""
        return _derivative(self.sigma, t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = alpha' / alpha of dx = f x dt + g dW."""
        return self.d_alpha(t) / self.alpha(_float64(t))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), from g^2 = 2 sigma sigma' - 2 f sigma^2; where time runs from noise to data (flow
        matching) the sign of time is that of the process' noise."""
        s = self.sigma(_float64(t))
        g2 = 2 * s * self.d_sigma(t) - 2 * self.drift(t) * s.square()
        return torch.sqrt(g2.abs())

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        """The time t with sigma(t) = sigma, by bisection; clamped to [t_data, t_noise]."""
        goal = _float64(sigma)
        near = torch.full_like(goal, self.t_data)
        far = torch.full_like(goal, self.t_noise)
        for _ in range(100):
            middle = (near + far) / 2
            below = self.sigma(middle) < goal
            near, far = torch.where(below, middle, near), torch.where(below, far, middle)
        return far

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        """n times from t_noise to that of sigma_min [n] float64, evenly spaced."""
        end = self.time_of_sigma(self._floor(n, sigma_min))
        return torch.linspace(self.t_noise, float(end), n, dtype=torch.float64)

    def _floor(self, n: int, sigma_min: float | None) -> float:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"expected at least one time, an int, got {n!r}")
        low = self.sigma_min if sigma_min is None else float(sigma_min)
        top = float(self.sigma(_float64(self.t_noise)))
        if not 0 < low < top:
            raise ValueError(
                f"expected 0 < sigma_min < {top:.4g}, where the process starts, got {low:g}"
            )
        return low

    def prior(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws to start from: N(0, sigma(t_noise)^2 I). Drawn on the generator's device (CPU
        without one), in float64, so that a seed means the same noise everywhere."""
        source = generator.device if generator is not None else torch.device("cpu")
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device=source)
        return (self._prior_std() * z).to(device=device or source, dtype=dtype)

    def _prior_std(self) -> float:
        return float(self.sigma(_float64(self.t_noise)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, float))
        return f"{type(self).__name__}({shown})"


class VE(Process):
    """The paper's variance-exploding process: alpha = 1, sigma^2 = (s0^{2t} - 1) / (2 ln s0),
    g = s0^t, s0 = 10, t in [0, 1] (arXiv 2501.15785 and its code).

    Example:
        >>> import torch
        >>> round(VE().diffusion(torch.tensor(0.5)).item(), 6)
        3.162278
    """

    def __init__(self, s0: float = 10.0) -> None:
        if not s0 > 1:
            raise ValueError(f"expected s0 > 1, got {s0}")
        self.s0 = float(s0)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_float64(t))

    def sigma(self, t: Tensor) -> Tensor:
        two_log = 2 * math.log(self.s0)
        return torch.sqrt(torch.expm1(two_log * _float64(t)) / two_log)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.s0 ** _float64(t)

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        two_log = 2 * math.log(self.s0)
        return torch.log1p(two_log * _float64(sigma).square()) / two_log


class VP(Process):
    """Variance preserving: alpha = exp(-A / 2), sigma^2 = 1 - exp(-A), A(t) = int_0^t beta,
    beta = beta0 + t (beta1 - beta0), drift -beta x / 2, g = sqrt(beta), t in [0, 1].

    The defaults, 0.001 and 3, are the paper's (arXiv 2501.15785 and its code).

    Example:
        >>> import torch
        >>> p, t = VP(), torch.tensor(0.4)
        >>> round((p.alpha(t) ** 2 + p.sigma(t) ** 2).item(), 6)
        1.0
    """

    def __init__(self, beta0: float = 0.001, beta1: float = 3.0) -> None:
        if not 0 <= beta0 <= beta1 or beta1 == 0:
            raise ValueError(f"expected 0 <= beta0 <= beta1, beta1 > 0, got {beta0} and {beta1}")
        self.beta0, self.beta1 = float(beta0), float(beta1)

    def beta(self, t: Tensor) -> Tensor:
        """The rate beta(t)."""
        return self.beta0 + _float64(t) * (self.beta1 - self.beta0)

    def _integral(self, t: Tensor) -> Tensor:
        t = _float64(t)
        return self.beta0 * t + 0.5 * (self.beta1 - self.beta0) * t.square()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def _prior_std(self) -> float:
        return 1.0


class ScoreSDEVP(VP):
    """VP with beta from 0.1 to 20 (Song et al., arXiv 2011.13456).

    Example:
        >>> ScoreSDEVP()
        ScoreSDEVP(beta0=0.1, beta1=20)
    """

    def __init__(self, beta0: float = 0.1, beta1: float = 20.0) -> None:
        super().__init__(beta0, beta1)


class EDM(Process):
    """alpha = 1, sigma = t, g = sqrt(2 t), with the time grid
    (smax^{1/rho} + i / (n - 1) (smin^{1/rho} - smax^{1/rho}))^rho (Karras et al., arXiv 2206.00364).

    Example:
        >>> [round(t, 4) for t in EDM().times(3).tolist()]
        [80.0, 2.5152, 0.002]
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or not rho > 0:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}"
            )
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.t_noise = self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_float64(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _float64(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * _float64(t))

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        return _float64(sigma)

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        low = self._floor(n, sigma_min)
        high, end = self.sigma_max ** (1 / self.rho), low ** (1 / self.rho)
        # The ends exactly: a power of a root is off by a rounding.
        grid = torch.linspace(high, end, n, dtype=torch.float64) ** self.rho
        grid[0] = self.sigma_max
        if n > 1:
            grid[-1] = low
        return grid


class FlowMatching(Process):
    """The straight path, alpha = t, sigma = 1 - t: noise at t = 0, data at t = 1; velocity
    (mean - x) / (1 - t) (Bertrand et al., arXiv 2506.03719).

    Example:
        >>> FlowMatching().time_of_sigma(0.25).item()
        0.75
    """

    t_noise, t_data = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return _float64(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - _float64(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_float64(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(_float64(t))

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        return 1 - _float64(sigma)


class DDPM(Process):
    """A discrete schedule: at t = k, k = 1..K, alpha^2 = alphas_cumprod[k - 1] (the network's step
    k - 1), and 1 at t = 0; alpha^2 is linear in between; sigma^2 = 1 - alpha^2.

    Args:
        alphas_cumprod: [K], strictly falling, in (0, 1), as diffusers and DDPM name it
            (Ho et al., arXiv 2006.11239). Default: beta linear from 1e-4 to 0.02, K = 1000.

    Example:
        >>> import torch
        >>> p = DDPM(torch.tensor([0.9, 0.5, 0.1]))
        >>> round(p.alpha(torch.tensor(2.0)).item() ** 2, 6)
        0.5
    """

    def __init__(self, alphas_cumprod: Tensor | None = None) -> None:
        if alphas_cumprod is None:
            beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
            alphas_cumprod = torch.cumprod(1 - beta, 0)
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        inside = table.dim() == 1 and len(table) > 0 and bool(((table > 0) & (table < 1)).all())
        if not inside or not bool((table.diff() < 0).all()):
            raise ValueError(
                "expected alphas_cumprod [K], strictly falling and between 0 and 1, got"
                f" shape {tuple(table.shape)}"
            )
        self._table = torch.cat([torch.ones(1, dtype=torch.float64), table])
        self.t_noise = float(len(table))
        self.sigma_min = min(self.sigma_min, 0.5 * math.sqrt(1 - float(table[0])))

    def _squared(self, t: Tensor) -> Tensor:
        t = _float64(t)
        table = self._table.to(t.device)
        k = t.detach().floor().long().clamp(0, len(table) - 2)
        return table[k] + (t - k) * (table[k + 1] - table[k])

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._squared(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt((1 - self._squared(t)).clamp(min=0.0))

    def _prior_std(self) -> float:
        return 1.0


class Cosine(Process):
    """alpha = cos(pi u / 2) / cos(pi u0 / 2), u = (t + s) / (1 + s), u0 = s / (1 + s), s = 0.008,
    sigma^2 = 1 - alpha^2, t in [0, 0.999] (Nichol & Dhariwal, arXiv 2102.09672).

    Example:
        >>> import torch
        >>> Cosine().sigma(torch.tensor(0.0)).item()
        0.0
    """

    t_noise = 0.999

    def __init__(self, s: float = 0.008) -> None:
        if not s > 0:
            raise ValueError(f"expected s > 0, got {s}")
        self.s = float(s)

    def alpha(self, t: Tensor) -> Tensor:
        angle = math.pi / 2 * (_float64(t) + self.s) / (1 + self.s)
        return torch.cos(angle) / math.cos(math.pi / 2 * self.s / (1 + self.s))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt((1 - self.alpha(t).square()).clamp(min=0.0))

    def _prior_std(self) -> float:
        return 1.0


_BY_NAME: dict[str, Callable[[], Process]] = {
    "ve": VE,
    "vp": VP,
    "score-sde-vp": ScoreSDEVP,
    "edm": EDM,
    "flow-matching": FlowMatching,
    "ddpm": DDPM,
    "cosine": Cosine,
}
NAMES = tuple(_BY_NAME)


def get(name: str) -> Process:
    """A process with its default constants by name.

    Example:
        >>> get("vp")
        VP(beta0=0.001, beta1=3)
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown process {name!r}; expected one of {', '.join(NAMES)}")
    return _BY_NAME[name]()
