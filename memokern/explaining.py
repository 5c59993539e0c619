"""What would run a call, and why the others would not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memokern.conditional import Label
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.strategies import explanation
from memokern.strategies.explanation import Explanation
from memokern.sweep import index_for, why_in_groups
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
    label: Label = None,
    condition: Tensor | None = None,
    leave_out: int | Tensor | None = None,
) -> Explanation:
    """What would run :func:`posterior` with these arguments, and why the others would not; with
    k > 0, what would run :func:`nearest`. Nothing is computed. Print it, or read its attributes.
    Of rows on several ranks, what this rank does with its own; ranks need not ask together.

    Args and errors: as :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> found = memokern.explain(torch.zeros(4, 2), torch.zeros(10, 2), 1.0)
        >>> found.strategy
        'dense: the data have no index (TrainingSet.build_index makes one)'
        >>> str(found).splitlines()[0]
        'posterior: 4 queries of float32 on 10 rows [2] of float32, cpu'
        >>> found = memokern.explain(
        ...     torch.zeros(4, 2), torch.zeros(10, 2), 1.0, leave_out=torch.arange(4)
        ... )
        >>> found.strategy
        'dense, one sweep for conditions and rows left out that differ from query to query'
    """
    index = index_for(data, method)
    here = ""
    if isinstance(data, PartedSet):
        index, here = None if method == "dense" else data.index, f"{data.how_swept}: "
    asked = checked(computable(x), data, sigma, alpha, temperature, bias, weighting)
    if k:
        check_k(k, data.n if isinstance(data, PartedSet) else asked.data.rows.n)
    query, rows = asked.query, asked.data.rows
    found = explanation.explain(query, rows, index, method, k)
    found = replace(found, strategy=here + found.strategy)
    if k or (label is None and condition is None and leave_out is None):
        return found
    if condition is None and leave_out is None:
        return replace(
            found, strategy=f"a sweep for each label, or one over lists: {found.strategy}"
        )
    why = why_in_groups(asked, data, index)
    if why is not None:
        each = f"a sweep for each group of queries that ask for the same, as {why}"
        return replace(found, strategy=f"{each}: {found.strategy}")
    own = query._replace(leave_out=query.sigma.new_empty(query.sigma.shape, dtype=torch.int64))
    labels = "" if label is None else " of each label"
    text = (
        f"dense, one sweep{labels} for conditions and rows left out that differ from query to query"
    )
    return replace(explanation.explain(own, rows, None, "dense", 0), strategy=here + text)
