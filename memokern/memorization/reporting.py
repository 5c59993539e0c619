"""All criteria in one call."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from memokern.data.training_set import TrainingSet
from memokern.memorization import criteria
from memokern.memorization.distances import (
    Embed,
    checked,
    embedded,
    embeddings,
    neighbours,
    own_rows,
    require_positive,
    require_radius,
    rows_left,
)
from memokern.memorization.result import Memorization

EMBEDDED = 256  # samples that are embedded at a time


def report(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    *,
    tol: float = 1e-2,
    threshold: float = 1 / 3,
    k: int = 50,
    level: float | None = None,
    merge_radius: float | None = None,
    own: Tensor | None = None,
    embed: Embed | None = None,
    features: TrainingSet | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> dict[str, Memorization]:
    """All criteria that apply, by name, from one exact search for the nearest rows.

    Args:
        samples, data, own, method, layout, progress: as `collapse`.
        tol, threshold: of `collapse`, and of `ratio` and `merged_ratio`.
        k: of `carlini`, `neighbourhood` and `merged_ratio`; at most N is used.
        level: the threshold of `exact_match`, which is left out without it.
        merge_radius: of `merged_ratio`, which is left out without it.
        embed: measure distances between embeddings: a function of [B, *shape] that gives
            [B, ...]. tol and merge_radius are then in the embeddings' units; `exact_match` stays
            with the samples themselves.
        features: the rows' embeddings, if you have them (:func:`embedded`), so that they are not
            computed again.

    Returns: {"collapse": ..., "ratio": ..., "merged": ..., "neighbourhood": ..., "carlini": ...,
    "exact": ...}, as the functions of the module give them. With one row that counts there is
    "collapse" (and "exact") only.

    Raises, Numerics: as the functions; ValueError for features without embed. Cost: that of one
        search with k neighbours.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [1.0], [2.0]])
        >>> list(memorization.report(torch.tensor([[0.1]]), rows, merge_radius=0.01))
        ['collapse', 'ratio', 'merged', 'neighbourhood', 'carlini']
    """
    require_positive("tol", tol)
    require_positive("threshold", threshold)
    if k < 2:
        raise ValueError(f"expected k >= 2, got {k}")
    if merge_radius is not None:
        require_radius(merge_radius)
    if features is not None and embed is None:
        raise ValueError("features are the rows' embeddings: give embed, for the samples', as well")
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    x, rows = samples, data
    if embed is not None:
        rows = embedded(data, embed) if features is None else features
        if rows.n != data.n:
            raise ValueError(f"expected features of {data.n} rows, got {rows.n}")
        x = embeddings(samples, embed, EMBEDDED).to(rows.device)
    left = rows_left(rows, own)
    distance, index = neighbours(x, rows, min(k, left), method, progress, own)
    found = {"collapse": criteria.of_collapse(distance, index, tol)}
    if left >= 2:
        found["ratio"] = criteria.of_ratio(distance, index, threshold)
        if merge_radius is not None:
            found["merged"] = criteria.of_merged(distance, index, rows, merge_radius, threshold)
        found["neighbourhood"] = criteria.of_neighbourhood(distance, index, 0.5)
        found["carlini"] = criteria.of_carlini(distance, index, 0.5)
    if level is not None:
        found["exact"] = criteria.exact_match(samples, data, level, own=own, progress=progress)
    return found
