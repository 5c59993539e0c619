"""The noise schedules of DDPM networks: a schedule given step by step, and the cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memokern.data.storage import as_given
from memokern.processes.base import RHO, Process, RatioGrid, level_of
from memokern.util import checks


class DDPM(RatioGrid):
    """A discrete schedule: alpha^2 = alphas_cumprod[t], sigma^2 = 1 - alpha^2 (arXiv 2006.11239).

    t is the index 0 .. T-1 that a DDPM network takes, or any number between: log alpha^2 is
    interpolated linearly, to 0 at t = -1, where the data are. Where the last value is 0 (zero
    terminal SNR, arXiv 2305.08891), alpha falls linearly in the last piece.

    Args:
        alphas_cumprod: [T], strictly decreasing, in (0, 1); the last may be 0. None stands for
            Ho et al.'s 1000 steps with beta from 1e-4 to 0.02.
        rho: exponent of the grid in sigma / alpha, as of :class:`EDM`. None gives evenly spaced t,
            as DDPM's and DDIM's samplers have it. On the probability flow of 2000 photographs
            (SmoothedBank, Heun) the median distance from the exact end was 2.07 in 18 even steps
            and 0.41 on the grid, 1.43 and 0.07 in 40. The reverse SDE is better served by even
            steps: 200 of them left 0.4 % too much variance, 200 of the grid 2 %.

    Raises: TypeError, ValueError for a schedule that is not as above, or rho out of range.

    Example:
        >>> import torch
        >>> from memokern.processes import DDPM
        >>> process = DDPM(torch.tensor([0.81, 0.36]))
        >>> t = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> [round(a, 6) for a in process.alpha(t).tolist()]
        [1.0, 0.9, 0.6]
    """

    t_data = -1.0

    def __init__(
        self, alphas_cumprod: Tensor | Sequence[float] | None = None, rho: float | None = RHO
    ) -> None:
        self.rho = None if rho is None else checks.number("rho", rho, 0.0, strict=True)
        if alphas_cumprod is None:
            betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
            values = torch.cumprod(1 - betas, 0)
        else:
            values = as_given(alphas_cumprod, "alphas_cumprod").detach().to("cpu", torch.float64)
        if values.dim() != 1 or len(values) == 0:
            raise ValueError(f"expected alphas_cumprod [T], got {tuple(values.shape)}")
        whole = torch.cat([values.new_ones(1), values])
        if not (bool((whole.diff() < 0).all()) and float(values[-1]) >= 0):
            raise ValueError(
                "expected alphas_cumprod strictly decreasing in (0, 1), the first the least noisy"
                f" and the last perhaps 0; got {values[0].item():g} ... {values[-1].item():g}"
            )
        self._log = whole.log()
        self._ends_at_zero = float(values[-1]) == 0

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        """T - 1, the noisiest index."""
        return float(len(self._log) - 2)

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The piece of the schedule that t is in; the first and the last go on beyond the ends.
        And log alpha^2, which is not that of a last piece to 0."""
        log = self._log.to(t.device)
        piece = (t.detach() + 1).floor().long().clamp(0, len(log) - 2)
        ahead = log.take(piece + 1)
        if self._ends_at_zero:  # finite, because autograd follows both ways of torch.where
            ahead = ahead.clamp(min=float(log[-2]) - 1)
        return piece, torch.lerp(log.take(piece), ahead, t + 1 - piece)

    def _last_alpha(self, t: Tensor) -> Tensor:
        """alpha in a last piece to 0."""
        return torch.exp(self._log[-2] / 2).to(t.device) * (self.t_noise - t)

    def alpha(self, t: Tensor) -> Tensor:
        piece, log = self._piece(t)
        alpha = torch.exp(log / 2)
        if not self._ends_at_zero:
            return alpha
        return torch.where(piece == len(self._log) - 2, self._last_alpha(t), alpha)

    def sigma(self, t: Tensor) -> Tensor:
        piece, log = self._piece(t)
        square = 0.0 - torch.expm1(log)  # at t = -1 this is 0, not -0
        if self._ends_at_zero:
            alpha = self._last_alpha(t)
            last = piece == len(self._log) - 2
            square = torch.where(last, (1 - alpha) * (1 + alpha), square)
        return square.sqrt()

    def _time_of_log(self, value: Tensor) -> Tensor:
        """The t at which log alpha^2 is `value`."""
        log = self._log.to(value.device)
        # searchsorted finds the piece that has the value. It needs rising numbers, and log falls.
        above = torch.searchsorted(-log, -value.contiguous()).clamp(1, len(log) - 1)
        first, second = log[above - 1], log[above]
        time = above - 2 + (value - first) / (second - first)
        if self._ends_at_zero:
            last = self.t_noise - torch.exp((value - log[-2]) / 2)
            time = torch.where(above == len(log) - 1, last, time)
        return time

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._time_of_log(torch.log1p(-sigma.square()))

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        found = self._time_of_log(-torch.log1p(level_of("ratio", ratio).square()))
        return found.clamp(max=self.t_noise)

    def __repr__(self) -> str:
        spacing = "even" if self.rho is None else f"rho={self.rho:g}"
        return f"DDPM({len(self._log) - 1} steps, {spacing})"


class Cosine(Process):
    """alpha = cos(a(t)) / cos(a(0)), a(t) = (pi/2) (t + s) / (1 + s), sigma^2 = 1 - alpha^2.

    t in [0, 1], alpha(1) = 0. Times are evenly spaced (Nichol & Dhariwal, arXiv 2102.09672).

    Args:
        s: > 0, in the paper 0.008.

    Raises: TypeError, ValueError for s out of range.

    Example:
        >>> import torch
        >>> from memokern.processes import Cosine
        >>> round(Cosine().alpha(torch.tensor(0.5, dtype=torch.float64)).item() ** 2, 4)
        0.4938
    """

    def __init__(self, s: float = 0.008) -> None:
        self.s = checks.number("s", s, 0.0, strict=True)
        self._scale = math.pi / 2 / (1 + self.s)
        self._first = self._scale * self.s

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._scale * t + self._first) / math.cos(self._first)

    def sigma(self, t: Tensor) -> Tensor:
        # cos(b)^2 - cos(a)^2 = sin(a - b) sin(a + b). 1 - alpha^2 would cancel near t = 0.
        step = self._scale * t
        product = torch.sin(step) * torch.sin(step + 2 * self._first)
        # No clamp: its derivative at the bound is 1 up to torch 2.13 and 0 from 2.14 on, and a
        # velocity must see that sigma' is infinite at t = 0.
        return torch.where(product < 0, 0.0, product).sqrt() / math.cos(self._first)

    def _time(self, square: Tensor, alpha: Tensor) -> Tensor:
        """The time with these sigma^2 and alpha, which is exact at both ends: the identity in
        `sigma`, solved for the angle."""
        b, c = self._first, math.cos(self._first)
        a = torch.atan2((math.sin(b) ** 2 + square * c**2).sqrt(), alpha * c)
        step = torch.atan2(square * c**2 / torch.sin(a + b), torch.cos(a - b))
        return step / self._scale

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        square = sigma.square()
        return self._time(square, (1 - square).clamp(min=0.0).sqrt())

    def time_of_ratio(self, ratio: float | Tensor) -> Tensor:
        angle = torch.atan(level_of("ratio", ratio))
        return self._time(torch.sin(angle).square(), torch.cos(angle))
