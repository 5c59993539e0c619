"""The log density of what a denoiser samples, by the probability flow's exact change of volume.

Also the dimension that the data seem to have around a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm.auto import tqdm

from memokern import functional, validate
from memokern.conditional import Label
from memokern.data.training_set import TrainingSet
from memokern.denoiser import Denoiser
from memokern.processes import Process
from memokern.regularizers import Regularizer, SmoothedBank
from memokern.regularizers.divergence import x0_divergence
from memokern.util import checks
from memokern.validate import PerQuery

# The relative and absolute tolerance of the solver. Float32 evaluations are too coarse for finer
# ones.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-7, 1e-8)}
TERMINALS = ("prior", "mixture")


@dataclass(frozen=True)
class Likelihood:
    r"""What :func:`log_likelihood` returns.

    Attributes:
        log_density: log p(x) [\*batch] float64, natural logarithm.
        log_terminal: log p of `latent` under the terminal law [\*batch] float64.
        latent: where the flow takes x at t_noise, [\*batch, \*shape] in x's type.
        sigma: the noise level at which x was taken to be.
        dim: D. spacing: between the values that stored rows can have, 1 for floating-point rows.
        nfe: how often the denoiser was evaluated.
    """

    log_density: Tensor
    log_terminal: Tensor
    latent: Tensor
    sigma: float
    dim: int
    spacing: float
    nfe: int

    def bits_per_dim(self, spacing: float | None = None) -> Tensor:
        r"""-(log p + D log spacing) / (D log 2) [\*batch] float64: the code length of values that
        are `spacing` apart, in bits, with the density taken as constant over a cell.

        The default is the rows' own: 2/255 for uint8 pixels in [-1, 1], whose 256 values cost
        8 bits where all are equally likely, and 1 for floating-point rows.
        """
        if spacing is None:
            spacing = self.spacing
        spacing = checks.number("spacing", spacing, 0.0, strict=True)
        return -(self.log_density / self.dim + math.log(spacing)) / math.log(2)


def log_likelihood(
    denoiser: Any,
    x: Tensor,
    *,
    sigma_min: float | None = None,
    terminal: str = "prior",
    label: Label = None,
    condition: Tensor | None = None,
    bandwidth: PerQuery | None = None,
    bias: Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    progress: bool = False,
) -> Likelihood:
    r"""log p(x) of the law that the probability flow makes of its starts, at the level sigma_min.

    With x_T the end of the flow from x at t_noise, and x0 the denoiser's prediction along the way,

        log p(x) = log p_T(x_T) + D log(sigma_T / sigma_min) - integral of div x0 d(path),

    where div x0 = alpha tr Cov_w(y) / (T sigma^2) comes with the sweep, exactly, without random
    vectors; so do the gates of Tikhonov, SmoothedBank, Temperature, EmpiricalBayes and
    GaussianSmoothing. What has no such formula (other regularisers, networks) is differentiated D
    times, which is exact too.

    Args:
        denoiser: a :class:`memokern.Denoiser`, or a network in its place, such as
            :class:`memokern.training.LearnedDenoiser`.
        x: [\*batch, \*shape] float32 or float64. In float64 the evaluations are float64, whatever
            the rows' type.
        sigma_min: the level > 0 at which x is, by default the process's own. At the data themselves
            the law of an unregularised denoiser is a sum of point masses and has no density.
        terminal: p_T. "prior" is what samplers draw their starts from, N(0, sigma_T^2 I), so that
            the result is the density of the samples. "mixture" is the mixture of the rows at
            t_noise; without a regulariser the result is then the mixture's own
            :func:`memokern.log_density` at sigma_min, which tests the solver, and with SmoothedBank
            that of the kernel density estimate.
        label, condition, bandwidth, bias: as :meth:`memokern.Denoiser.evaluate`; a network takes
            labels only.
        rtol, atol: the solver's tolerances, by default 1e-7 and 1e-8, for float32 1e-4 and 1e-5.
            The solver (scipy's DOP853) chooses its steps for all queries together, so that another
            batch changes a result within the tolerance.
        progress: whether to show a progress bar.

    Returns:
        :class:`Likelihood`; `log_density` and `bits_per_dim()` are what is usually wanted.

    Raises:
        TypeError, ValueError: wrong arguments; "mixture" for a denoiser that is no mixture.
        RuntimeError: the solver cannot go on, as for gates where alpha is 0.

    Numerics: the path is a = 2 atan(e^path), tan a = sigma / alpha, in which the flow and div x0
    are smooth from sigma = 0 to alpha = 0. There is no gradient.

    Cost: one sweep per evaluation, 100 to 400 of them at the default tolerances.

    Source: Chen et al., arXiv 1806.07366; Song et al., arXiv 2011.13456.

    Example:
        >>> import torch, memokern
        >>> from memokern.likelihood import log_likelihood
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        >>> x = torch.tensor([[0.2, 0.1]], dtype=torch.float64)
        >>> flow = log_likelihood(memokern.Denoiser(rows), x, sigma_min=0.5, terminal="mixture")
        >>> bool((flow.log_density - memokern.log_density(x, rows, 0.5)).abs() < 1e-5)
        True
    """
    process = _checked_denoiser(denoiser)
    if terminal not in TERMINALS:
        raise ValueError(f"expected terminal one of {', '.join(TERMINALS)}, got {terminal!r}")
    if terminal == "mixture":
        _require_mixture(denoiser)
    space = denoiser.space
    batch = validate.batch_shape(x, space.new_empty((1, *space.shape[1:])))
    if not bool(torch.isfinite(x).all()):
        raise ValueError("expected finite x, got NaN or inf")
    relative, absolute = TOLERANCES[x.dtype]
    if rtol is not None:
        relative = checks.number("rtol", rtol, 0.0, strict=True)
    if atol is not None:
        absolute = checks.number("atol", atol, 0.0)
    low = process.sigma_min if sigma_min is None else sigma_min
    low = checks.number("sigma_min", low, 0.0, strict=True)
    asked: dict[str, Any] = {"label": label, "bias": bias}
    if condition is not None or bandwidth is not None:
        asked |= {"condition": condition, "bandwidth": bandwidth}
    flow = _Flow(denoiser, process, x, low, asked)
    with torch.no_grad():
        latent, shrunk = flow.run(relative, absolute, progress)
        sigma_t = flow.levels[1][1]
        if terminal == "mixture":
            at_end = denoiser.evaluate(latent, process.t_noise, **asked)
            log_terminal = at_end.posterior.log_density
        else:
            z = latent.to(torch.float64).flatten(len(batch)) / sigma_t
            norm = math.log(2 * math.pi) / 2 + math.log(sigma_t)
            log_terminal = -z.square().sum(-1) / 2 - flow.dim * norm
    gain = flow.dim * math.log(sigma_t / flow.levels[0][1])
    return Likelihood(
        log_density=log_terminal + gain - shrunk,
        log_terminal=log_terminal,
        latent=latent,
        sigma=low,
        dim=flow.dim,
        spacing=_spacing(denoiser),
        nfe=flow.nfe,
    )


class _Flow:
    """The probability flow from x at a level of noise to the process's start.

    With r = hypot(alpha, sigma) and the angle a, alpha = r cos a and sigma = r sin a, u = x / r has
    du = sin a (eps cos a - x0 sin a) ds for s = log tan(a / 2), and the divergence of that is
    D cos a - r div x0. The first term integrates to D log sin a; x = r u brings D log r; together
    they are D log sigma at both ends.
    """

    def __init__(
        self,
        denoiser: Any,
        process: Process,
        x: Tensor,
        low: float,
        asked: dict[str, Any],
    ) -> None:
        self.denoiser, self.process, self.x = denoiser, process, x
        self.asked, self.nfe = asked, 0
        self.batch = x.shape[: x.dim() - (denoiser.space.dim() - 1)]
        self.dim = math.prod(denoiser.space.shape[1:])
        first = float(process.time_of_sigma(low))
        self.times = (first, float(process.t_noise))
        self.levels = [self._level(t) for t in self.times]
        if not self.levels[0][1] < self.levels[1][1]:
            raise ValueError(
                f"expected sigma_min below {self.levels[1][1]:.6g}, where {process!r} starts, got"
                f" {low}"
            )
        # s = log tan(a / 2) at both ends.
        self.ends = [math.log(math.tan(math.atan2(s, a) / 2)) for a, s in self.levels]

    def _level(self, t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64, device="cpu")
        return float(self.process.alpha(time)), float(self.process.sigma(time))

    def _time(self, s: float) -> float:
        for end, t in zip(self.ends, self.times, strict=True):
            if s == end:
                return t
        return float(self.process.time_of_ratio(math.tan(2 * math.atan(math.exp(s)))))

    def run(self, rtol: float, atol: float, progress: bool) -> tuple[Tensor, Tensor]:
        """The end of the flow [*batch, *shape], and the integral of r div x0 [*batch]."""
        x, count = self.x.detach(), math.prod(self.batch)
        if count == 0:
            return x, torch.zeros(self.batch, dtype=torch.float64, device=x.device)

        def unpack(state: np.ndarray, t: float) -> Tensor:
            radius = math.hypot(*self._level(t))
            flat = torch.from_numpy(state[count:]) * radius
            return flat.reshape(x.shape).to(x.device, x.dtype)

        with tqdm(disable=not progress, desc="likelihood", unit="evaluation") as bar:

            def slope(s: float, state: np.ndarray) -> np.ndarray:
                t = self._time(float(s))
                alpha, sigma = self._level(t)
                radius = math.hypot(alpha, sigma)
                cos, sin = alpha / radius, sigma / radius
                x0, eps, divergence = self._evaluate(unpack(state, t), t)
                turn = sin * (cos * eps - sin * x0)
                bar.update()
                return np.concatenate([_numbers(radius * divergence), _numbers(turn)])

            begin = _numbers(x) / math.hypot(*self.levels[0])
            found = solve_ivp(
                slope, self.ends, np.concatenate([np.zeros(count), begin]),
                method="DOP853", t_eval=self.ends[1:], rtol=rtol, atol=atol,
            )  # fmt: skip
        if not found.success:
            raise RuntimeError(f"the solver stopped: {found.message.rstrip('.')}")
        end = found.y[:, -1]
        shrunk = torch.from_numpy(end[:count].copy()).reshape(self.batch).to(x.device)
        return unpack(end, self.times[1]), shrunk

    def _evaluate(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """x0, eps, and div x0 [*batch] float64."""
        self.nfe += 1
        divergence = None
        if isinstance(self.denoiser, Denoiser):
            found = self.denoiser.evaluate(x, t, **self.asked)
            divergence = x0_divergence(found)
        if divergence is None:
            found, divergence = self._differentiated(x, t)
        return found.x0, found.eps, divergence

    def _differentiated(self, x: Tensor, t: float) -> tuple[Any, Tensor]:
        """The evaluation, and div x0 from D gradients: sample i depends on x[i] alone."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = self.denoiser.evaluate(leaf, t, **self.asked)
            x0 = found.x0.flatten(len(self.batch))
            total = torch.zeros(self.batch, dtype=torch.float64, device=x.device)
            for i in range(self.dim):
                (slope,) = torch.autograd.grad(x0[..., i].sum(), leaf, retain_graph=True)
                total += slope.flatten(len(self.batch))[..., i].to(torch.float64)
        return found, total


def _numbers(value: Tensor) -> np.ndarray:
    """A tensor as a flat float64 array."""
    return value.detach().reshape(-1).to("cpu", torch.float64).numpy()


def _checked_denoiser(denoiser: Any) -> Process:
    if all(hasattr(denoiser, name) for name in ("process", "space", "evaluate")):
        process: Process = denoiser.process
        return process
    raise TypeError(
        "expected a memokern.Denoiser, or a network with its process, space and evaluate, got"
        f" {type(denoiser).__name__}"
    )


def _require_mixture(denoiser: Any) -> None:
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"terminal='mixture' needs the rows of a memokern.Denoiser, which {type(denoiser)} has"
            " not: use 'prior'"
        )
    regularizer: Regularizer | None = denoiser.regularizer
    if regularizer is not None and not isinstance(regularizer, SmoothedBank):
        raise ValueError(
            f"the flow with {regularizer!r} does not start from the mixture of the rows: use"
            " terminal='prior'"
        )


