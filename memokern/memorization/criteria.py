"""The criteria: what counts as a copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memokern.data.training_set import TrainingSet
from memokern.memorization.distances import (
    beyond,
    checked,
    neighbours,
    own_rows,
    require_k,
    require_positive,
    require_radius,
    rows_left,
)
from memokern.memorization.result import Memorization, result


def collapse(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    tol: float = 1e-2,
    *,
    own: Tensor | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """Collapse onto a training point: value = min_n |x - y_n|, memorised where value < tol.

    Args:
        samples: [S, *shape] floating point, in the data's units; S >= 1.
        data: the TrainingSet, or its rows as a tensor [N, *shape].
        tol: L2 distance > 0 in the data's units, all features together. Usual values are 1e-2 in
            the plane and for closed-form scores, up to 0.5 for networks.
        own: [S] integers, the row that does not count for each sample, -1 where all do: for samples
            that are rows themselves, such as reconstructions, or rows asked about one another.
        method: as :func:`memokern.nearest`; "auto" uses the data's index where that is faster.
        layout: "hwc" for samples that are images [S, H, W, C] of rows [N, C, H, W]. None takes
            samples in the order of the rows.
        progress: whether to show a progress bar.

    Returns: a :class:`Memorization` whose value is the distance.

    Raises:
        TypeError: samples that are not floating point.
        ValueError: no samples, shapes that differ, tol not positive.

    Warns: where the ranges of samples and data show that their units differ, such as [0, 1] or
    0..255 for data in [-1, 1].

    Numerics: distances by direct differences, accumulated in float64.

    Cost: S N D operations; memory O(S).

    Source: Baptista et al., arXiv 2501.15785.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> samples = torch.tensor([[0.001, 0.0], [0.5, 0.5], [1.0, 0.0]])
        >>> memorization.collapse(samples, rows)
        collapse: 2 of 3 memorised (66.7%)
    """
    require_positive("tol", tol)
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    return of_collapse(*neighbours(samples, data, 1, method, progress, own), tol)


def ratio(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    threshold: float = 1 / 3,
    *,
    own: Tensor | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """Ratio criterion: value = d1 / d2, the distances of the nearest and the second nearest row.

    A sample is memorised where value < threshold, which needs no scale of distances. A row that
    occurs twice hides its copies (d1 = d2), except exact ones, whose value is 0.

    Args, Raises, Numerics, Cost: as `collapse`; threshold > 0; the data need at least 2 rows.

    Source: Gu et al., arXiv 2310.02664; Bonnaire et al., arXiv 2505.17638.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [1.0]])
        >>> memorization.ratio(torch.tensor([[0.2], [0.4]]), rows).value
        tensor([0.2500, 0.6667], dtype=torch.float64)
    """
    require_positive("threshold", threshold)
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    if rows_left(data, own) < 2:
        raise ValueError(f"the ratio criterion needs at least 2 training rows, got {data.n}")
    return of_ratio(*neighbours(samples, data, 2, method, progress, own), threshold)


def merged_ratio(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    radius: float,
    threshold: float = 1 / 3,
    k: int = 50,
    *,
    own: Tensor | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """The ratio criterion for data with near-duplicates: value = d1 / d2, d2 the distance to the
    nearest row that is farther than `radius` from the nearest row.

    Rows that close to the nearest one count as the same row, which no longer hides its copies as it
    does in `ratio`. Only the k nearest rows are looked at: where all lie within the radius, d2 is
    that of the last, so that the value is too large if anything.

    Args, Raises, Numerics, Cost: as `ratio`; radius >= 0, L2 in the data's units; k >= 2, of which
    at most N are used. The k rows of each sample are compared with each other besides: S k D
    operations.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [0.001], [1.0]])
        >>> sample = torch.tensor([[0.01]])
        >>> memorization.ratio(sample, rows), memorization.merged_ratio(sample, rows, 0.01)
        (ratio: 0 of 1 memorised (0.0%), merged: 1 of 1 memorised (100.0%))
    """
    require_positive("threshold", threshold)
    require_radius(radius)
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    left = rows_left(data, own)
    require_k(min(k, left), data, own)
    found = neighbours(samples, data, min(k, left), method, progress, own)
    return of_merged(*found, data, radius, threshold)


def neighbourhood(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    k: int = 50,
    threshold: float = 0.5,
    *,
    own: Tensor | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """value = d1 / mean(d2, ..., dk), memorised where value <= threshold: the distance to the
    nearest row over the usual distance in its neighbourhood, the nearest left out.

    Args, Raises, Numerics, Cost: as `carlini`.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [1.0], [2.0]])
        >>> memorization.neighbourhood(torch.tensor([[0.25]]), rows, k=3).value
        tensor([0.2000], dtype=torch.float64)
    """
    require_positive("threshold", threshold)
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    require_k(k, data, own)
    return of_neighbourhood(*neighbours(samples, data, k, method, progress, own), threshold)


def carlini(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    k: int = 50,
    threshold: float = 0.5,
    *,
    own: Tensor | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """Normalised distance: value = d1 / mean(d1, ..., dk) over the k nearest rows, in [0, 1].

    Carlini et al. divide by alpha times that mean. With their alpha = 0.5, a distance below 1 means
    value < 0.5, which is the default here.

    Args, Raises, Numerics, Cost: as `collapse`; threshold > 0; 2 <= k <= N.

    Source: Carlini et al., arXiv 2301.13188.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [1.0], [2.0]])
        >>> memorization.carlini(torch.tensor([[0.1]]), rows, k=3).value
        tensor([0.1034], dtype=torch.float64)
    """
    require_positive("threshold", threshold)
    samples, data = checked(samples, data, layout)
    own = own_rows(own, samples, data)
    require_k(k, data, own)
    return of_carlini(*neighbours(samples, data, k, method, progress, own), threshold)


def exact_match(
    samples: Tensor | np.ndarray,
    data: TrainingSet | Tensor,
    threshold: float,
    *,
    own: Tensor | None = None,
    layout: str | None = None,
    progress: bool = False,
) -> Memorization:
    """Binary images: a sample is memorised if, thresholded, it equals a thresholded training row.

    value is the number of features, |[x > threshold] - [y > threshold]|_1, in which the sample
    differs from the row that differs least; distance is its square root, the L2 distance of the
    thresholded images.

    Args, Raises: as `collapse`, without method. threshold: the level between the two values, in the
        data's units; ValueError unless it is finite.

    Numerics: exact. Cost: as `collapse`, and N D bytes for the thresholded rows.

    Source: Baptista et al., arXiv 2501.15785, section 6 (images).

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> samples = torch.tensor([[0.1, 0.8, 0.7], [0.9, 0.9, 0.2]])
        >>> memorization.exact_match(samples, rows, 0.5).value
        tensor([0., 1.], dtype=torch.float64)
    """
    if not np.isfinite(threshold):
        raise ValueError(f"expected a finite threshold, got {threshold}")
    samples, data = checked(samples, data, layout)
    binary = data.each(lambda values: (values > threshold).to(torch.uint8))
    # A comparison turns NaN into a number. NaN is put back, so that such a sample matches nothing.
    sample_bits = (samples > threshold).to(samples.dtype).masked_fill_(samples.isnan(), torch.nan)
    own = own_rows(own, samples, data)
    distance, index = neighbours(sample_bits, binary, 1, "dense", progress, own)
    differing = distance[:, 0].square().round()
    return result("exact", differing, 1.0, distance, index)


# --- the criteria, given distances [S, k] ascending -------------------------------------------


def of_collapse(distance: Tensor, index: Tensor, tol: float) -> Memorization:
    return result("collapse", distance[:, 0], tol, distance, index)


def of_ratio(distance: Tensor, index: Tensor, threshold: float) -> Memorization:
    value = _over(distance[:, 0], distance[:, 1])
    return result("ratio", value, threshold, distance, index)


def of_carlini(distance: Tensor, index: Tensor, threshold: float) -> Memorization:
    value = _over(distance[:, 0], distance.mean(dim=1))
    return result("carlini", value, threshold, distance, index)


def of_neighbourhood(distance: Tensor, index: Tensor, threshold: float) -> Memorization:
    value = _over(distance[:, 0], distance[:, 1:].mean(dim=1))
    return result("neighbourhood", value, threshold, distance, index, inclusive=True)


def of_merged(
    distance: Tensor, index: Tensor, data: TrainingSet, radius: float, threshold: float
) -> Memorization:
    value = _over(distance[:, 0], beyond(distance, index, data, radius))
    return result("merged", value, threshold, distance, index)


def _over(nearest: Tensor, other: Tensor) -> Tensor:
    """nearest / other; 0 for an exact copy, also of a row that occurs several times (0 / 0)."""
    return torch.where(nearest == 0, 0.0, nearest / other)
