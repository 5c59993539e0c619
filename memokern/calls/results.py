"""What an operation answers: sums over the rows, their gradients, and which rows can matter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memokern.calls.arguments import RowLists


class BasicSums(NamedTuple):
    """What one sweep over the rows gives, with logits l and weights w = softmax(l / T), as a
    backward pass is given it, or the gradients for it.

    mean: sum w y [B, D] in x's type. log_z: T logsumexp(l / T); mean_logit: sum w l;
    mean_bias: sum w bias; weight_sq: sum w^2; each [B] float64.
    """

    mean: Tensor
    log_z: Tensor
    mean_logit: Tensor
    mean_bias: Tensor
    weight_sq: Tensor


class Sums(NamedTuple):
    """All that one sweep over the rows gives: the fields of :class:`BasicSums`, and

    residual: sum w (alpha y - x) [B, D] in x's type, from these differences where alpha mean - x
    would cancel. Its gradient is one for mean, x and alpha (:mod:`memokern.ops.dense`).
    """

    mean: Tensor
    log_z: Tensor
    mean_logit: Tensor
    mean_bias: Tensor
    weight_sq: Tensor
    residual: Tensor


class Gradients(NamedTuple):
    """Gradients for the fields of a :class:`.Query`.

    x: [B, D] in x's type; sigma, alpha, temperature: [B] float64; bias: [N] float64, or [0] where
    the query has none (an operation cannot return None). condition: [B, K], bandwidth: [B], those
    for c and h of a :class:`.Condition`, float64, or [0] likewise.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor
    condition: Tensor
    bandwidth: Tensor


class Scan(NamedTuple):
    """Which rows can matter to each query, and what is proven of the others.

    lists: each ascending. threshold: [B] float64; with t = l / T, every row that is not listed has
    t <= threshold[b], and N exp(threshold - logsumexp t) <= eps. level: [B] int64, how many levels
    of the index were used; 0 where the query was given up, whose list is empty.
    """

    lists: RowLists
    threshold: Tensor
    level: Tensor

    @property
    def kept(self) -> Kept:
        """The same without the rows."""
        return Kept(self.threshold, self.level, self.lists.start.diff())


class Kept(NamedTuple):
    """How many rows can matter to each query, and what is proven of the others: threshold and
    level as a :class:`Scan`'s; rows [B] int64, the lengths of the lists."""

    threshold: Tensor
    level: Tensor
    rows: Tensor