def _spacing(denoiser: Any) -> float:
    data = denoiser.data if isinstance(denoiser, Denoiser) else None
    return 1.0 if data is None or data.dtype != torch.uint8 else abs(data.scale)


def local_dimension(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""E_w[\|x - alpha y\|^2] / sigma^2 [\*batch] float64: the dimension of the data around x as
    seen at the scale sigma.

    It is D + sigma^2 (div s + \|s\|^2), which is about d for x on a manifold of dimension d where
    rows lie much closer than sigma, and the manifold is flat on that scale. On a row it goes to 0
    with sigma: the empirical measure has dimension 0, which is what a model that memorises has
    learned. Noise that x itself has, of level sigma, adds the D - d directions off the manifold.

    Args: as :func:`memokern.posterior`; sigma > 0.

    Raises: TypeError, ValueError as :func:`memokern.posterior`.

    Numerics: from the mean logit of the sweep, which cancels nowhere. Cost: one sweep. Gradients:
    as the sweep.

    Source: Stanczuk et al., arXiv 2212.12611; Kamkari et al., arXiv 2406.03537, whose FLIPD this is
    in closed form.

    Example:
        >>> import torch
        >>> from memokern.likelihood import local_dimension
        >>> line = torch.stack([torch.linspace(-2, 2, 401), torch.zeros(401)], 1)
        >>> round(local_dimension(torch.zeros(1, 2), line, sigma=0.2).item(), 3)
        1.0
    """
    found = functional.posterior(x, data, sigma, alpha, bias=bias, method=method)
    return -2 * (found.mean_logit - found.mean_bias)
