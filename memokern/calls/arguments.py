"""What an operation is asked: queries, rows, lists of rows, and bounds on their logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls.values import dequantized

WEIGHTINGS = ("gaussian", "log")


class Rows(NamedTuple):
    """Training rows as they are stored, y_n = scale * data[n] + shift rounded as
    :func:`memokern.calls.values.dequantized` does, with what is known of them.

    data: [N, D] float64, float32, bfloat16, float16 or uint8; each row contiguous.
    center: [D] float32 or float64, and sq_norms: [N] float64 = |y_n - center|^2. A training set
    keeps both; where there is none, a backend computes a center of its own.
    conditions: [N, K] float64, what a :class:`Condition` is compared with, or None.
    """

    data: Tensor
    scale: float = 1.0
    shift: float = 0.0
    center: Tensor | None = None
    sq_norms: Tensor | None = None
    conditions: Tensor | None = None

    @property
    def n(self) -> int:
        """N, the number of rows."""
        return self.data.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.data.shape[1]

    def values(self, where: slice | Tensor) -> Tensor:
        """y of some rows, as float64 numbers."""
        return dequantized(self.data[where], self.scale, self.shift).to(torch.float64)

    def in_units(self, unit: float) -> Rows:
        """The rows multiplied by a power of two, without what is known of them."""
        return self._replace(
            scale=self.scale * unit, shift=self.shift * unit, center=None, sq_norms=None
        )

    def detach(self) -> Rows:
        """The same rows, of which no gradient is recorded."""
        return self._replace(data=self.data.detach())


class Condition(NamedTuple):
    """What queries ask of the rows' conditions c_n: the logit of row n gets

        -(|c - c_n|^2 - |c - a|^2) / (2 h^2),

    at most 0. At h = 0 its limit: 0 where c_n is as near as a, else -inf.

    c: [B, K], h: [B] >= 0, both float64. a: [B, K] float64, the nearest of all rows' conditions,
    from which the part counts so that it is finite for some row whatever h is. A constant: the
    gradient for c is sum_n g_n (c_n - a) / h^2.
    """

    c: Tensor
    h: Tensor
    a: Tensor

    def take(self, at: Tensor | slice) -> Condition:
        """Those of the queries at these positions."""
        return Condition(self.c[at], self.h[at], self.a[at])


class Query(NamedTuple):
    """Queries, and how each of them weighs the rows.

    x: [B, D] float32 or float64. sigma, alpha, temperature: [B] float64.
    bias: [N] float64, finite or -inf (the row is left out), or None.
    weighting: with r^2 = |x - alpha y_n|^2 the logit of row n is, for "gaussian",
    -r^2 / (2 sigma^2) + bias_n; for "log", -(D / 2) log(r^2 / D) + bias_n.
    precision: how products with float32 rows are formed where there is a choice; see
    :func:`memokern.posterior`.
    condition: a :class:`Condition`, whose part counts as bias too, or None. leave_out: [B] int64,
    the number of a row that does not count for this query, -1 for none; or None.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    weighting: str = "gaussian"
    precision: str = "auto"
    condition: Condition | None = None
    leave_out: Tensor | None = None

    def take(self, at: Tensor | slice) -> Query:
        """The queries at these positions."""
        return self._replace(
            x=self.x[at],
            sigma=self.sigma[at],
            alpha=self.alpha[at],
            temperature=self.temperature[at],
            condition=None if self.condition is None else self.condition.take(at),
            leave_out=None if self.leave_out is None else self.leave_out[at],
        )

    def detach(self) -> Query:
        """The same queries, of which no gradient is recorded."""
        return self._replace(
            x=self.x.detach(),
            sigma=self.sigma.detach(),
            alpha=self.alpha.detach(),
            temperature=self.temperature.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            condition=None
            if self.condition is None
            else Condition(*(v.detach() for v in self.condition)),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """x, sigma, alpha, temperature, bias, condition, bandwidth: what a gradient can be taken
        for."""
        c, h = (None, None) if self.condition is None else self.condition[:2]
        return self.x, self.sigma, self.alpha, self.temperature, self.bias, c, h

    @property
    def own_bias(self) -> bool:
        """Whether each query has a bias of its own: that of a condition, or a row left out."""
        return self.condition is not None or self.leave_out is not None

    def computes_in_float64(self, rows: Rows) -> bool:
        """Whether the sweep over these rows accumulates in float64."""
        return torch.float64 in (self.x.dtype, rows.data.dtype)


class RowLists(NamedTuple):
    """For each query a list of rows: query b's rows are index[start[b] : start[b + 1]].

    start: [B + 1] int64, from 0 to M without falling. index: [M] int64, in 0..N-1.
    """

    start: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class Segments(NamedTuple):
    """For each query a segment of the rows: query b sees rows first[b] to end[b] - 1, at least one.

    first, end: [B] int64.
    """

    first: Tensor
    end: Tensor


class Blocks(NamedTuple):
    """Rows in blocks of rows that lie near each other, as :mod:`memokern.index.blocks` makes them.

    order: [N] int32, the rows block by block. coarse: what :class:`LogitBounds` has of them, and
    half: [N] float32, -|y - center|^2 / 2, both in this order. boxes: [panels, box, 2, 16] float32,
    the least and the largest of the `box` numbers of each of 16 blocks; hulls: the same of the rows
    of 16 panels each. excess: the most that the squares of a row's numbers at level 0 exceed
    |y - center|^2 by.
    """

    order: Tensor
    coarse: Tensor
    half: Tensor
    boxes: Tensor
    hulls: Tensor
    excess: float


class LogitBounds(NamedTuple):
    """What an index knows of the rows and of the queries, and how much weight may be left out.

    coarse, fine, dims, first_band: as in :class:`memokern.index.index.Index`. z, norms, margin, sq:
    as in :class:`memokern.index.projection.Projected`.
    eps: the share of the weight that the rows left out may carry, in (0, 1).
    most_listed: the number of rows whose list costs as much as one more query in a dense sweep; a
    query of which more rows are left is given up. reading: what a sweep costs beside its queries,
    in queries; a backend may do without a sweep where it saves less.
    blocks: by which a backend may exclude rows faster, or None.
    """

    coarse: Tensor
    fine: Tensor
    z: Tensor
    norms: Tensor
    margin: Tensor
    sq: Tensor
    dims: tuple[int, ...]
    first_band: tuple[int, ...]
    eps: float
    most_listed: int
    blocks: Blocks | None = None
    reading: float = 2.0
