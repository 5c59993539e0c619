"""What the public functions return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.strategies.certificate import Certificate
from memokern.validate import PerQuery, per_query, wide


@dataclass(frozen=True, kw_only=True)
class Posterior:
    r"""What one sweep over the data says about x = alpha y + sigma z, y a row, z standard normal.

    With logits l_n = -\|x - alpha y_n\|^2 / (2 sigma^2) + b_n and weights w = softmax(l / T).

    Attributes:
        x: the queries [\*batch, \*shape].
        mean: sum w y, the ideal denoiser's x0 [\*batch, \*shape], in x's type.
        residual: sum w (alpha y - x) = alpha mean - x = sigma^2 score [\*batch, \*shape], in x's
            type, finite at every sigma. Its error is relative to the distances \|x - alpha y\|
            that matter and to sigma (float32: about 1e-6 of them, 1e-5 at most), where that of
            alpha mean - x is relative to x. Score, eps, v and velocity are formed from it.
        log_z: T logsumexp(l / T); mean_logit: sum w l; mean_bias: sum w b; weight_sq: sum w^2;
            each [\*batch] float64.
        sigma, alpha, temperature: as used, [\*batch] float64.
        n: the number of rows N.
        log_weight_total: log sum_n exp(b_n), [] float64; without a bias log N, a float.
        dim: D.
        certificate: bounds on what pruning changed, where they were asked for.
    """

    x: Tensor
    mean: Tensor
    residual: Tensor
    log_z: Tensor
    mean_logit: Tensor
    mean_bias: Tensor
    weight_sq: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    n: int
    dim: int
    log_weight_total: Tensor | float
    certificate: Certificate | None = None

    def _wide(self, value: Tensor) -> Tensor:
        return wide(value, self.x)

    @property
    def score(self) -> Tensor:
        """(alpha mean - x) / sigma^2; not finite at sigma = 0, even where x is a row (0 / 0). Gated
        scores are, see :class:`memokern.regularizers.Prediction`."""
        return self.residual / self._wide(self.sigma) / self._wide(self.sigma)

    @property
    def eps(self) -> Tensor:
        """(x - alpha mean) / sigma = -sigma score; not finite at sigma = 0."""
        return -self.residual / self._wide(self.sigma)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma mean (Salimans & Ho, arXiv 2202.00512); not finite at sigma = 0."""
        return self._wide(self.alpha) * self.eps - self._wide(self.sigma) * self.mean

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """alpha' mean + sigma' eps: dx/dt of the probability flow.

        The default derivatives are those of flow matching's straight path, alpha = t,
        sigma = 1 - t, where it is (mean - x) / (1 - t) (arXiv 2506.03719). At sigma = 0 eps is the
        noise's mean, 0.
        """
        return flow_velocity(self.mean, self.residual, self.sigma, d_alpha, d_sigma)

    @property
    def log_density(self) -> Tensor:
        """log_z - log sum exp b - (D / 2) log(2 pi sigma^2): the mixture's log p(x) [*batch]."""
        half_log = math.log(2 * math.pi) / 2 + torch.log(self.sigma)
        return self.log_z - self.log_weight_total - self.dim * half_log

    @property
    def ess(self) -> Tensor:
        """1 / sum w^2: how many rows share the weight, from 1 (memorised) to N."""
        return 1 / self.weight_sq

    @property
    def entropy(self) -> Tensor:
        """-sum w log w = (log_z - mean_logit) / T; at sigma = 0 the limit, log ess (equal ties)."""
        value = (self.log_z - self.mean_logit) / self.temperature
        limit = ~(torch.isfinite(self.log_z) & torch.isfinite(self.mean_logit))
        value = torch.where(limit, torch.log(self.ess), value)
        return value.clamp(min=0.0)

    @property
    def covariance_trace(self) -> Tensor:
        """tr Cov_w(y) = (-2 sigma^2 (sum w l - sum w b) - |x - alpha mean|^2) / alpha^2.

        A difference of two squares: absolute error up to about 2e-6 sum w |x - alpha y|^2 / alpha^2
        for float32 queries, whatever the bias, and 0 where that is larger than the trace. Gaussian
        kernel, alpha != 0.
        """
        r2 = -2 * self.sigma.square() * (self.mean_logit - self.mean_bias)
        gap = self.residual.to(torch.float64)
        gap = gap.flatten(self.sigma.dim()).square().sum(-1)
        trace = (r2 - gap) / self.alpha.square()
        return torch.where(self.sigma == 0, 0.0, trace.clamp(min=0.0))

    @property
    def divergence(self) -> Tensor:
        """div score = alpha^2 tr C / (T sigma^4) - D / sigma^2, exact: no Hutchinson estimator."""
        s2 = self.sigma.square()
        return (
            self.alpha.square() * self.covariance_trace / (self.temperature * s2) - self.dim
        ) / s2


class Nearest(NamedTuple):
    """`distance` [*batch, k] float64, L2, ascending; `index` [*batch, k] int64 into the rows."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def flow_velocity(
    x0: Tensor, residual: Tensor, sigma: Tensor, d_alpha: PerQuery, d_sigma: PerQuery
) -> Tensor:
    """alpha' x0 + sigma' eps with eps = -residual / sigma, the probability flow's dx/dt.

    At sigma = 0, where x says nothing about the noise, eps is the noise's mean, 0.
    """
    da = per_query("d_alpha", d_alpha, sigma.shape, x0.device)
    ds = per_query("d_sigma", d_sigma, sigma.shape, x0.device)
    zero = sigma == 0
    eps = -residual / wide(torch.where(zero, 1.0, sigma), x0)
    turn = torch.where(wide(zero, x0) != 0, 0.0, wide(ds, x0) * eps)
    return wide(da, x0) * x0 + turn
