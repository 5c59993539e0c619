"""The divergence of a regularised x0, from the numbers of the sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.regularizers.prediction import Prediction


def x0_divergence(found: Prediction) -> Tensor | None:
    r"""div_x x0 [\*batch] float64 of an evaluation, exactly; None for a regulariser that does not
    say how it changes a divergence (see :meth:`.Regularizer.gate_divergence`).

    Without one it is alpha tr Cov_w(y) / (T sigma^2). With R the residual alpha mean - x,
    div R = alpha div mean - D; a gate makes R' of it, and x0 = (x + R') / alpha.

    Numerics: as :attr:`memokern.Posterior.covariance_trace`, of which the error enters divided by
    sigma^2. Cost: none beyond the evaluation.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Tikhonov, evaluate
        >>> from memokern.regularizers.divergence import x0_divergence
        >>> x, rows = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
        >>> round(x0_divergence(evaluate(x, rows, 1.0)).item(), 6)  # tanh'(0)
        1.0
        >>> found = evaluate(x, rows, 1.0, regularizer=Tikhonov(1.0))  # x0 = (x + tanh x) / 2
        >>> round(x0_divergence(found).item(), 6)
        1.0
    """
    posterior, regularizer = found.posterior, found.regularizer
    sigma, dim = posterior.sigma, posterior.dim
    # alpha^2 tr C / (T sigma^2), written so that alpha = 0 needs no exception.
    square = -2 * (posterior.mean_logit - posterior.mean_bias)
    gap = posterior.residual.to(torch.float64).flatten(sigma.dim()).square().sum(-1)
    spread = (square - gap / sigma / sigma).clamp(min=0.0) / posterior.temperature
    spread = torch.where(sigma == 0, 0.0, spread)
    gated = regularizer.gate_divergence(spread - dim, posterior.residual, found.query, posterior)
    if gated is None:
        return None
    total = regularizer.gather(gated)
    scale = found.alpha
    return torch.where(scale == 0, 0.0, (total + dim) / torch.where(scale == 0, 1.0, scale))
