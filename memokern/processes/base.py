"""The base class of all processes, and the grid of noise levels that most of them use."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memokern.util import checks
from memokern.util.torch_internals import traced

# The exponent of the grid of noise levels, and its lowest level (Karras et al., arXiv 2206.00364).
RHO = 7.0
SIGMA_MIN = 0.002
# So many halvings make an interval of floats one spacing wide, with some to spare.
BISECTIONS = 70
# Where alpha is 0 at the start, the first step of the grid goes to this sigma / alpha.
FIRST_RATIO = 80.0


class Process(ABC):
    r"""x_t = alpha(t) y + sigma(t) z. A subclass gives `alpha` and `sigma`; the rest follows.

    Both take and return float64 tensors of any shape and must be differentiable by autograd.
    sigma / alpha must grow strictly from t_data to t_noise, whichever of the two times is larger.

    Attributes:
        t_noise: where sampling starts. t_data: where it ends, at sigma = 0 or the lowest level.
        sigma_min: the lowest level > 0 on the process's own grid, where adaptive solvers stop
            before the last step.

    Singular ends: where sigma = 0, `d_sigma` may be infinite (in VE and VP sigma behaves like
    sqrt(t)); where alpha = 0, `drift` and `diffusion` are infinite. The samplers never use them
    there.
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

        The absolute value is for processes whose data are at the later time (flow matching). Their
        noising, to which g belongs, runs backwards in t.
        """
        sigma = self.sigma(t)
        squared = 2 * sigma * (self.d_sigma(t) - self.drift(t) * sigma)
        return squared.abs().sqrt()

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise level of x / alpha; inf where alpha = 0."""
        return self.sigma(t) / self.alpha(t)

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        """The time [*sigma.shape] float64 between t_data and t_noise at which the noise level is
        sigma.

        Processes without a closed form find it by bisection, to about the last bit.

        Raises: ValueError for a level that the process does not reach; values under a compiler or a
            transform are trusted.
        """
        level = level_of("sigma", sigma)
        low, high = (float(self.sigma(scalar(t))) for t in (self.t_data, self.t_noise))
        bad = ~((level >= low) & (level <= high * (1 + 1e-12)))
        if not traced(bad) and bool(bad.any()):
            raise ValueError(
                f"expected sigma in [{low:.6g}, {high:.6g}], the levels of {self!r}, got"
                f" {level[bad].flatten()[0].item():.6g}"
            )
        return self._time_of_sigma(level)

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        """The time [*ratio.shape] float64 at which sigma / alpha is `ratio`.

        For a ratio that is not reached, bisection gives the nearer end, and a closed form a time
        beyond it.
        """
        return self._solve(self.ratio, level_of("ratio", ratio))

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._solve(self.sigma, sigma)

    def _solve(self, increasing: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """The t with increasing(t) = value, for a function that grows from t_data to t_noise."""
        low, high = torch.full_like(value, self.t_data), torch.full_like(value, self.t_noise)
        with torch.no_grad():
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = increasing(middle) < value
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            # A value that is taken at t_data gives t_data itself: sigma = 0 must be reached
            # exactly.
            end = increasing(torch.full_like(value, self.t_data)) >= value
            return torch.where(end, self.t_data, high)

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        """n >= 2 times [n] float64 on the CPU, from t_noise to t_data or to the time of sigma_min.

        They are evenly spaced in t, unless a process has a grid of its own.
        """
        n = checks.integer("n", n, 2, hint="; the first and the last time are two")
        last = self.t_data if sigma_min is None else float(self.time_of_sigma(sigma_min))
        return torch.linspace(self.t_noise, last, n, dtype=torch.float64, device="cpu")

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Starts of sampling: sigma(t_noise) z, which neglects what is left of the data there."""
        place = device if generator is None else generator.device
        noise = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=place)
        return noise.to(device) * float(self.sigma(scalar(self.t_noise)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, float | int))
        return f"{type(self).__name__}({shown})"


class RatioGrid(Process):
    """A process whose time grid is that of Karras et al. in sigma / alpha.

    Attributes:
        rho: the exponent of the grid; None for times evenly spaced in t.
    """

    rho: float | None = RHO

    def times(self, n: int, sigma_min: float | None = None) -> Tensor:
        """n >= 2 times [n] float64 on the CPU: the grid in sigma / alpha (arXiv 2206.00364, eq. 5)
        from t_noise to the time of sigma_min. By default n - 1 such times go to the process's own
        sigma_min, and the last is t_data, where sigma = 0."""
        if self.rho is None:
            return super().times(n, sigma_min)
        n = checks.integer("n", n, 2, hint="; the first and the last time are two")
        count = n - 1 if sigma_min is None else n
        start = scalar(self.t_noise)
        last = self.time_of_sigma(self.sigma_min if sigma_min is None else sigma_min)
        high, low = (float(self.ratio(t)) for t in (start, last))
        no_signal = [high] if math.isinf(high) else []  # one step to where there is some signal
        if no_signal:
            high = max(FIRST_RATIO, 2 * low)
        if count == 1:
            inner = start[None]
        else:
            first, end = high ** (1 / self.rho), low ** (1 / self.rho)
            inside = count - len(no_signal)
            roots = torch.linspace(first, end, inside, dtype=torch.float64, device="cpu")
            inner = self.time_of_ratio(torch.cat([roots.new_tensor(no_signal), roots**self.rho]))
            # The ends are put in as they are, free of the rounding of the way through their levels.
            inner[0], inner[-1] = start, last
        return inner if sigma_min is not None else torch.cat([inner, scalar(self.t_data)[None]])


def scalar(value: float) -> Tensor:
    """A number as a float64 tensor on the CPU, whatever torch.device() context this is called
    in."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def level_of(name: str, value: float | Tensor) -> Tensor:
    """A noise level >= 0, or a tensor of such levels, as float64; TypeError or ValueError for
    anything else. Values under a compiler or a transform are trusted."""
    if not isinstance(value, Tensor):
        return scalar(checks.number(name, value, 0.0, infinite=True))
    level = value.to(torch.float64)
    bad = torch.isnan(level) | (level < 0)
    if not traced(bad) and bool(bad.any()):
        raise ValueError(f"expected {name} >= 0, got {level[bad].flatten()[0].item():.6g}")
    return level


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """function'(t) for an elementwise function, differentiable again if t requires a gradient."""
    again = t.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        point = t if again else t.detach().requires_grad_()
        value = function(point)
        if not value.requires_grad:  # the function does not depend on t
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=again, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope
