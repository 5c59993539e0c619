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
    """

    data: Tensor
    scale: float = 1.0
    shift: float = 0.0
    center: Tensor | None = None
    sq_norms: Tensor | None = None

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

    def detach(self) -> Rows:
        """The same rows, of which no gradient is recorded."""
        return self._replace(data=self.data.detach())


class Query(NamedTuple):
    """Queries, and how each of them weighs the rows.

    x: [B, D] float32 or float64. sigma, alpha, temperature: [B] float64.
    bias: [N] float64, finite or -inf (the row is left out), or None.
    weighting: with r^2 = |x - alpha y_n|^2 the logit of row n is, for "gaussian",
    -r^2 / (2 sigma^2) + bias_n; for "log", -(D / 2) log(r^2 / D) + bias_n.
    precision: how products with float32 rows are formed where there is a choice; see
    :func:`memokern.posterior`.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    weighting: str = "gaussian"
    precision: str = "auto"

    def take(self, at: Tensor | slice) -> Query:
        """The queries at these positions."""
        return self._replace(
            x=self.x[at],
            sigma=self.sigma[at],
            alpha=self.alpha[at],
            temperature=self.temperature[at],
        )

    def detach(self) -> Query:
        """The same queries, of which no gradient is recorded."""
        return Query(
            self.x.detach(),
            self.sigma.detach(),
            self.alpha.detach(),
            self.temperature.detach(),
            None if self.bias is None else self.bias.detach(),
            self.weighting,
            self.precision,
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x, sigma, alpha, temperature, bias: what a gradient can be taken for."""
        return self.x, self.sigma, self.alpha, self.temperature, self.bias

    def computes_in_float64(self, rows: Rows) -> bool:
        """Whether the sweep over these rows accumulates in float64."""
        return torch.float64 in (self.x.dtype, rows.data.dtype)


class RowLists(NamedTuple):
    """For each query a list of rows: query b's rows are index[start[b] : start[b + 1]].

    start: [B + 1] int64, from 0 to M without falling. index: [M] int64, in 0..N-1.
    """

    start: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class LogitBounds(NamedTuple):
    """What an index knows of the rows and of the queries, and how much weight may be left out.

    coarse, fine, dims, first_band: as in :class:`memokern.index.index.Index`. z, norms, margin, sq:
    as in :class:`memokern.index.projection.Projected`.
    eps: the share of the weight that the rows left out may carry, in (0, 1).
    most_listed: the number of rows whose list costs as much as one more query in a dense sweep; a
    query of which more rows are left is given up.
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
