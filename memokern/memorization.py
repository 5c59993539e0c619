"""How many samples are copies of training rows.

Every criterion is a function of the exact distances to the nearest rows, so that all of them work
on pixels and on embeddings alike: for the latter, give embedded samples and embedded rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from memokern import functional
from memokern.data import files
from memokern.data import layout as layouts
from memokern.data.storage import chunks
from memokern.data.training_set import TrainingSet
from memokern.index.index import evenly_spaced_rows

# One search for nearest rows takes this many samples, after which the progress bar moves.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Memorization:
    """What one criterion finds in S samples.

    Attributes:
        criterion: its name. threshold: a sample counts as memorised where value < threshold.
        fraction: the share of memorised samples, 0..1.
        memorized: [S] bool.
        value: [S] float64, the criterion's statistic; smaller is closer to a copy. A sample with
            NaN has value NaN and counts as not memorised.
        index: [S] int64, the nearest row.
        distance: [S] float64, L2 distance to that row, in the data's units.
    """

    criterion: str
    threshold: float
    fraction: float
    memorized: torch.Tensor
    value: torch.Tensor
    index: torch.Tensor
    distance: torch.Tensor

    def __str__(self) -> str:
        count, total = int(self.memorized.sum()), len(self.memorized)
        return f"{self.criterion}: {count} of {total} memorised ({self.fraction:.1%})"

    __repr__ = __str__


def collapse(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    tol: float = 1e-2,
    *,
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
    _require_positive("tol", tol)
    distance, index = _nearest(*_checked(samples, data, layout), 1, method, progress)
    return _collapse(distance, index, tol)


def ratio(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    threshold: float = 1 / 3,
    *,
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
    _require_positive("threshold", threshold)
    samples, data = _checked(samples, data, layout)
    if data.n < 2:
        raise ValueError("the ratio criterion needs at least 2 training rows, got 1")
    return _ratio(*_nearest(samples, data, 2, method, progress), threshold)


def carlini(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    k: int = 50,
    threshold: float = 0.5,
    *,
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
    _require_positive("threshold", threshold)
    samples, data = _checked(samples, data, layout)
    if not 2 <= k <= data.n:
        raise ValueError(f"expected 2 <= k <= {data.n}, the number of training rows, got k = {k}")
    return _carlini(*_nearest(samples, data, k, method, progress), threshold)


def exact_match(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    threshold: float,
    *,
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
    samples, data = _checked(samples, data, layout)
    bits = torch.cat(
        [(data.dequantize(chunk) > threshold).to(torch.uint8) for chunk in chunks(data.rows)]
    )
    # A comparison turns NaN into a number. NaN is put back, so that such a sample matches nothing.
    sample_bits = (samples > threshold).to(samples.dtype).masked_fill_(samples.isnan(), torch.nan)
    binary = TrainingSet(bits.reshape(data.n, *data.shape), scale=1, shift=0)
    distance, index = _nearest(sample_bits, binary, 1, "dense", progress)
    differing = distance[:, 0].square().round()
    return _result("exact", differing, 1.0, distance, index)


def report(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    *,
    tol: float = 1e-2,
    threshold: float = 1 / 3,
    k: int = 50,
    level: float | None = None,
    method: str = "auto",
    layout: str | None = None,
    progress: bool = False,
) -> dict[str, Memorization]:
    """All criteria that apply, by name, from one search for the nearest rows.

    Args:
        samples, data, method, layout, progress: as `collapse`.
        tol, threshold: of `collapse` and `ratio`. k: of `carlini`; at most N is used.
        level: the threshold of `exact_match`, which is left out without it.

    Returns: {"collapse": ..., "ratio": ..., "carlini": ..., "exact": ...}, as the functions above
    give them. With one training row there is no "ratio" and no "carlini".

    Raises, Numerics: as the functions above. Cost: that of one search with k neighbours.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.tensor([[0.0], [1.0], [2.0]])
        >>> list(memorization.report(torch.tensor([[0.1]]), rows))
        ['collapse', 'ratio', 'carlini']
    """
    _require_positive("tol", tol)
    _require_positive("threshold", threshold)
    if k < 2:
        raise ValueError(f"expected k >= 2, got {k}")
    samples, data = _checked(samples, data, layout)
    distance, index = _nearest(samples, data, min(k, data.n), method, progress)
    found = {"collapse": _collapse(distance, index, tol)}
    if data.n >= 2:
        found["ratio"] = _ratio(distance, index, threshold)
        found["carlini"] = _carlini(distance, index, 0.5)
    if level is not None:
        found["exact"] = exact_match(samples, data, level, progress=progress)
    return found


# --- the criteria, given distances [S, k] ascending -------------------------------------------


def _collapse(distance: torch.Tensor, index: torch.Tensor, tol: float) -> Memorization:
    return _result("collapse", distance[:, 0], tol, distance, index)


def _ratio(distance: torch.Tensor, index: torch.Tensor, threshold: float) -> Memorization:
    value = _over(distance[:, 0], distance[:, 1])
    return _result("ratio", value, threshold, distance, index)


def _carlini(distance: torch.Tensor, index: torch.Tensor, threshold: float) -> Memorization:
    value = _over(distance[:, 0], distance.mean(dim=1))
    return _result("carlini", value, threshold, distance, index)


def _over(nearest: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """nearest / other; 0 for an exact copy, also of a row that occurs several times (0 / 0)."""
    return torch.where(nearest == 0, 0.0, nearest / other)


def _result(
    criterion: str,
    value: torch.Tensor,
    threshold: float,
    distance: torch.Tensor,
    index: torch.Tensor,
) -> Memorization:
    """The result, whose tensors share no memory with what they were taken from."""
    memorized = value < threshold
    fraction = float(memorized.double().mean())
    nearest = (index[:, 0].clone(), distance[:, 0].clone())
    return Memorization(criterion, float(threshold), fraction, memorized, value.clone(), *nearest)


# --- distances --------------------------------------------------------------------------------


def _checked(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    layout: str | None,
) -> tuple[torch.Tensor, TrainingSet]:
    """Samples and data as the search takes them, checked."""
    if not isinstance(data, TrainingSet):
        data = TrainingSet(data)
    if isinstance(samples, np.ndarray):
        samples = files.as_tensor(samples, "samples")
    if not isinstance(samples, torch.Tensor):
        raise TypeError(f"expected samples as a tensor or array, got {type(samples).__name__}")
    if not samples.is_floating_point():
        raise TypeError(
            f"expected samples of a floating type in the data's units, got {samples.dtype}: "
            "stored rows become values with data.dequantize(samples)"
        )
    samples = layouts.arranged(samples, None, layout, "samples")
    layouts.require_same_shape(samples, data.shape)
    if len(samples) == 0:
        raise ValueError("expected at least one sample, got none")
    double = samples.dtype == torch.float64
    samples = samples.detach().to(data.device, torch.float64 if double else torch.float32)
    some = evenly_spaced_rows(data.n, layouts.RANGE_ROWS).to(data.device)
    layouts.warn_of_other_range(samples, data.dequantize(data.rows.index_select(0, some)))
    return samples, data


def _nearest(
    samples: torch.Tensor, data: TrainingSet, k: int, method: str, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distances [S, k] float64, ascending, and the indices [S, k] of the k nearest rows."""

    def parts() -> Iterator[functional.Nearest]:
        for chunk in tqdm(samples.split(CHUNK), desc="nearest rows", disable=not progress):
            yield functional.nearest(chunk, data, k, method=method)

    found = list(parts())
    return torch.cat([part.distance for part in found]), torch.cat([part.index for part in found])


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a positive {name}, got {value}")
