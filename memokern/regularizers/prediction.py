"""The regularised evaluation, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memokern import results, sweep, validate
from memokern.regularizers.base import Data, Query, Regularizer
from memokern.results import Posterior
from memokern.sweep import NOTHING, Own
from memokern.util.torch_internals import traced
from memokern.validate import PerQuery, wide

# It stands for sigma = 0 where a gate is divided by sigma^2: its square is still a normal float64.
SMALLEST = 1e-150
# Beyond it, a score at SMALLEST grows without bound as sigma falls.
LARGEST = 1e100


@dataclass(frozen=True)
class Prediction:
    r"""The result of a regularised evaluation.

    Attributes:
        x: the queries [\*batch, \*shape]. sigma, alpha: as asked, [\*batch] float64.
        x0: mean + (R' - R) / alpha. residual: R' = sigma^2 score. Both [\*batch, \*shape], in x's
            type, float32 for half-precision queries.
        posterior: of the sweep behind it, with the sigma and temperature that the regulariser
        chose. query, regularizer: what `log_potential` is computed from.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    x0: Tensor
    residual: Tensor
    posterior: Posterior
    query: Query = field(repr=False)
    regularizer: Regularizer

    @property
    def log_potential(self) -> Tensor | None:
        r"""phi [\*batch] such that score = grad_x phi, None where there is none. It is computed at
        each access."""
        return self.regularizer.log_potential(self.posterior, self.query)

    @property
    def score(self) -> Tensor:
        """R' / sigma^2 [*batch, *shape]. At sigma = 0 the limit, which is finite where the
        regulariser's gate falls like sigma^2: (mean - x) / c for `Tikhonov(c)`."""
        sigma = wide(self.sigma, self.x)
        value = self.residual / sigma / sigma
        if self._gated_at_zero():
            value = torch.where(sigma == 0, self._score_near_zero(), value)
        return value

    @property
    def eps(self) -> Tensor:
        """-sigma score; at sigma = 0 it is 0 where the score is finite."""
        sigma = wide(self.sigma, self.x)
        value = -self.residual / sigma
        if self._gated_at_zero():
            value = torch.where(sigma == 0, -sigma * self._score_near_zero(), value)
        return value

    def _gated_at_zero(self) -> bool:
        """Whether some sigma is 0 and a gate may keep the score finite there. Under a compiler or a
        transform, which have no values, it is not looked for."""
        gates = type(self.regularizer) is not Regularizer
        return gates and not traced(self.sigma) and bool((self.sigma == 0).any())

    def _score_near_zero(self) -> Tensor:
        """The score at SMALLEST in place of sigma = 0, in float64, whose range holds its square;
        infinite where no gate bounds it."""
        s = self.query.sigma
        near = replace(self.query, sigma=torch.where(s == 0, SMALLEST, s))
        plain = self.posterior.residual.to(torch.float64)
        gated = self.regularizer.gather(self.regularizer.gate(plain, near, self.posterior))
        score = gated / SMALLEST / SMALLEST
        return torch.where(score.abs() < LARGEST, score, score * torch.inf).to(self.x.dtype)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return wide(self.alpha, self.x) * self.eps - wide(self.sigma, self.x) * self.x0

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """alpha' x0 + sigma' eps, dx/dt of the probability flow. At sigma = 0 eps is the noise's
        mean, 0."""
        return results.flow_velocity(self.x0, self.residual, self.sigma, d_alpha, d_sigma)


def evaluate(
    x: Tensor,
    data: Data,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    regularizer: Regularizer | None = None,
    bias: Tensor | None = None,
    method: str = "auto",
    certificate: bool = False,
) -> Prediction:
    r"""The regularised score at x, and x0, eps, v and velocity from it.

    Args: as :func:`memokern.posterior`. regularizer: None gives the score that memorises.

    Raises, Numerics, Gradients: as :func:`memokern.posterior`; TypeError for what is no
    regulariser.

    Where alpha = 0, x says nothing about the data, and x0 is the mean, ungated. For alpha near 0 a
    gated x0 grows like x / alpha: the probability flow of a process that starts at alpha = 0 (flow
    matching, cosine) is singular there with such a regulariser, and its end depends on the steps.

    Cost: one sweep, times the queries that the regulariser makes of one.

    Example:
        >>> import torch
        >>> from memokern.regularizers import evaluate
        >>> evaluate(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 2.0).score.tolist()
        [[-0.5]]
    """
    return evaluate_each(
        x, data, sigma, alpha, regularizer=regularizer, bias=bias, method=method,
        certificate=certificate,
    )  # fmt: skip


def weighting_of(
    regularizer: Regularizer | None,
    x: Tensor,
    data: Data,
    sigma: PerQuery,
    alpha: PerQuery,
    bias: Tensor | None,
) -> str:
    """Which weighting the sweep of these queries will be asked for."""
    if regularizer is None:
        return "gaussian"
    return regularizer.prepare(_query(x, data, sigma, alpha, bias), data).weighting


def evaluate_each(
    x: Tensor,
    data: Data,
    sigma: PerQuery,
    alpha: PerQuery,
    own: Own = NOTHING,
    *,
    regularizer: Regularizer | None,
    bias: Tensor | None,
    method: str,
    certificate: bool,
) -> Prediction:
    """:func:`evaluate`, of queries [B, *shape] that may each ask for something of their own."""
    reg = Regularizer() if regularizer is None else regularizer
    if not isinstance(reg, Regularizer):
        raise TypeError(
            f"expected regularizer as a memokern.regularizers.Regularizer, got"
            f" {type(regularizer).__name__}; parse('tikhonov:c=0.01') makes one from text"
        )
    x = validate.computable(x)
    asked = _query(x, data, sigma, alpha, bias)
    replicated = reg.replicate(asked)
    query = reg.prepare(replicated, data)
    if own:
        own = own.repeated(query.sigma.numel() // max(1, asked.sigma.numel()))
    posterior = sweep.posterior(
        query.x, data, query.sigma, query.alpha, query.temperature, query.bias, own,
        weighting=query.weighting, method=method, certificate=certificate,
    )  # fmt: skip
    plain = posterior.residual
    gated = reg.gate(plain, replicated, posterior)
    residual = reg.gather(gated)
    back = posterior.mean
    if gated is not plain:
        # This is x0 = (x + R') / alpha, written so that nothing cancels.
        a = wide(replicated.alpha, replicated.x)
        back = back + torch.where(a == 0, 0.0, (gated - plain) / torch.where(a == 0, 1.0, a))
    x0 = reg.gather(back)
    return Prediction(x, asked.sigma, asked.alpha, x0, residual, posterior, replicated, reg)


def _query(x: Tensor, data: Data, sigma: PerQuery, alpha: PerQuery, bias: Tensor | None) -> Query:
    """The query that was asked; sigma and alpha checked, and broadcast to the batch."""
    batch = validate.batch_shape(x, data)
    s = validate.per_query("sigma", sigma, batch, x.device)
    a = validate.per_query("alpha", alpha, batch, x.device)
    return Query(x, s, a, torch.ones_like(s), bias)
