r"""Samplers: from noise to data with a :class:`memokern.Denoiser`.

In the coordinates u = x / alpha and rho = sigma / alpha every process is the same: the probability
flow is du/d rho = eps (arXiv 2010.02502, 2206.00364). The fixed-step solvers work there; the
adaptive one integrates dx/dt. All end with the step from the last noise level to 0, which is the
denoised x0, unless `sigma_min` stops them before (early stopping: what is returned is x at sigma_min).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

from memokern.denoiser import Denoiser

SOLVERS = ("euler", "heun", "rk45")


@dataclass(frozen=True)
class Samples:
    r"""x [S, \*shape]; times, sigmas [T] float64 of the steps; nfe: score evaluations of the batch;
    trajectory [T, S, \*shape] if it was asked for: x at each of the times."""

    x: Tensor
    trajectory: Tensor | None
    times: Tensor
    sigmas: Tensor
    nfe: int


def _start(
    denoiser: Denoiser,
    n: int | Tensor,
    seed: int | None,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> tuple[Tensor, torch.Generator | None]:
    """The first x, and where later noise comes from."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected a memokern.Denoiser, got {type(denoiser).__name__}")
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    device = denoiser.data.device
    if isinstance(n, Tensor):
        shape = denoiser.data.shape
        if n.dim() != len(shape) + 1 or tuple(n.shape[1:]) != shape or not n.is_floating_point():
            raise ValueError(
                f"expected starts [S, {', '.join(map(str, shape))}] in floating point, got"
                f" {n.dtype} {tuple(n.shape)}"
            )
        return n.detach().clone(), generator
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"expected a number of samples >= 0 or starts [S, *shape], got {n!r}")
    x = denoiser.process.prior((n, *denoiser.data.shape), generator, dtype, device)
    return x, generator


