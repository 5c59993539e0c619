"""What one criterion finds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Memorization:
    """What one criterion finds in S samples.

    Attributes:
        criterion: its name. threshold: a sample counts as memorised where value < threshold
            ("neighbourhood": where value <= threshold).
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


def result(
    criterion: str,
    value: torch.Tensor,
    threshold: float,
    distance: torch.Tensor,
    index: torch.Tensor,
    *,
    inclusive: bool = False,
) -> Memorization:
    """The result, whose tensors share no memory with what they were taken from. inclusive: a value
    at the threshold counts as memorised."""
    memorized = value <= threshold if inclusive else value < threshold
    fraction = float(memorized.double().mean())
    nearest = (index[:, 0].clone(), distance[:, 0].clone())
    return Memorization(criterion, float(threshold), fraction, memorized, value.clone(), *nearest)
