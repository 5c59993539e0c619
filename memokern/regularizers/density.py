"""Empirical Bayes: a floor under the density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern.regularizers.base import Level, Query, Regularizer, check_level, level_at
from memokern.results import Posterior
from memokern.validate import wide


class EmpiricalBayes(Regularizer):
    r"""Weights exp(l_n) / max(Z, tau): score = (alpha mean - x) / sigma^2 min(1, Z / tau).

    This regulariser is asymptotically consistent. Far from the data, where the density is not
    known, the score fades. Potential: log Z where Z > tau, else Z / tau + log tau - 1.

    Args:
        log_tau: log tau, a number or a function of sigma. The logarithm is given because Z is about
            N exp(-D/2) at a typical x, which underflows in high dimension.
        normalized: True puts the floor on the density p(x) instead of on Z.

    Raises: TypeError, ValueError for log_tau out of range.

    Numerics: at sigma = 0 the score fades everywhere but on the rows: x0 = x / alpha.

    Source: arXiv 2501.15785, section 5.2; Wibisono et al., arXiv 2402.07747.

    Example:
        >>> import torch
        >>> from memokern.regularizers import EmpiricalBayes, evaluate
        >>> x, rows = torch.tensor([[2.0]]), torch.tensor([[0.0]])  # log Z = -2
        >>> s = evaluate(x, rows, 1.0, regularizer=EmpiricalBayes(log_tau=-1.0)).score
        >>> round(s.item(), 4)  # -2 exp(-1)
        -0.7358
    """

    def __init__(self, log_tau: Level, normalized: bool = False) -> None:
        self.log_tau = check_level("log_tau", log_tau, -math.inf, strict=True)
        self.normalized = bool(normalized)

    def _excess(self, posterior: Posterior, query: Query) -> Tensor:
        """log(Z / tau), or log(p(x) / tau) if normalized."""
        log_p = posterior.log_z
        if self.normalized:
            # At sigma = 0 the density becomes infinite on a row and 0 elsewhere.
            spike = torch.where(torch.isneginf(log_p), log_p, torch.inf)
            log_p = torch.where(posterior.sigma == 0, spike, posterior.log_density)
        return log_p - level_at("log_tau", self.log_tau, query.sigma, -math.inf)

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        return wide(self._excess(posterior, query).clamp(max=0.0).exp(), residual) * residual

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor:
        # The gate g = Z / tau has grad g = g s, with s the score before all gates.
        excess = self._excess(posterior, query)
        plain = posterior.residual.to(torch.float64).flatten(posterior.sigma.dim())
        along = (plain * residual.to(torch.float64).flatten(posterior.sigma.dim())).sum(-1)
        slope = torch.where(excess < 0, along / posterior.sigma / posterior.sigma, 0.0)
        return excess.clamp(max=0.0).exp() * (divergence + slope)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        excess = self._excess(posterior, query)
        log_tau = level_at("log_tau", self.log_tau, query.sigma, -math.inf)
        return log_tau + torch.where(excess > 0, excess, torch.exp(excess.clamp(max=0.0)) - 1)
