"""Proven bounds on what pruning changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import Kept, Query, Rows, Scan, Sums
from memokern.index.index import Index

_ULP = 2.0**-52  # twice the unit roundoff: pays for the second-order terms too
DENSE_ERROR = 1e-3  # of a dense sweep's total weight, relative; the contract is 1e-4


@dataclass(frozen=True)
class Certificate:
    r"""What the dropped rows can have contributed, per query: proven bounds, not estimates.

    The errors of the sums that the kept rows give, against those of all rows in exact arithmetic;
    the rounding of the sums themselves is not part of them. Zeros where all rows were swept.

    Attributes:
        weight: the dropped rows' share of the weight. mean_error: L2 norm of the error of mean.
        score_error: of score, alpha mean_error / sigma^2. log_z_error: of log_z, which is too small
            by that much at most. All [\*batch] float64.
        rows_kept: how many rows were swept; levels: how many levels of the index's ladder decided
            which (0: a dense sweep). Both [\*batch] int64.

    Example:
        >>> import torch, memokern
        >>> digits = memokern.TrainingSet.digits().build_index()
        >>> x = digits[:2] + 0.01
        >>> p = memokern.posterior(x, digits, 0.05, method="pruned", certificate=True)
        >>> p.certificate.rows_kept.tolist(), bool((p.certificate.weight < 1e-6).all())
        ([1, 1], True)
    """

    weight: Tensor
    mean_error: Tensor
    score_error: Tensor
    log_z_error: Tensor
    rows_kept: Tensor
    levels: Tensor

    def reshape(self, batch: torch.Size) -> Certificate:
        """The same numbers, shaped as the batch of queries."""
        return Certificate(*(getattr(self, f.name).reshape(batch) for f in fields(self)))


def certify(query: Query, rows: Rows, index: Index, kept: Kept, sums: Sums) -> Certificate:
    """For the sums over the rows that a scan kept; level 0: of a query swept densely.

    The others are N - count rows of t <= threshold each, beside those kept, whose sum is known.
    """
    n, pruned, count = rows.n, kept.level > 0, kept.rows
    with torch.no_grad():
        total = sums.log_z / query.temperature  # logsumexp t
        # The direct differences' own rounding, in t: relative to the logit, as its squares are.
        rounding = _ULP * (rows.dim + 16) * total.abs()
        ratio = (n - count) * torch.exp(kept.threshold - total + rounding)
        ratio = torch.where(pruned, ratio, 0.0)
        weight = ratio.clamp(max=1.0)
        assert rows.center is not None
        offset = sums.mean.to(torch.float64) - rows.center.to(torch.float64)
        radius = index.y_max + torch.linalg.vector_norm(offset, dim=1) * (1 + 2.0**-20)
        mean_error = torch.where(pruned, weight * radius, 0.0)
        score_error = query.alpha.abs() * mean_error / query.sigma / query.sigma
        return Certificate(
            weight=weight,
            mean_error=mean_error,
            score_error=torch.where(pruned, score_error, 0.0),
            log_z_error=query.temperature.detach() * torch.log1p(ratio),
            rows_kept=torch.where(pruned, count, n),
            levels=kept.level,
        )


class Dropped(NamedTuple):
    """What one part of the rows left out, [B] float64 each.

    log_weight: log of a bound on the sum of exp(l / T) over the rows dropped; -inf where none was.
    rows_kept, levels: as a :class:`Certificate`'s.
    """

    log_weight: Tensor
    rows_kept: Tensor
    levels: Tensor

    @staticmethod
    def none(like: Tensor, n: int) -> Dropped:
        """Of dense sweeps over n rows."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return Dropped(zero - torch.inf, zero + n, zero)

    @staticmethod
    def by_scan(scan: Scan, swept: Tensor, n: int) -> Dropped:
        """Of a scan over n rows, and queries [B] that were swept densely all the same."""
        count = torch.where(swept, n, scan.lists.start.diff()).to(torch.float64)
        # log 0 is -inf, also where the threshold is infinite.
        log_weight = torch.where(count < n, (n - count).log() + scan.threshold, -torch.inf)
        return Dropped(log_weight, count, torch.where(swept, 0, scan.level).to(torch.float64))


def certify_parts(
    query: Query, sums: Sums, parts: Dropped, center: Tensor, radius: float
) -> Certificate:
    """For the joint sums of several parts of the rows, of which each dropped something.

    parts: [W, B] of W parts. center, radius: of a ball in which all rows of all parts lie.
    """
    with torch.no_grad():
        kept = sums.log_z / query.temperature
        rounding = _ULP * (sums.mean.shape[1] + 16) * kept.abs()
        # Where a part was swept densely, the sum itself is as right as a sweep's weights are.
        rounding = rounding + torch.where((parts.levels == 0).any(0), DENSE_ERROR, 0.0)
        lost = torch.logsumexp(parts.log_weight, 0)
        ratio = torch.where(torch.isneginf(lost), 0.0, torch.exp(lost - kept + rounding))
        weight = ratio.clamp(max=1.0)
        off = torch.linalg.vector_norm(sums.mean.to(torch.float64) - center, dim=1)
        mean_error = torch.where(weight > 0, weight * (radius + off * (1 + 2.0**-20)), 0.0)
        score_error = query.alpha.abs() * mean_error / query.sigma / query.sigma
        return Certificate(
            weight=weight,
            mean_error=mean_error,
            score_error=torch.where(weight > 0, score_error, 0.0),
            log_z_error=query.temperature.detach() * torch.log1p(ratio),
            rows_kept=parts.rows_kept.sum(0).to(torch.int64),
            levels=parts.levels.amax(0).to(torch.int64),
        )


def nothing_dropped(like: Tensor, n: int) -> Certificate:
    """Of dense sweeps over n rows: zeros."""
    zero = torch.zeros_like(like)
    none = torch.zeros_like(zero, dtype=torch.int64)
    return Certificate(zero, zero, zero, zero, none + n, none)
