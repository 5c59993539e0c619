"""Smoothing of the score, and of the training rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memokern.regularizers.base import (
    Data,
    Level,
    Query,
    Regularizer,
    check_level,
    level_at,
    shrink,
)
from memokern.results import Posterior
from memokern.util import checks
from memokern.validate import wide

# What to use instead of two: the variances of shifts, and of bandwidths, add.
INSTEAD = "use h = sqrt(h1^2 + h2^2)"


class GaussianSmoothing(Regularizer):
    r"""The score averaged over M shifted queries x + h eps_m, with the same standard normal eps_m
    for every query.

    A shift by h eps_m is the row bias h alpha <eps_m, y_n> / sigma^2, up to a constant. The shifts
    come in pairs eps, -eps, so that they average to zero. Potential: mean_m log Z(x + h eps_m).

    Args:
        h: > 0, in units of x; a number or a function of sigma. samples: M, even.
        seed: of the eps_m, which are the same at every call.

    Raises: TypeError, ValueError for parameters out of range.

    Cost: M times the sweep. torch.compile breaks the graph where the eps_m are drawn.

    Source: Scarvelis et al., arXiv 2310.12395; Gabriel et al., arXiv 2505.22841.

    Example:
        >>> import torch
        >>> from memokern.regularizers import GaussianSmoothing, evaluate
        >>> x, rows = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
        >>> evaluate(x, rows, 0.1, regularizer=GaussianSmoothing(0.5, 8)).x0.abs().item() < 1e-6
        True
    """

    once = INSTEAD

    def __init__(self, h: Level, samples: int = 16, seed: int = 0) -> None:
        self.h = check_level("h", h, 0.0, strict=True)
        self.samples = checks.integer("samples", samples, 2)
        if self.samples % 2:
            raise ValueError(f"expected an even number of samples (pairs), got {samples}")
        self.seed = checks.integer("seed", seed, -(2**63), 2**64 - 1)

    def shifts(self, query: Query) -> Tensor:
        r"""eps_m [M, \*shape] in x's type, in antithetic pairs."""
        shape = query.x.shape[query.sigma.dim() :]
        generator = torch.Generator().manual_seed(self.seed)
        half = torch.randn(
            self.samples // 2, *shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        return torch.cat([half, -half]).to(query.x)

    def replicate(self, query: Query) -> Query:
        eps = self.shifts(query)
        batch = query.sigma.dim()
        eps = eps.reshape(eps.shape[:1] + (1,) * batch + eps.shape[1:])
        x = query.x + wide(level_at("h", self.h, query.sigma, 0.0), query.x) * eps
        size = (self.samples, *query.sigma.shape)
        return replace(
            query,
            x=x,
            sigma=query.sigma.expand(size),
            alpha=query.alpha.expand(size),
            temperature=query.temperature.expand(size),
        )

    def gather(self, residual: Tensor) -> Tensor:
        return residual.mean(0)

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor:
        return divergence  # of the shifted queries, whose mean is taken by `gather`

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z.mean(0)


class SmoothedBank(Regularizer):
    r"""Each row becomes N(y_n, h^2 I): sigma^2 + alpha^2 h^2 replaces sigma^2 in weights and score.

    This is the exact score of the kernel density estimate of bandwidth h, diffused to sigma.
    Potential: log Z at the wider sigma.

    Args:
        h: >= 0, in the rows' units; a number or a function of sigma.

    Raises: TypeError, ValueError for h out of range.

    Example:
        >>> import torch
        >>> from memokern.regularizers import SmoothedBank, evaluate
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> round(evaluate(x, rows, 1.0, regularizer=SmoothedBank(1.0)).score.item(), 6)
        -1.0
    """

    once = INSTEAD

    def __init__(self, h: Level) -> None:
        self.h = check_level("h", h, 0.0)

    def _added_variance(self, query: Query) -> Tensor:
        """alpha^2 h^2."""
        return (query.alpha * level_at("h", self.h, query.sigma, 0.0)).square()

    def prepare(self, query: Query, data: Data) -> Query:
        h2 = self._added_variance(query)
        wider = (query.sigma.square() + h2).sqrt()
        return replace(query, sigma=torch.where(h2 == 0, query.sigma, wider))

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        return wide(self._factor(query), residual) * residual

    def _factor(self, query: Query) -> Tensor:
        return shrink(query.sigma.square(), self._added_variance(query))

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor:
        return self._factor(query) * divergence

    def level_gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        return None if callable(self.h) else shrink(sigma.square(), (alpha * self.h).square())

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z
