r"""Diffusion processes: x_t = alpha(t) y + sigma(t) z, y a row, z standard normal.

A process is alpha(t) and sigma(t) on float64 tensors, and the times where it begins and ends; the
linear SDE dx = f x dt + g dW with those marginals, its derivatives and time grids follow.

Your own, here a straight path on the unit circle:

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

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Karras et al., arXiv 2206.00364: the exponent of the grid of noise levels, and its lowest level.
RHO = 7.0
SIGMA_MIN = 0.002
# Halvings of an interval of floats until it is one spacing wide, with some to spare.
BISECTIONS = 70


class Process(ABC):
    r"""x_t = alpha(t) y + sigma(t) z. A subclass gives `alpha` and `sigma`; the rest follows.

    Both take and return float64 tensors of any shape and must be differentiable by autograd;
    sigma / alpha must grow strictly from t_data to t_noise, whichever is larger.

    Attributes:
        t_noise: where sampling starts. t_data: where it ends, with sigma = 0 or the least there is.
        sigma_min: the least level > 0 on the process's own grid, and where adaptive solvers stop
            before the last step.

    Singular ends: where sigma = 0, `d_sigma` may be infinite (VE and VP: sigma is like sqrt(t));
    where alpha = 0, `drift` and `diffusion` are infinite. The samplers never use them there.
    """

    t_noise: float = 1.0
    t_data: float = 0.0
    sigma_min: float = SIGMA_MIN

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The signal's scale, in t's shape, float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise level, in t's shape, float64."""

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha'(t)."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """sigma'(t)."""
        return _derivative(self.sigma, t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = alpha' / alpha of dx = f x dt + g dW."""
        return self.d_alpha(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        r"""g(t) >= 0, g^2 = \|d sigma^2 / dt - 2 f sigma^2\|.

        The absolute value is for processes whose data are at the later time (flow matching): there
        the noising runs backwards in t, and g belongs to it.
        """
        sigma = self.sigma(t)
        squared = 2 * sigma * (self.d_sigma(t) - self.drift(t) * sigma)
        return squared.abs().sqrt()

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise level of x / alpha; inf where alpha = 0."""
        return self.sigma(t) / self.alpha(t)

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        """The time at which the noise level is sigma, between t_data and t_noise; float64.

        By bisection, to the last bit or so, where the process has no closed form. Raises ValueError
        for a level that the process does not reach.
        """
        level = _level("sigma", sigma)
        low, high = (float(self.sigma(_tensor(t))) for t in (self.t_data, self.t_noise))
        bad = ~((level >= low) & (level <= high * (1 + 1e-12)))
        if bool(bad.any()):
            raise ValueError(
                f"expected sigma in [{low:.6g}, {high:.6g}], the levels of {self!r}, got"
                f" {level[bad].flatten()[0].item():.6g}"
            )
        return self._time_of_sigma(level)

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        """The time at which sigma / alpha is `ratio`; by bisection the nearer end for one that is
        not reached, by a closed form the time outside that has it."""
        return self._solve(self.ratio, _level("ratio", ratio))

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._solve(self.sigma, sigma)

    def _solve(self, increasing: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """The t with increasing(t) = value, increasing from t_data to t_noise."""
        low, high = torch.full_like(value, self.t_data), torch.full_like(value, self.t_noise)
        with torch.no_grad():
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = increasing(middle) < value
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            # Exactly the end, where the value is the end's: sigma = 0 must be reached, not nearly.
            end = increasing(torch.full_like(value, self.t_data)) >= value
            return torch.where(end, self.t_data, high)

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        """n times [n] float64 from t_noise to t_data, or to the time of sigma_min; n >= 2.

        Here evenly spaced in t; some processes have a grid of their own.
        """
        _check_count(n)
        last = self.t_data if sigma_min is None else float(self.time_of_sigma(sigma_min))
        return torch.linspace(self.t_noise, last, n, dtype=torch.float64)

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """sigma(t_noise) z: the starts of sampling; what is left of the data there is neglected."""
        place = device if generator is None else generator.device
        noise = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=place)
        return noise.to(device) * float(self.sigma(_tensor(self.t_noise)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, float | int))
        return f"{type(self).__name__}({shown})"


class _RatioGrid(Process):
    """A process whose time grid is the one of Karras et al. in sigma / alpha."""

    rho: float = RHO

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        """n times [n] float64: the rho = 7 grid in sigma / alpha from t_noise to the time of
        sigma_min (arXiv 2206.00364, eq. 5); without it n - 1 such times, to the process's own
        sigma_min, then t_data, where sigma = 0."""
        _check_count(n)
        count = n - 1 if sigma_min is None else n
        start = _tensor(self.t_noise)
        last = self.time_of_sigma(self.sigma_min if sigma_min is None else sigma_min)
        high, low = (float(self.ratio(t)) ** (1 / self.rho) for t in (start, last))
        if count == 1:
            inner = start[None]
        else:
            levels = torch.linspace(high, low, count, dtype=torch.float64) ** self.rho
            inner = self.time_of_ratio(levels)
            # As they are, not through their levels and back.
            inner[0], inner[-1] = start, last
        return inner if sigma_min is not None else torch.cat([inner, _tensor(self.t_data)[None]])


class VE(_RatioGrid):
    """Variance exploding: alpha = 1, sigma^2 = (s0^(2t) - 1) / (2 ln s0), f = 0, g = s0^t.

    t in [0, 1]; with s0 = 10 the process of the released code of arXiv 2501.15785.

    Example:
        >>> import torch
        >>> from memokern.processes import VE
        >>> round(VE().sigma(torch.tensor(1.0, dtype=torch.float64)).item(), 4)
        4.6365
    """

    def __init__(self, s0: float = 10.0) -> None:
        if not (math.isfinite(s0) and s0 > 1):
            raise ValueError(f"expected s0 > 1, got {s0}")
        self.s0 = float(s0)
        self._rate = 2 * math.log(s0)

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
        return self._time_of_sigma(_level("ratio", ratio))


class VP(_RatioGrid):
    """Variance preserving: alpha = exp(-A/2), sigma^2 = 1 - exp(-A), A the integral of beta.

    beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1], f = -beta/2, g = sqrt(beta). The
    defaults 0.001 and 3 are those of the released code of arXiv 2501.15785. alpha is 0.47 at t = 1
    with them: the start of sampling neglects a good part of the data.

    Example:
        >>> import torch
        >>> from memokern.processes import VP
        >>> t = torch.tensor(0.7, dtype=torch.float64)
        >>> round((VP().alpha(t) ** 2 + VP().sigma(t) ** 2).item(), 12)
        1.0
    """

    def __init__(self, beta_min: float = 0.001, beta_max: float = 3.0) -> None:
        if not (math.isfinite(beta_max) and 0 < beta_min < beta_max):
            raise ValueError(f"expected 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def beta(self, t: Tensor) -> Tensor:
        """beta_min + t (beta_max - beta_min)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _area(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._area(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return (0.0 - torch.expm1(-self._area(t))).sqrt()  # 0 at 0, not -0

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
        return 2 * area / (self.beta_min + root)  # not (root - beta_min) / slope: it cancels

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._time_of_area(-torch.log1p(-sigma.square().clamp(max=1.0)))

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        return self._time_of_area(torch.log1p(_level("ratio", ratio).square()))


class ScoreSDEVP(VP):
    """VP with beta from 0.1 to 20, as DDPM in continuous time (Song et al., arXiv 2011.13456).

    Example:
        >>> import torch
        >>> from memokern.processes import ScoreSDEVP
        >>> round(ScoreSDEVP().alpha(torch.tensor(1.0, dtype=torch.float64)).item(), 4)
        0.0066
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__(beta_min, beta_max)


class EDM(_RatioGrid):
    """alpha = 1, sigma = t, f = 0, g = sqrt(2t) (Karras et al., arXiv 2206.00364).

    Its grid is (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0.

    Args:
        sigma_min, sigma_max: the lowest level > 0 and the highest, in units of the data.
        rho: 7 in the paper; larger puts more levels near sigma_min.

    Example:
        >>> from memokern.processes import EDM
        >>> [round(t, 3) for t in EDM().times(4).tolist()]
        [80.0, 2.515, 0.002, 0.0]
    """

    def __init__(self, sigma_min: float = SIGMA_MIN, sigma_max: float = 80.0, rho: float = RHO):
        if not (0 < sigma_min < sigma_max and math.isfinite(sigma_max)):
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"expected rho > 0, got {rho}")
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)

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
        return _level("ratio", ratio)


class FlowMatching(Process):
    """alpha = t, sigma = 1 - t: noise at t = 0, data at t = 1, velocity (x0 - x) / (1 - t).

    The straight path of flow matching (Lipman et al., arXiv 2210.02747; its closed form in
    arXiv 2506.03719). Evenly spaced times. At t = 0 drift and diffusion are infinite.

    Example:
        >>> from memokern.processes import FlowMatching
        >>> FlowMatching().times(3).tolist()
        [0.0, 0.5, 1.0]
    """

    t_noise, t_data = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def drift(self, t: Tensor) -> Tensor:
        return 1 / t

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * (1 - t) / t).sqrt()

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        return 1 / (1 + _level("ratio", ratio))


class DDPM(Process):
    """A discrete schedule: alpha^2 = alphas_cumprod[t], sigma^2 = 1 - alpha^2 (arXiv 2006.11239).

    t is the index 0 .. T-1 that a DDPM network takes, and any number between: log alpha^2 is
    interpolated linearly, to 0 at t = -1, where the data are. Evenly spaced times.

    Args:
        alphas_cumprod: [T], strictly decreasing, in (0, 1); None for Ho et al.'s 1000 steps with
            beta from 1e-4 to 0.02.

    Example:
        >>> import torch
        >>> from memokern.processes import DDPM
        >>> process = DDPM(torch.tensor([0.81, 0.36]))
        >>> t = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> [round(a, 6) for a in process.alpha(t).tolist()]
        [1.0, 0.9, 0.6]
    """

    t_data = -1.0

    def __init__(self, alphas_cumprod: Tensor | Sequence[float] | None = None) -> None:
        if alphas_cumprod is None:
            betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
            values = torch.cumprod(1 - betas, 0)
        else:
            values = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if values.dim() != 1 or len(values) == 0:
            raise ValueError(f"expected alphas_cumprod [T], got {tuple(values.shape)}")
        whole = torch.cat([values.new_ones(1), values])
        if not (bool((whole.diff() < 0).all()) and float(values[-1]) > 0):
            raise ValueError(
                "expected alphas_cumprod strictly decreasing in (0, 1), the first the least noisy;"
                f" got {values[0].item():g} ... {values[-1].item():g}"
            )
        self._log = whole.log()

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        """T - 1, the noisiest index."""
        return float(len(self._log) - 2)

    def _log_square(self, t: Tensor) -> Tensor:
        """log alpha^2, extended along the first and last piece beyond the ends."""
        log = self._log.to(t.device)
        piece = (t.detach() + 1).floor().long().clamp(0, len(log) - 2)
        return torch.lerp(log.take(piece), log.take(piece + 1), t + 1 - piece)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_square(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return (0.0 - torch.expm1(self._log_square(t))).sqrt()  # 0 at -1, not -0

    def _time_of_log(self, value: Tensor) -> Tensor:
        log = self._log.to(value.device)
        # The piece that holds the value: log falls, so its negative is sorted.
        above = torch.searchsorted(-log, -value.contiguous()).clamp(1, len(log) - 1)
        first, second = log[above - 1], log[above]
        return above - 2 + (value - first) / (second - first)

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._time_of_log(torch.log1p(-sigma.square()))

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        found = self._time_of_log(-torch.log1p(_level("ratio", ratio).square()))
        return found.clamp(max=self.t_noise)

    def __repr__(self) -> str:
        return f"DDPM({len(self._log) - 1} steps)"


class Cosine(Process):
    """alpha = cos(a(t)) / cos(a(0)), a(t) = (pi/2) (t + s) / (1 + s), sigma^2 = 1 - alpha^2.

    Nichol & Dhariwal, arXiv 2102.09672, with s = 0.008; t in [0, 1], alpha(1) = 0. Evenly spaced
    times.

    Example:
        >>> import torch
        >>> from memokern.processes import Cosine
        >>> round(Cosine().alpha(torch.tensor(0.5, dtype=torch.float64)).item() ** 2, 4)
        0.4938
    """

    def __init__(self, s: float = 0.008) -> None:
        if not (math.isfinite(s) and s > 0):
            raise ValueError(f"expected s > 0, got {s}")
        self.s = float(s)
        self._scale = math.pi / 2 / (1 + s)
        self._first = self._scale * s

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._scale * t + self._first) / math.cos(self._first)

    def sigma(self, t: Tensor) -> Tensor:
        # cos(b)^2 - cos(a)^2 = sin(a - b) sin(a + b): 1 - alpha^2 would cancel near t = 0.
        step = self._scale * t
        product = torch.sin(step) * torch.sin(step + 2 * self._first)
        return product.clamp(min=0.0).sqrt() / math.cos(self._first)

    def _time(self, square: Tensor, alpha: Tensor) -> Tensor:
        """From sigma^2 and alpha: the same identity the other way, right at both ends."""
        b, c = self._first, math.cos(self._first)
        a = torch.atan2((math.sin(b) ** 2 + square * c**2).sqrt(), alpha * c)
        step = torch.atan2(square * c**2 / torch.sin(a + b), torch.cos(a - b))
        return step / self._scale

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        square = sigma.square()
        return self._time(square, (1 - square).clamp(min=0.0).sqrt())

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        angle = torch.atan(_level("ratio", ratio))
        return self._time(torch.sin(angle).square(), torch.cos(angle))


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
    """The process of that name with its default constants; ValueError lists `NAMES`.

    Example:
        >>> from memokern import processes
        >>> processes.get("edm")
        EDM(sigma_min=0.002, sigma_max=80, rho=7)
    """
    if name not in _KNOWN:
        raise ValueError(f"unknown process {name!r}; expected one of {', '.join(NAMES)}")
    return _KNOWN[name]()


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _level(name: str, value: float | Tensor) -> Tensor:
    level = torch.as_tensor(value, dtype=torch.float64)
    if bool((torch.isnan(level) | (level < 0)).any()):
        raise ValueError(f"expected {name} >= 0, got {value}")
    return level


def _check_count(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"expected the number of times as an int, got {type(n).__name__}")
    if n < 2:
        raise ValueError(f"expected at least 2 times, the first and the last, got {n}")


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """function'(t) for an elementwise function; with a graph where t has one."""
    again = t.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        point = t if again else t.detach().requires_grad_()
        value = function(point)
        if not value.requires_grad:  # does not depend on t
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=again, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope
