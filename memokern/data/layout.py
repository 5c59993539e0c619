"""In which order the features of a row lie: given shapes, channels last, and samples that cannot be
compared with the rows as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memokern.util import checks
from memokern.util.warned import warn

# chw: as they come, [N, *shape]. hwc: images [N, H, W, C], which become [N, C, H, W].
LAYOUTS = ("chw", "hwc")
# The ranges of fewer numbers say little about their unit.
RANGE_NUMBERS = 64
# Ranges are found from at most this many rows, spread over the data.
RANGE_ROWS = 1024


def arranged(
    rows: Tensor, shape: Sequence[int] | None, layout: str | None, what: str = "rows"
) -> Tensor:
    """Rows [N, ...] with each reshaped to `shape`, as the file has them, and then moved from
    `layout` to channels first. None leaves them as they are.

    Raises: ValueError for an unknown layout, a shape of another number of elements, and rows that
    are no images with channels last, as those of a folder are not.

    Example:
        >>> import torch
        >>> from memokern.data.layout import arranged
        >>> arranged(torch.zeros(5, 3072), (32, 32, 3), "hwc").shape
        torch.Size([5, 3, 32, 32])
    """
    if layout is not None and layout not in LAYOUTS:
        known = " or ".join(map(repr, LAYOUTS))
        raise ValueError(f"expected layout {known}, got {layout!r}")
    if shape is not None and rows.ndim > 0:
        wanted = tuple(checks.integer("shape", k, 1, 2**62) for k in shape)
        if math.prod(wanted) != math.prod(rows.shape[1:]):
            raise ValueError(
                f"shape {list(wanted)} has {math.prod(wanted)} elements, but {what} "
                f"{list(rows.shape)} have {math.prod(rows.shape[1:])} each"
            )
        rows = rows.reshape(len(rows), *wanted)
    if layout == "hwc":
        if rows.ndim != 4:
            raise ValueError(
                f"layout='hwc' is for images [N, H, W, C], got {what} {list(rows.shape)}: give the "
                "shape of one with shape=(H, W, C) where they are flat"
            )
        if rows.shape[1] == 3 and rows.shape[3] > 4:
            raise ValueError(
                f"layout='hwc' is for images [N, H, W, C], but {what} {list(rows.shape)} have "
                "their channels first: leave layout out"
            )
        rows = rows.permute(0, 3, 1, 2)
    return rows


def require_same_shape(samples: Tensor, shape: Sequence[int], what: str = "samples") -> None:
    """ValueError that names both shapes, and says what to do where only the order or the cutting of
    the features may differ, unless `samples` are [S, *shape]."""
    found, wanted = tuple(samples.shape[1:]), tuple(shape)
    if samples.ndim > 0 and found == wanted:
        return
    expected = ", ".join(["S", *map(str, wanted)])
    message = f"expected {what} [{expected}] like the rows, got {list(samples.shape)}"
    if samples.ndim > 0 and math.prod(found) == math.prod(wanted):
        message += f": {_advice(found, wanted)}"
    raise ValueError(message)


def _advice(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do with samples whose rows have as many elements as wanted, in another shape."""
    if len(found) == len(wanted) == 3 and wanted == (found[2], found[0], found[1]):
        return "if their channels are last, give layout='hwc'"
    if len(found) == len(wanted) == 3 and wanted == (*found[1:], found[0]) and wanted[2] <= 4:
        return "the rows have their channels last: turn them too, as their training set is made"
    if len(found) == 1:
        text = f"if they are flattened in the order of the rows, give shape={wanted}"
        return text + (", else the order they have and layout='hwc'" if len(wanted) == 3 else "")
    if len(wanted) == 1:
        return f"make the training set with rows {list(found)} if they are flattened in this order"
    return (
        f"as many elements in another order are other samples; give shape={wanted} only if they "
        "are stored in the order of the rows"
    )


def warn_of_other_range(samples: Tensor, rows: Tensor) -> None:
    """UserWarning with both ranges where samples and rows, as values, cannot have the same unit:
    [0, 1] or 0..255 against [-1, 1], and the like."""
    if min(samples.numel(), rows.numel()) < RANGE_NUMBERS or samples.is_meta or rows.is_meta:
        return
    samples, rows = (_finite(part) for part in (samples, rows))
    if min(samples.numel(), rows.numel()) < RANGE_NUMBERS:
        return
    (low, high), (least, most) = (
        [float(v) for v in torch.stack(part.aminmax())] for part in (samples, rows)
    )
    if _other_unit(samples, rows, (low, high), (least, most)):
        warn(
            f"the samples lie in [{low:.4g}, {high:.4g}], the data in [{least:.4g}, {most:.4g}]: "
            "these cannot be the same units, so that nothing will look memorised; convert the "
            "samples, or give the data their scale and shift"
        )


def _finite(part: Tensor) -> Tensor:
    return part[part.isfinite()]


def _other_unit(
    samples: Tensor, rows: Tensor, ours: tuple[float, float], theirs: tuple[float, float]
) -> bool:
    """Whether the ranges of the two, and how much of each lies where the other has nothing, rule
    out that they have one unit. Samples that regularisation drew together do not."""
    (low, high), (least, most) = ours, theirs
    span, width = high - low, most - least
    # Far wider, and not by a few outliers.
    outside = (samples < least - width) | (samples > most + width)
    if span > 4 * width and _share(outside) > 0.1:
        return True
    # In [0, 1] or [-1, 1] where the data are 0..255 or wider.
    if width > 64 and low >= -1.01 and high <= 1.01:
        return True
    # One in [0, 1], the other with a good part below 0.
    if low >= -1e-3 and high <= 1.001 and high > 0.5 and -1.5 < least < -0.5 and most <= 1.5:
        return _share(rows < 0) > 0.1
    if least >= -1e-3 and most <= 1.001 and most > 0.5 and -1.5 < low < -0.5 and high <= 1.5:
        return _share(samples < -0.25) > 0.1
    return False


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
