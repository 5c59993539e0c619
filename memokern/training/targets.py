"""What a network is regressed on: one-sample targets, and posterior means over a reference batch.

The usual target of denoising is the sample's own row, whose variance is large where several rows
could have given x_t. The mean over a reference batch has the same minimiser on the whole set, and
less variance. Each function here replaces the lines of the published code that it names, in one
sweep, without their [B, M] weights and [B, M, D] differences.

All of them return targets without a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memokern import functional, validate
from memokern.conditional import Label
from memokern.data.training_set import TrainingSet
from memokern.denoiser import PREDICTIONS, Denoiser
from memokern.processes import FlowMatching, Process
from memokern.results import Posterior
from memokern.validate import PerQuery, wide


def noised(y: Tensor, noise: Tensor, t: PerQuery, process: Process) -> Tensor:
    r"""x_t = alpha(t) y + sigma(t) noise [B, \*shape] in y's type.

    Args: y, noise: [B, \*shape]. t: a number or [B].

    Example:
        >>> import torch
        >>> from memokern.processes import FlowMatching
        >>> from memokern.training import targets
        >>> targets.noised(torch.ones(1, 2), torch.zeros(1, 2), 0.25, FlowMatching()).tolist()
        [[0.25, 0.25]]
    """
    time = validate.per_query("t", t, y.shape[:1], y.device)
    return wide(process.alpha(time), y) * y + wide(process.sigma(time), y) * noise


@torch.no_grad()
def denoising(
    y: Tensor, noise: Tensor, t: PerQuery, process: Process, prediction: str = "x0"
) -> Tensor:
    r"""The one-sample target of x_t = alpha y + sigma noise, [B, \*shape] in y's type.

    x0: y. eps: noise. v: alpha noise - sigma y. score: -noise / sigma. velocity: alpha' y +
    sigma' noise, dx/dt along the sample's own path. Finite where these are.

    Args: as :func:`noised`; prediction as :class:`memokern.Denoiser`.

    Raises: ValueError for an unknown prediction.

    Replaces: `u_t = x1 - x0` of torchcfm, `v = alpha * noise - sigma * x0` of diffusers
    (`get_velocity`), `target = x` of EDM's `EDMLoss`.

    Example:
        >>> import torch
        >>> from memokern.processes import FlowMatching
        >>> from memokern.training import targets
        >>> y, z = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> targets.denoising(y, z, 1.0, FlowMatching(), "velocity").tolist()
        [[2.0]]
    """
    validate.one_of("prediction", prediction, PREDICTIONS)
    if prediction == "x0":
        return y
    if prediction == "eps":
        return noise
    time = validate.per_query("t", t, y.shape[:1], y.device)
    if prediction == "velocity":
        return wide(process.d_alpha(time), y) * y + wide(process.d_sigma(time), y) * noise
    alpha, sigma = wide(process.alpha(time), y), wide(process.sigma(time), y)
    return alpha * noise - sigma * y if prediction == "v" else -noise / sigma


@torch.no_grad()
def stable(
    x_t: Tensor,
    reference: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    own: Tensor | None = None,
) -> Tensor:
    r"""The stable target field: E[y \| x_t] over a reference batch, the target for x0
    [B, \*shape] in x_t's type.

    Args:
        x_t: [B, \*shape], x_t = alpha y + sigma z.
        reference: M rows [M, \*shape], a fresh tensor for each batch, or a TrainingSet. It should
            hold the batch's own rows y, as the published code has it; or give them as `own`.
        sigma, alpha: numbers or [B].
        own: [B, \*shape], row i in addition for query i alone. Rows of the reference that are the
            same count as others.

    Raises: TypeError, ValueError as :func:`memokern.posterior`.

    Numerics: as :func:`memokern.posterior`: right at small sigma too, where the published code's
    weights are those of whatever row rounding prefers; sigma = 0 gives the nearest row.

    Cost: one sweep over the reference; own adds a few operations on [B, D].

    Replaces: `stf_scores` of Newbeeer/stf, training/loss.py (Xu et al., arXiv 2302.00670).

    Example:
        >>> import torch
        >>> from memokern.training import targets
        >>> y = torch.tensor([[-1.0], [1.0]])
        >>> targets.stable(torch.zeros(2, 1), y, sigma=1.0).tolist()
        [[0.0], [0.0]]
    """
    found = functional.posterior(x_t, reference, sigma, alpha)
    mean = found.mean
    if own is not None:
        share = wide(_own_share(found, own, reference), mean)
        mean = torch.lerp(mean, own.to(mean.dtype), share)
    return mean.to(x_t.dtype)


@torch.no_grad()
def flow_matching(
    x_t: Tensor,
    reference: TrainingSet | Tensor,
    t: PerQuery,
    *,
    own: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Empirical flow matching: u = sum_n w_n (y_n - x_t) / (1 - t) over a reference batch
    [B, \*shape] in x_t's type, for the path x_t = t y + (1 - t) noise.

    Args:
        x_t, reference: as :func:`stable`. t: in [0, 1], a number or [B].
        own: [B, \*shape], the sample's own row, forced in as one row more for query i alone, so
            that the mean of the targets is the flow of the whole set whatever the reference is.
        noise: [B, \*shape], the sample's own noise, with `own`: its own target is then own - noise,
            exact for every t; from x_t alone its rounding is divided by 1 - t.

    Raises: TypeError, ValueError as :func:`memokern.posterior`; ValueError for t outside [0, 1] and
    for noise without own.

    Numerics: finite for every t. At t = 0 all rows weigh the same, u = mean y - x_t. At t = 1,
    where x_t says nothing about the noise, it counts as its mean 0 unless it is given: u = y.

    Cost: as :func:`stable`.

    Replaces: the mean over M samples of closedformfm, src/utils/mean_cfm.py (Bertrand et al., arXiv
    2506.03719), whose log density lacks a factor d and which divides by 0 at t = 1.

    Example:
        >>> import torch
        >>> from memokern.training import targets
        >>> y = torch.tensor([[-1.0], [3.0]])
        >>> targets.flow_matching(torch.zeros(1, 1), y, 0.0).tolist()
        [[1.0]]
        >>> targets.flow_matching(y, y, 1.0).tolist()
        [[-1.0], [3.0]]
    """
    if noise is not None and own is None:
        raise ValueError("noise is the noise of the sample's own row: give own as well")
    query = validate.computable(x_t)
    batch = validate.batch_shape(query, reference)
    time = validate.per_query("t", t, batch, query.device)
    validate.require("t", t, time, (time >= 0) & (time <= 1), "in [0, 1]")
    found = functional.posterior(query, reference, 1 - time, time)
    velocity = found.velocity(1.0, -1.0)
    if own is not None:
        mine = own.to(velocity.dtype)
        if noise is None:
            left = wide(1 - time, query)
            toward = (mine - query) / torch.where(left == 0, 1.0, left)
            toward = torch.where(left == 0, mine, toward)
        else:
            toward = mine - noise.to(velocity.dtype)
        velocity = torch.lerp(velocity, toward, wide(_own_share(found, own, reference), velocity))
    return velocity.to(x_t.dtype)


