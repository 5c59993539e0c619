"""What the public functions return."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import Query, State, to_sums
from memokern.calls import merge as merge_states
from memokern.strategies.certificate import Certificate
from memokern.util.torch_internals import traced
from memokern.validate import PerQuery, log_sum_exp, per_query, wide


@dataclass(frozen=True, kw_only=True)
class Posterior:
    r"""What one sweep over the data says about x = alpha y + sigma z, y a row, z standard normal.

    With logits l_n = -\|x - alpha y_n\|^2 / (2 sigma^2) + b_n and weights w = softmax(l / T).

    Attributes:
        x: the queries [\*batch, \*shape].
        mean: sum w y, the ideal denoiser's x0 [\*batch, \*shape], in x's type.
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
    def residual(self) -> Tensor:
        """alpha mean - x = sigma^2 score, finite at every sigma."""
        return self._wide(self.alpha) * self.mean - self.x

    @property
    def score(self) -> Tensor:
        """(alpha mean - x) / sigma^2; not finite at sigma = 0, even where x is a row (0 / 0)."""
        return self.residual / self._wide(self.sigma) / self._wide(self.sigma)

    @property
    def eps(self) -> Tensor:
        """(x - alpha mean) / sigma = -sigma score."""
        return -self.residual / self._wide(self.sigma)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma mean (Salimans & Ho, arXiv 2202.00512)."""
        return self._wide(self.alpha) * self.eps - self._wide(self.sigma) * self.mean

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """alpha' mean + sigma' eps: dx/dt of the probability flow.

        The default derivatives are those of flow matching's straight path, alpha = t,
        sigma = 1 - t, where it is (mean - x) / (1 - t) (arXiv 2506.03719).
        """
        return flow_velocity(self.mean, self.eps, self.sigma.shape, d_alpha, d_sigma)

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

        A difference of two squares: absolute error about 1e-7 |x - alpha mean|^2 / alpha^2 for
        float32 queries, and 0 where that is larger than the trace. Gaussian kernel, alpha != 0.
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


@dataclass(frozen=True, kw_only=True)
class PosteriorState:
    r"""What a sweep over some of the rows leaves, before it is normalised; :func:`merge` joins
    those of several parts of the data, whatever sigma is.

    Attributes:
        x: the queries [\*batch, \*shape]. sigma, alpha, temperature: as used, [\*batch] float64.
        weighting: as asked for.
        state: the sums, of the queries as [B], B their number: see :class:`memokern.calls.State`.
        n: how many rows were swept. log_weight_total: log sum_n exp(b_n) over them, [] float64.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[0.0], [1.0], [4.0]])
        >>> x = torch.tensor([[2.5]])
        >>> halves = [memokern.posterior_state(x, part, 0.0) for part in (rows[:2], rows[2:])]
        >>> memokern.merge(*halves).posterior().mean  # 1 and 4 are equally near
        tensor([[2.5000]])
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    weighting: str
    state: State
    n: int
    log_weight_total: Tensor

    @property
    def query(self) -> Query:
        """The queries as the operations take them; the bias is in the state."""
        b, dim = self.state.acc.shape
        return Query(
            self.x.reshape(b, dim),
            self.sigma.reshape(-1),
            self.alpha.reshape(-1),
            self.temperature.reshape(-1),
            weighting=self.weighting,
        )

    def posterior(self) -> Posterior:
        """The posterior over the rows swept so far. Without rows that have weight: log_z -inf, the
        other sums NaN."""
        batch, sums = self.sigma.shape, to_sums(self.state, self.query)
        return Posterior(
            x=self.x,
            mean=sums.mean.reshape(self.x.shape),
            log_z=sums.log_z.reshape(batch),
            mean_logit=sums.mean_logit.reshape(batch),
            mean_bias=sums.mean_bias.reshape(batch),
            weight_sq=sums.weight_sq.reshape(batch),
            sigma=self.sigma,
            alpha=self.alpha,
            temperature=self.temperature,
            n=self.n,
            dim=self.state.acc.shape[1],
            log_weight_total=self.log_weight_total,
        )


def merge(*states: PosteriorState) -> PosteriorState:
    """The state of all rows that these states were swept over; of one state, itself.

    The sum is associative and commutative up to rounding. Gradients flow through it.

    Raises: TypeError for anything but states. ValueError for none at all, and for states of other
    queries, sigma, alpha, temperature or weighting.

    Cost: a few operations on [B, D] for each state.

    Example:
        >>> import torch, memokern
        >>> rows, x = torch.randn(10, 3), torch.zeros(2, 3)
        >>> parts = [memokern.posterior_state(x, part, 0.5) for part in rows.split(4)]
        >>> whole = memokern.posterior(x, rows, 0.5)
        >>> bool(torch.allclose(memokern.merge(*parts).posterior().mean, whole.mean, atol=1e-6))
        True
    """
    if not states:
        raise ValueError("merge needs at least one state")
    for state in states:
        if not isinstance(state, PosteriorState):
            raise TypeError(
                f"expected states of memokern.posterior_state, got {type(state).__name__}"
            )
    first, *rest = states
    if not rest:
        return first
    total, n = first.state, first.n
    for state in rest:
        _require_same_queries(first, state)
        total = merge_states(total, state.state)
        n += state.n
    # Not logaddexp, whose second derivatives are NaN where one part has no rows.
    totals = torch.stack([state.log_weight_total for state in states])
    return replace(first, state=total, n=n, log_weight_total=log_sum_exp(totals))


def _require_same_queries(a: PosteriorState, b: PosteriorState) -> None:
    if a.weighting != b.weighting:
        raise ValueError(f"expected states of one weighting, got {a.weighting} and {b.weighting}")
    for name in ("x", "sigma", "alpha", "temperature"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine.shape != other.shape or mine.dtype != other.dtype or mine.device != other.device:
            raise ValueError(
                f"expected states of the same queries: {name} is {mine.dtype} {list(mine.shape)} on"
                f" {mine.device} and {other.dtype} {list(other.shape)} on {other.device}"
            )
        if mine is other or traced(mine, other):
            continue
        if not bool(((mine == other) | (mine.isnan() & other.isnan())).all()):
            raise ValueError(f"expected states of the same queries, and their {name} differs")


class Nearest(NamedTuple):
    """`distance` [*batch, k] float64, L2, ascending; `index` [*batch, k] int64 into the rows."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def flow_velocity(
    x0: Tensor, eps: Tensor, batch: torch.Size, d_alpha: PerQuery, d_sigma: PerQuery
) -> Tensor:
    """alpha' x0 + sigma' eps, the probability flow's dx/dt: it is finite wherever eps is."""
    da = per_query("d_alpha", d_alpha, batch, x0.device)
    ds = per_query("d_sigma", d_sigma, batch, x0.device)
    return wide(da, x0) * x0 + wide(ds, x0) * eps
