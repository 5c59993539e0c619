"""Samples and rows, checked, and the exact distances between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memokern import functional
from memokern.data import files
from memokern.data import layout as layouts
from memokern.data.parted import PartedSet
from memokern.data.storage import checked_index
from memokern.data.training_set import TrainingSet
from memokern.index.index import evenly_spaced_rows
from memokern.strategies import parted

# One search for nearest rows takes this many samples, after which the progress bar moves.
CHUNK = 1024
# Rows [samples, k, D] that are compared with each other take this many numbers at a time.
COMPARED = 1 << 22

Embed = Callable[[Tensor], Tensor]


def checked(
    samples: torch.Tensor | np.ndarray,
    data: TrainingSet | torch.Tensor,
    layout: str | None,
) -> tuple[torch.Tensor, TrainingSet]:
    """Samples and data as the search takes them, checked; of rows on several ranks by all."""
    if not isinstance(data, TrainingSet):
        data = TrainingSet(data)
    found = data
    if isinstance(data, PartedSet):
        samples = parted.together(data, "samples", lambda: _arranged(samples, found, layout))
    else:
        samples = _arranged(samples, data, layout)
    some = evenly_spaced_rows(data.n, layouts.RANGE_ROWS).to(data.device)
    layouts.warn_of_other_range(samples, data.gather(some).flatten(1))
    return samples, data


def _arranged(samples: Tensor | np.ndarray, data: TrainingSet, layout: str | None) -> Tensor:
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
    return samples.detach().to(data.device, torch.float64 if double else torch.float32)


def own_rows(own: Tensor | None, samples: Tensor, data: TrainingSet) -> Tensor | None:
    """The row that does not count for each sample [S] int64, -1 where all do; checked."""
    if own is None:
        return None
    if not isinstance(own, Tensor) or own.shape != samples.shape[:1]:
        got = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
        raise ValueError(f"expected own as a tensor [{len(samples)}], a row for each, got {got}")
    own = own.to(data.device)
    checked_index(own.clamp(min=0), data.n, data.device)
    return own


def neighbours(
    samples: Tensor,
    data: TrainingSet,
    k: int,
    method: str,
    progress: bool,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The distances [S, k] float64, ascending, and the indices [S, k] of the k nearest rows, a
    sample's own row left out."""
    wanted = k if own is None else min(k + 1, data.n)

    def parts() -> Iterator[functional.Nearest]:
        # Rows that are read from a disk are read once for all samples; ranks make the same calls,
        # however many samples each has.
        size = max(1, len(samples)) if isinstance(data, PartedSet) else CHUNK
        for chunk in tqdm(samples.split(size), desc="nearest rows", disable=not progress):
            yield functional.nearest(chunk, data, wanted, method=method)

    found = list(parts())
    distance = torch.cat([part.distance for part in found])
    index = torch.cat([part.index for part in found])
    if own is None:
        return distance, index
    if wanted < 2:
        raise ValueError("without a sample's own row there is no row left: the data have one row")
    # Of the k + 1 nearest the own row goes, or the last one where it is not among them.
    mine = index == own[:, None]
    last = torch.arange(wanted, device=index.device) == wanted - 1
    dropped = torch.where(mine.any(1, keepdim=True), mine, last)
    keep = ~dropped
    return distance[keep].reshape(-1, wanted - 1), index[keep].reshape(-1, wanted - 1)


def beyond(distance: Tensor, index: Tensor, data: TrainingSet, radius: float) -> Tensor:
    """The distance [S] to the nearest row that lies farther than `radius` from the nearest row.

    Args: distance, index: [S, k] of the k nearest rows. Where all of them lie within the radius it
        is the distance of the last, which that row's is no smaller than.
    """
    samples, k = distance.shape
    found = distance[:, -1].clone()
    step = max(1, COMPARED // (k * data.dim))
    unit = 2.0 ** min(-math.frexp(radius)[1], 1000) if radius > 0 else 1.0
    # Ranks gather together, as often as the one with the most samples.
    for start in range(0, data.most(samples) if isinstance(data, PartedSet) else samples, step):
        some = slice(start, start + step)
        rows = data.gather(index[some]).flatten(2).double()
        # In units of about the radius, so that no square overflows or vanishes that matters.
        apart = ((rows - rows[:, :1]) * unit).square().sum(-1).sqrt() > radius * unit
        first = apart.to(torch.uint8).argmax(1)
        value = distance[some].gather(1, first[:, None])[:, 0]
        found[some] = torch.where(apart.any(1), value, found[some])
    return found


def embedded(data: TrainingSet | Tensor, embed: Embed, *, batch: int = 256) -> TrainingSet:
    """The rows as your network embeds them, for criteria in feature space.

    Args:
        data: N rows, in their own units. embed: takes [B, *shape], gives [B, ...] floating point;
            called without gradients, in batches of `batch` rows.

    Returns: a TrainingSet of the embeddings, with the labels of the data.

    Raises: TypeError, ValueError for embeddings that are not tensors of one row each.

    Example:
        >>> import torch
        >>> from memokern import memorization
        >>> rows = torch.rand(5, 3, 4, 4)
        >>> features = memorization.embedded(rows, lambda x: x.mean((2, 3)))
        >>> features.shape
        (3,)
        >>> memorization.ratio(rows.mean((2, 3)), features)
        ratio: 5 of 5 memorised (100.0%)
    """
    rows = data if isinstance(data, TrainingSet) else TrainingSet(data)
    if isinstance(rows, PartedSet):
        rows.refuse("embedded", "embed the rows of each part, and share those")
    with torch.no_grad():
        parts = [embeddings(rows[i : i + batch], embed) for i in range(0, rows.n, batch)]
    return TrainingSet(torch.cat(parts), labels=rows.labels, name=rows.name)


def embeddings(x: Tensor, embed: Embed, batch: int | None = None) -> Tensor:
    """embed(x), checked to be a row for each; in batches."""
    with torch.no_grad():
        found = [embed(part) for part in x.split(batch or max(1, len(x)))]
    for part in found:
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.dim() < 2:
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part)
            raise TypeError(f"expected embed to give floating-point rows [B, ...], got {got}")
    out = torch.cat(found)
    if len(out) != len(x):
        raise ValueError(f"expected embed to give a row for each of {len(x)}, got {len(out)}")
    return out


def require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a positive {name}, got {value}")


def require_radius(radius: float) -> None:
    if not 0 <= radius < float("inf"):
        raise ValueError(f"expected a finite merge radius >= 0, got {radius}")


def rows_left(data: TrainingSet, own: Tensor | None) -> int:
    """How many rows count for a sample, at least."""
    return data.n if own is None else data.n - 1


def require_k(k: int, data: TrainingSet, own: Tensor | None) -> None:
    most = rows_left(data, own)
    if not 2 <= k <= most:
        raise ValueError(f"expected 2 <= k <= {most}, the number of training rows, got k = {k}")