def _own_share(found: Posterior, own: Tensor, reference: TrainingSet | Tensor) -> Tensor:
    """The weight [B] of one row more for each query, beside those that were swept."""
    if own.shape != found.x.shape:
        raise ValueError(
            f"expected own like x_t, {list(found.x.shape)}, got {list(own.shape)}: one row for each"
        )
    axes = found.sigma.dim()
    gap = found.x.double() - wide(found.alpha, own.double()) * own.double()
    square = gap.flatten(axes).square().sum(-1)
    zero = found.sigma == 0
    scale = torch.where(zero, 1.0, found.sigma)
    share = torch.sigmoid(-square / 2 / scale / scale - found.log_z)
    if bool(zero.any()):
        # The nearest takes all; if both are equally near, each row has its share.
        scaled = found.x / wide(torch.where(found.alpha == 0, 1.0, found.alpha), found.x)
        theirs = functional.nearest(scaled, reference).distance[..., 0] * found.alpha.abs()
        mine, tied = square.sqrt(), 1 / (1 + found.ess)
        limit = torch.where(mine < theirs, 1.0, torch.where(mine == theirs, tied, 0.0))
        share = torch.where(zero, limit, share)
    return share


@torch.no_grad()
def stable_velocity(
    x_t: Tensor,
    bank: Denoiser | TrainingSet | Tensor,
    t: PerQuery,
    label: Label = None,
    *,
    process: Process | None = None,
) -> Tensor:
    r"""The velocity's mean over a bank of rows, of the query's own class: sum_n w_n (alpha' y_n +
    sigma' (x_t - alpha y_n) / sigma) [B, \*shape] in x_t's type.

    Args:
        x_t: [B, \*shape]. t: times of the process, a number or [B].
        bank: rows with labels; a TrainingSet, or a :class:`memokern.Denoiser` made of it once,
            which keeps the rows of each class and whose process is then used.
        label: as :meth:`memokern.Denoiser.evaluate`: [B] integers, one, or None for all rows.
        process: by default that of the published code, data at t = 0 and noise at t = 1.

    Raises: TypeError, ValueError as :meth:`memokern.Denoiser.evaluate`; ValueError for a process
    beside a Denoiser.

    Numerics: logits are not cut off; the published code's floor at -1e4 ties all rows in high
    dimension. At sigma = 0 as :class:`memokern.Denoiser`.

    Cost: one sweep over the rows of each class that occurs.

    Replaces: `_stable_target` of linYDTHU/StableVelocity, StableVM/loss.py.

    Example:
        >>> import torch
        >>> from memokern import TrainingSet
        >>> from memokern.training import targets
        >>> bank = TrainingSet(torch.tensor([[-1.0], [1.0], [5.0]]), labels=[0, 0, 1])
        >>> targets.stable_velocity(torch.ones(2, 1), bank, 1.0, torch.tensor([0, 1])).tolist()
        [[1.0], [-4.0]]
    """
    if isinstance(bank, Denoiser):
        if process is not None:
            raise ValueError("a Denoiser has a process of its own: leave process out")
        found = bank
    else:
        process = FlowMatching(reverse=True) if process is None else process
        found = Denoiser(bank, process, prediction="velocity")
    time = validate.per_query("t", t, x_t.shape[:1], x_t.device)
    if found.prediction == "velocity":
        return found(x_t, time, label)
    d_alpha, d_sigma = found.process.d_alpha(time), found.process.d_sigma(time)
    return found.evaluate(x_t, time, label).velocity(d_alpha, d_sigma).to(x_t.dtype)
