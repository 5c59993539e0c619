"""What would run a call, and why the others would not."""

from __future__ import annotations

from torch import Tensor

from memokern.data.training_set import TrainingSet
from memokern.strategies import explanation
from memokern.strategies.explanation import Explanation
from memokern.sweep import index_for
from memokern.validate import PerQuery, check_k, checked, computable


def explain(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    weighting: str = "gaussian",
    method: str = "auto",
    k: int = 0,
) -> Explanation:
    """What would run :func:`posterior` with these arguments, and why the others would not; with
    k > 0, what would run :func:`nearest`. Nothing is computed. Print it, or read its attributes.

    Args and errors: as :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> found = memokern.explain(torch.zeros(4, 2), torch.zeros(10, 2), 1.0)
        >>> found.strategy
        'dense: the data have no index (TrainingSet.build_index makes one)'
        >>> str(found).splitlines()[0]
        'posterior: 4 queries of float32 on 10 rows [2] of float32, cpu'
    """
    index = index_for(data, method)
    asked = checked(computable(x), data, sigma, alpha, temperature, bias, weighting)
    if k:
        check_k(k, asked.data.rows)
    return explanation.explain(asked.query, asked.data.rows, index, method, k)
