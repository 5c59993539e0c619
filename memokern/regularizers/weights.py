"""Weights that depend less on the noise level, or not at all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memokern.regularizers.base import Data, Level, Query, Regularizer, check_level, level_at
from memokern.results import Posterior
from memokern.util import checks


class Temperature(Regularizer):
    r"""w = softmax(l / T), T(sigma) = max(sigma_c / sigma, 1).

    Several rows share the weight at small noise. Potential: T logsumexp(l / T).

    Args:
        sigma_c: > 0, the noise level below which the weights are flattened; or a function that
            gives T itself from sigma.

    Raises: TypeError, ValueError for sigma_c out of range.

    Numerics: T is at most 1e300, which it reaches at sigma = 0; the nearest row takes all there.

    Source: Zhou et al., arXiv 2601.19285.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Temperature, evaluate
        >>> x, rows = torch.tensor([[0.5]]), torch.tensor([[-1.0], [1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Temperature(1e6)).x0.abs().item() < 1e-5
        True
    """

    def __init__(self, sigma_c: Level) -> None:
        self.sigma_c = check_level("sigma_c", sigma_c, 0.0, strict=True)

    def prepare(self, query: Query, data: Data) -> Query:
        if callable(self.sigma_c):
            t = level_at("temperature", self.sigma_c, query.sigma, 0.0, strict=True)
        else:
            t = (self.sigma_c / query.sigma.clamp(min=1e-300)).clamp(min=1.0, max=1e300)
        return replace(query, temperature=query.temperature * t)

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor:
        return divergence

    def level_gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        return None if callable(self.sigma_c) else torch.ones_like(sigma)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z


class NoiseUnconditioned(Regularizer):
    r"""Weights that do not use sigma: l_n = -(D / 2) log(\|x - alpha y_n\|^2 / D),
    w = softmax(l / T). The distance itself tells the noise level.

    There is no potential, because the score divides by sigma^2, which the weights ignore.

    Args:
        temperature: T > 0.

    Raises: TypeError, ValueError for T out of range.

    Source: Zhou et al., arXiv 2601.19285.

    Example:
        >>> import torch
        >>> from memokern.regularizers import NoiseUnconditioned, evaluate
        >>> x, rows = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
        >>> evaluate(x, rows, 1.0, regularizer=NoiseUnconditioned()).x0.item()  # weights 1/1, 1/3
        1.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = checks.number("temperature", temperature, 0.0, strict=True)

    def prepare(self, query: Query, data: Data) -> Query:
        return replace(query, weighting="log", temperature=query.temperature * self.temperature)