def _levels(
    denoiser: Denoiser, steps: int, sigma_min: float | None
) -> tuple[Tensor, list[float], list[float]]:
    """Times of `steps` steps [steps + 1], and their alpha and sigma."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected steps as an int >= 1, got {steps!r}")
    process = denoiser.process
    if sigma_min is None:
        end = torch.tensor([process.t_data], dtype=torch.float64)
        times = torch.cat([process.times(steps), end])
    else:
        times = process.times(steps + 1, sigma_min)
    alpha, sigma = process.alpha(times), process.sigma(times)
    if sigma_min is None:
        # Where the grid says data there is no noise left, whatever rounding made of it.
        sigma[-1] = 0.0
    return times, alpha.tolist(), sigma.tolist()


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device=source).to(x)


@torch.no_grad()
def ode(
    denoiser: Denoiser,
    n: int | Tensor,
    steps: int = 18,
    *,
    solver: str = "heun",
    sigma_min: float | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    trajectory: bool = False,
) -> Samples:
    r"""The probability-flow ODE.

    Args:
        n: how many samples to draw from the process' prior, or the starts [S, \*shape] themselves.
        steps: of the process' time grid (euler, heun).
        solver: "euler" (DDIM's step); "heun" (EDM's algorithm 2: second order, with `churn`
            S_churn > 0 stochastic between churn_min and churn_max, noise scaled by churn_noise);
            "rk45" (scipy's, adaptive to rtol and atol over the whole batch).
        sigma_min: stop there, without the last denoising (early stopping).
        seed or generator: of all noise. dtype: of the samples drawn.
        progress: a progress bar. trajectory: keep x at every step.

    Example:
        >>> import torch
        >>> from memokern import Denoiser, TrainingSet, samplers
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> x = samplers.ode(Denoiser(rows), 4, seed=0).x
        >>> bool((x.abs() - torch.tensor([1.0, 0.0])).abs().max() < 1e-3)  # it memorises
        True
    """
    if solver not in SOLVERS:
        raise ValueError(f"expected solver one of {', '.join(SOLVERS)}, got {solver!r}")
    if churn and solver != "heun":
        raise ValueError(f"churn belongs to the heun solver, not to {solver}")
    if churn < 0 or churn_noise < 0:
        raise ValueError(f"expected churn and churn_noise >= 0, got {churn} and {churn_noise}")
    x, generator = _start(denoiser, n, seed, generator, dtype)
    if solver == "rk45":
        return _rk45(denoiser, x, sigma_min, rtol, atol, progress, trajectory)
    times, alpha, sigma = _levels(denoiser, steps, sigma_min)
    path, nfe = [x], 0
    for i in tqdm(range(steps), desc=solver, disable=not progress):
        a, s, a1, s1 = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        if churn and a > 0 and churn_min <= s / a <= churn_max:
            raised = s * (1 + min(churn / steps, math.sqrt(2) - 1))
            spread = churn_noise * math.sqrt(raised**2 - s**2)
            x, s = x + spread * _noise(x, generator), raised
        now = denoiser.at_level(x, s, a)
        ahead = a1 * now.x0 + s1 * now.eps
        nfe += 1
        # At alpha = 0 rho is infinite, at sigma = 0 the slope is not needed: Euler's step is exact.
        if solver == "heun" and s1 > 0 and a > 0:
            slope = denoiser.at_level(ahead, s1, a1).eps
            ahead = a1 * (x / a + (s1 / a1 - s / a) * (now.eps + slope) / 2)
            nfe += 1
        x = ahead
        if trajectory:
            path.append(x)
    return Samples(
        x, torch.stack(path) if trajectory else None, times, torch.tensor(sigma).double(), nfe
    )


def _rk45(
    denoiser: Denoiser,
    x: Tensor,
    sigma_min: float | None,
    rtol: float,
    atol: float,
    progress: bool,
    trajectory: bool,
) -> Samples:
    process = denoiser.process
    t0, t1 = process.times(2, sigma_min).tolist()
    nfe = 0
    bar = tqdm(desc="rk45", unit=" evaluations", disable=not progress)

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal nfe
        nfe += 1
        bar.update()
        at = torch.tensor(t, dtype=torch.float64)
        found = denoiser.evaluate(torch.from_numpy(flat).to(x).reshape(x.shape), t)
        v = found.velocity(process.d_alpha(at), process.d_sigma(at))
        out: np.ndarray = v.double().cpu().numpy().reshape(-1)
        return out

    start = x.double().cpu().numpy().reshape(-1)
    if not start.size:
        times = torch.tensor([t0, t1], dtype=torch.float64)
        kept = torch.stack([x, x]) if trajectory else None
        return Samples(x, kept, times, process.sigma(times), 0)
    with bar:
        solution = solve_ivp(slope, (t0, t1), start, method="RK45", rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"the adaptive solver stopped: {solution.message}")
    times = torch.from_numpy(solution.t)
    states = torch.from_numpy(np.ascontiguousarray(solution.y.T)).to(x)
    states = states.reshape(-1, *x.shape)
    sigmas = process.sigma(times)
    if sigma_min is None:
        end = denoiser.evaluate(states[-1], float(times[-1])).x0
        nfe += 1
        states = torch.cat([states, end[None]])
        times = torch.cat([times, torch.tensor([process.t_data], dtype=torch.float64)])
        sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    return Samples(states[-1], states if trajectory else None, times, sigmas, nfe)


@torch.no_grad()
def sde(
    denoiser: Denoiser,
    n: int | Tensor,
    steps: int = 100,
    *,
    sigma_min: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    trajectory: bool = False,
) -> Samples:
    r"""The reverse SDE by Euler-Maruyama, in u = x / alpha with rho^2 as time.

    u <- u + (rho_0^2 - rho_1^2) score_u + sqrt(rho_0^2 - rho_1^2) z (arXiv 2011.13456). The last
    step, to rho = 0, is the denoised x0 without noise. Arguments as :func:`ode`.

    Example:
        >>> import torch
        >>> from memokern import Denoiser, samplers
        >>> x = samplers.sde(Denoiser(torch.tensor([[-1.0], [1.0]])), 3, steps=50, seed=0).x
        >>> bool((x.abs() - 1).abs().max() < 1e-3)
        True
    """
    x, generator = _start(denoiser, n, seed, generator, dtype)
    times, alpha, sigma = _levels(denoiser, steps, sigma_min)
    path = [x]
    for i in tqdm(range(steps), desc="sde", disable=not progress):
        a, s, a1, s1 = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        x0 = denoiser.at_level(x, s, a).x0
        if a == 0:
            # x is noise alone: the next x is drawn afresh around the mean of what it says.
            x = a1 * x0 + s1 * _noise(x, generator)
        else:
            share = (s1 / a1 * a / s) ** 2  # rho_1^2 / rho_0^2
            x = a1 * (share * (x / a) + (1 - share) * x0)
            if s1 > 0:
                x = x + a1 * (s / a) * math.sqrt(1 - share) * _noise(x, generator)
        if trajectory:
            path.append(x)
    return Samples(
        x, torch.stack(path) if trajectory else None, times, torch.tensor(sigma).double(), steps
    )
