"""The reverse SDE."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memokern.conditional import Label
from memokern.samplers.base import Denoises, Run, Samples, Watch, levels_of

SDE_STEPS = 200


def sde(
    denoiser: Denoises,
    start: int | Tensor,
    steps: int = SDE_STEPS,
    *,
    sigma_min: float | None = None,
    denoise_last: bool = False,
    label: Label = None,
    bias: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    trajectory: bool = False,
    watch: Watch | None = None,
) -> Samples:
    r"""Samples of the reverse SDE, dx = (f x - g^2 score) dt + g dW with t from noise to data, by
    the Euler-Maruyama scheme (Anderson 1982; Song et al., arXiv 2011.13456).

    A step into sigma = 0 or out of alpha = 0, where its coefficients are infinite or overshoot, is
    taken with x0 held instead: x = alpha' x0 + sigma' z.

    Args: as :func:`ode`. A step leaves noise of variance g^2 \|dt\|, which should be small beside
        sigma_min^2 where the run stops early: this takes several hundred steps on even grids.

    Returns:
        :class:`Samples`; nfe = steps.

    Raises, Gradients: as :func:`ode`. Cost: one sweep per step.

    Example:
        >>> import torch
        >>> from memokern import Denoiser, samplers
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> samplers.sde(Denoiser(rows), 2, seed=0).x.abs().tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    run = Run(
        denoiser, start, label=label, bias=bias, seed=seed, generator=generator, dtype=dtype,
        trajectory=trajectory, watch=watch,
    )  # fmt: skip
    process = run.process
    levels = levels_of(process, steps, sigma_min, denoise_last)
    with run.gradients():
        for now, to in tqdm(list(pairwise(levels)), disable=not progress, desc="sde"):
            x0, eps = run.evaluate(run.x, now.t)
            if to.sigma == 0:
                run.x = to.alpha * x0
            elif not now.signal:
                run.x = to.alpha * x0 + to.sigma * run.noise()
            else:
                time = torch.tensor(now.t, dtype=torch.float64, device="cpu")
                dt = to.t - now.t
                # score = -eps / sigma. |dt|, because g belongs to the noising, whichever way t
                # runs.
                variance = float(process.diffusion(time).square()) * abs(dt)
                drift = float(process.drift(time)) * dt
                run.x = (1 + drift) * run.x - (variance / now.sigma) * eps
                run.x = run.x + math.sqrt(variance) * run.noise()
            run.keep()
    return run.samples(
        torch.tensor([level.t for level in levels], dtype=torch.float64, device="cpu")
    )
