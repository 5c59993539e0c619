"""The probability-flow ODE."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm.auto import tqdm

from memokern.conditional import Label
from memokern.samplers.base import (
    Denoises,
    Level,
    Run,
    Samples,
    Watch,
    check_stop,
    held,
    level_of,
    levels_of,
)
from memokern.samplers.exponential import exponential, gaussian_of
from memokern.samplers.gaussian import Gaussian
from memokern.util import checks

SOLVERS = ("euler", "heun", "rk45", "exponential")
ODE_STEPS = 18
# The relative and absolute tolerance of rk45. Float32 evaluations are too coarse for finer ones.
TOLERANCES = {torch.float32: (1e-4, 1e-6), torch.float64: (1e-6, 1e-9)}


def ode(
    denoiser: Denoises,
    start: int | Tensor,
    steps: int | None = None,
    *,
    solver: str = "heun",
    sigma_min: float | None = None,
    denoise_last: bool = False,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    rtol: float | None = None,
    atol: float | None = None,
    gaussian: Gaussian | bool | None = None,
    finish: bool = True,
    label: Label = None,
    bias: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    trajectory: bool = False,
    watch: Watch | None = None,
) -> Samples:
    r"""Samples of the probability-flow ODE, d(x / alpha) = eps d(sigma / alpha).

    Args:
        denoiser: a :class:`memokern.Denoiser`, or a network in its place, such as
            :class:`memokern.training.LearnedDenoiser`. Its process gives the times; its
            `prediction` is not used.
        start: the number of samples, whose starts are drawn from the process's prior; or the starts
            [S, \*shape] at t_noise.
        steps: of euler and heun, on the process's grid, 18 by default. rk45 chooses its own.
        solver: "euler" takes x to alpha' x0 + sigma' eps, which is DDIM's step. "heun" does the
            same with the mean of eps at both ends (arXiv 2206.00364, algorithms 1 and 2). "rk45" is
            scipy's adaptive solve_ivp, in the angle atan2(sigma, alpha). "exponential" has both
            ends in closed form and a multistep method between them
            (:mod:`memokern.samplers.exponential`): as exact as Heun's method with as many `steps`,
            for about a third of the evaluations.
        sigma_min: the noise level > 0 to stop at. By default the samplers go to where the process
            ends, the data; euler and heun take their last step with x0 held.
        denoise_last: whether an early stop is followed by one more step, to the data with x0 held.
        churn, churn_min, churn_max, churn_noise: EDM's S_churn, S_tmin, S_tmax, S_noise. Before a
            step at sigma / alpha in [churn_min, churn_max], fresh noise raises sigma / alpha by
            min(churn / steps, sqrt(2) - 1) of itself. Not for rk45.
        rtol, atol: tolerances of rk45, by default 1e-6 and 1e-9, for float32 1e-4 and 1e-6. The
            norm is over all samples together.
        gaussian: of "exponential", what the flow starts with: None takes the mean and variances of
            the denoiser's rows (with a label, of its own), and nothing for a network; a
            :class:`Gaussian` serves both; False leaves the part out.
        finish: of "exponential", whether a sample is taken to its end as soon as that is proven:
            with plain scores and with `Tikhonov`, `Temperature` and `SmoothedBank`, whose
            parameters are numbers.
        label, bias: as :meth:`Denoiser.evaluate`.
        seed, generator: of the starts' and churn's noise. Without either, PyTorch's own generator.
        dtype: float32 or float64, by default that of the starts; of drawn starts float64 for
            float64 rows, else float32.
        progress: whether to show a progress bar. trajectory: whether to keep all states.
        watch: called after each evaluation with an :class:`Evaluation`, which has the rows that
            were swept and the proven error.

    Returns:
        :class:`Samples`.

    Raises:
        TypeError, ValueError: wrong arguments, before anything is computed. RuntimeError: rk45
            cannot go on, as from alpha = 0 (flow matching, cosine) with a regulariser that gates:
            see :func:`memokern.regularizers.evaluate`.

    Gradients: with respect to starts that require them, for all but rk45.

    Cost: steps sweeps (euler), about twice that (heun: 2 steps - 1 when the end is sigma = 0), some
    two thirds of it (exponential: a step of 4 / 3 steps costs one, and both ends none).

    Example:
        >>> import torch
        >>> from memokern import Denoiser, samplers
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> found = samplers.ode(Denoiser(rows), 3, seed=0)
        >>> found.x.abs().tolist(), found.nfe
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 35)
    """
    if solver not in SOLVERS:
        raise ValueError(f"expected solver one of {', '.join(SOLVERS)}, got {solver!r}")
    churn = checks.number("churn", churn, 0.0)
    churn_noise = checks.number("churn_noise", churn_noise, 0.0)
    churn_min = checks.number("churn_min", churn_min, 0.0)
    hint = f"; churn_min is {churn_min:g}"
    churn_max = checks.number("churn_max", churn_max, churn_min, infinite=True, hint=hint)
    run = Run(
        denoiser, start, label=label, bias=bias, seed=seed, generator=generator, dtype=dtype,
        trajectory=trajectory, watch=watch,
    )  # fmt: skip
    if solver != "exponential" and (gaussian is not None or not finish):
        raise ValueError('gaussian and finish belong to solver="exponential"')
    if solver == "rk45":
        if steps is not None or churn != 0:
            raise ValueError("rk45 chooses its own steps and has no churn: leave both out")
        check_stop(run.process, sigma_min, denoise_last)
        relative, absolute = TOLERANCES[run.x.dtype]
        if rtol is not None:
            relative = checks.number("rtol", rtol, 0.0, strict=True)
        if atol is not None:
            absolute = checks.number("atol", atol, 0.0)
        return _rk45(run, sigma_min, denoise_last, relative, absolute, progress)
    if rtol is not None or atol is not None:
        raise ValueError("rtol and atol are rk45's; euler, heun and exponential have steps")
    steps = ODE_STEPS if steps is None else steps
    if solver == "exponential":
        if churn != 0:
            raise ValueError('"exponential" has no churn: leave it out, or take heun')
        steps = checks.integer("steps", steps, 1)
        check_stop(run.process, sigma_min, denoise_last)
        start_with = gaussian_of(denoiser, gaussian, run)
        return exponential(run, steps, sigma_min, denoise_last, start_with, finish, progress)
    levels = levels_of(run.process, steps, sigma_min, denoise_last)
    gain = min(churn / steps, math.sqrt(2) - 1)
    with run.gradients():
        for now, to in tqdm(list(pairwise(levels)), disable=not progress, desc=solver):
            if gain > 0 and now.signal and churn_min <= now.sigma / now.alpha <= churn_max:
                now = _churn(run, now, gain, churn_noise)
            x0, eps = run.evaluate(run.x, now.t)
            ahead = held(x0, eps, to)
            # There is no second slope at an end without signal or without noise. One step of first
            # order does not change the order of the whole run.
            if solver == "heun" and now.signal and to.sigma > 0:
                _, eps_ahead = run.evaluate(ahead, to.t)
                scale = to.alpha / now.alpha
                ahead = scale * run.x + (to.sigma - scale * now.sigma) / 2 * (eps + eps_ahead)
            run.x = ahead
            run.keep()
    return run.samples(
        torch.tensor([level.t for level in levels], dtype=torch.float64, device="cpu")
    )


def _churn(run: Run, now: Level, gain: float, scale: float) -> Level:
    """Adds noise to x, which raises r = sigma / alpha to r (1 + gain), and returns the new
    level."""
    ratio = now.sigma / now.alpha
    up = level_of(run.process, run.process.time_of_ratio(ratio * (1 + gain)))
    grown = up.alpha / now.alpha
    added = math.sqrt(max(0.0, up.sigma**2 - (grown * now.sigma) ** 2))
    if added == 0:  # the process has no level beyond its start
        return now
    run.x = grown * run.x + added * scale * run.noise()
    return up


def _rk45(
    run: Run,
    sigma_min: float | None,
    denoise_last: bool,
    rtol: float,
    atol: float,
    progress: bool,
) -> Samples:
    """The adaptive solver, in the angle a = atan2(sigma, alpha).

    With r = hypot(alpha, sigma), x = r (x0 cos a + eps sin a), and the flow is
    d(x / r) / da = eps cos a - x0 sin a, which is finite at both ends.
    """
    run.step = None
    process, kind, shape, device = run.process, run.x.dtype, run.x.shape, run.x.device
    first, end = level_of(process, process.t_noise), level_of(process, process.t_data)
    last = end if sigma_min is None else level_of(process, process.time_of_sigma(sigma_min))
    angles = [math.atan2(level.sigma, level.alpha) for level in (first, last)]

    def level_at(angle: float) -> Level:
        for level, known in zip((first, last), angles, strict=True):
            if angle == known:
                return level
        return level_of(process, process.time_of_ratio(math.tan(angle)))

    def physical(state: object, level: Level) -> Tensor:
        flat = torch.as_tensor(state, dtype=torch.float64, device="cpu") * math.hypot(
            level.alpha, level.sigma
        )
        return flat.reshape(shape).to(device, kind)

    with torch.no_grad(), tqdm(disable=not progress, desc="rk45", unit="evaluation") as bar:

        def slope(angle: float, state: object) -> object:
            level = level_at(angle)
            x0, eps = run.evaluate(physical(state, level), level.t)
            bar.update()
            if level.sigma == 0:  # there x says nothing about the noise, whose mean is 0
                eps = torch.where(torch.isfinite(eps), eps, 0.0)
            r = math.hypot(level.alpha, level.sigma)
            turn = (level.alpha / r) * eps - (level.sigma / r) * x0
            return turn.reshape(-1).to("cpu", torch.float64).numpy()

        begin = run.x.detach().reshape(-1).to("cpu", torch.float64)
        found = solve_ivp(
            slope,
            angles,
            (begin / math.hypot(first.alpha, first.sigma)).numpy(),
            method="RK45",
            t_eval=None if run.record is not None else angles,
            rtol=rtol,
            atol=atol,
        )
        if not found.success:
            hint = (
                ""
                if first.signal
                else "; a gate (Tikhonov, empirical Bayes) makes the flow singular where alpha = 0,"
                " as at the start here: take euler or heun, or a process like EDM"
            )
            raise RuntimeError(f"rk45 stopped: {found.message.rstrip('.')}{hint}")
        levels = [level_at(float(angle)) for angle in found.t]
        states = [physical(y, level) for y, level in zip(found.y.T, levels, strict=True)]
        run.x = states[-1]
        if denoise_last and last.sigma > end.sigma:
            run.x = held(*run.evaluate(run.x, last.t), end)
            levels, states = [*levels, end], [*states, run.x]
    if run.record is not None:
        run.record = states
    return run.samples(
        torch.tensor([level.t for level in levels], dtype=torch.float64, device="cpu")
    )
