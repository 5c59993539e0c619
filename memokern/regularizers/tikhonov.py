"""Tikhonov: a penalty on the length of the score."""

from __future__ import annotations

from torch import Tensor

from memokern.regularizers.base import Level, Query, Regularizer, check_level, level_at, shrink
from memokern.results import Posterior
from memokern.validate import wide


class Tikhonov(Regularizer):
    r"""score = (alpha mean - x) / (sigma^2 + c), while the weights keep sigma^2.

    It is the minimiser of E\|s - s_target\|^2 + (c / sigma^2) \|s\|^2. Potential:
    sigma^2 / (sigma^2 + c) log Z.

    Args:
        c: >= 0, in units of sigma^2; a number or a function of sigma [\*batch].

    Raises: TypeError, ValueError for c out of range.

    Source: arXiv 2501.15785, eq. 5.7.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Tikhonov, evaluate
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Tikhonov(3.0)).score.tolist()
        [[-0.5]]
    """

    def __init__(self, c: Level) -> None:
        self.c = check_level("c", c, 0.0)

    def _factor(self, sigma: Tensor) -> Tensor:
        return shrink(sigma.square(), level_at("c", self.c, sigma, 0.0))

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        return wide(self._factor(query.sigma), residual) * residual

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor:
        return self._factor(query.sigma) * divergence

    def level_gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        return self._factor(sigma)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return self._factor(query.sigma) * posterior.log_z
