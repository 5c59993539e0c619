"""An index made plainly, in float64, for the tests of what uses one: the contract of bound_scan.

Any orthonormal basis will do, since only what it promises is used: coordinates, norms of the rest
in bands, what rounding did to the stored coordinates, and a margin for the products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memokern import TrainingSet
from memokern.calls import LogitBounds, Query, Rows
from memokern.index.blocks import excess_of, layout
from tests import oracle

F32, F64 = torch.float32, torch.float64
U = 2.0**-24


def up(value: Tensor) -> Tensor:
    """float32, not below the float64 value."""
    return torch.nextafter((value * (1 + 1e-6)).float(), torch.tensor(torch.inf))


class Projected(NamedTuple):
    """Queries in the coordinates of an index, as `memokern.index.projection.Projected`."""

    z: Tensor
    norms: Tensor
    margin: Tensor
    sq: Tensor


def basis_of(kind: str, y: Tensor, center: Tensor, seed: int = 1) -> Tensor | None:
    """The principal axes of the rows, the axes themselves (None), or any orthonormal ones."""
    d = y.shape[1]
    if kind == "principal":
        yc = y - center
        return torch.linalg.svd(yc.T @ yc)[0]
    if kind == "axes":
        return None
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=g))[0]


class PlainIndex:
    """K <= D coordinates in levels, and bands that end at `edges`, of rows with their center and
    norms."""

    def __init__(
        self,
        rows: Rows,
        dims: Sequence[int] = (4, 8, 12),
        edges: Sequence[int] = (6, 10),
        storage: torch.dtype = torch.float16,
        basis: str | Tensor = "principal",
        in_blocks: bool = False,
    ):
        y = oracle.values(rows)
        n, d = y.shape
        self.center = y.mean(0) if rows.center is None else rows.center.to(F64)
        self._axes = basis_of(basis, y, self.center) if isinstance(basis, str) else basis
        self.basis = "plain"
        self.dims = tuple(sorted({min(k, d) for k in dims}))
        cuts = sorted({*self.dims, *(min(e, d) for e in edges), d})
        self.edges = [e for e in cuts if e >= self.dims[0]]
        self.bands = len(self.edges) - 1
        self.first_band = tuple(self.edges.index(k) for k in self.dims)
        yc = y - self.center
        true = self._turned(yc)
        k0, k = self.dims[0], self.dims[-1]
        coarse, self.fine = true[:, :k0].float(), true[:, k0:k].to(storage).contiguous()
        stored = torch.cat([coarse.double(), self.fine.double()], 1)
        pad = (stored - true[:, :k]).norm(dim=1, keepdim=True)
        self.coarse = torch.cat([coarse, up(self._norms(true)), up(pad)], 1).contiguous()
        self.sq_norms = yc.square().sum(1)
        self.y_max = yc.norm(dim=1).max().item() * (1 + 1e-6)
        self.n, self.mean_square = n, self.sq_norms.mean().item()
        self.blocks = None
        if in_blocks:
            half = (-0.5 * self.sq_norms).float()
            excess = excess_of(self.coarse, self.sq_norms)
            self.blocks = layout(self.coarse, k0, half, excess).blocks(self.coarse)

    fingerprint = "plain"

    def take(self, rows: slice, fingerprint: str, *, for_once: bool = False) -> PlainIndex:
        """The index of some of the rows."""
        part = copy.copy(self)
        part.coarse, part.fine = self.coarse[rows].contiguous(), self.fine[rows].contiguous()
        part.n, part.fingerprint, part.blocks = len(part.coarse), fingerprint, None
        return part

    def _turned(self, centred: Tensor) -> Tensor:
        return centred if self._axes is None else centred @ self._axes

    def _norms(self, true: Tensor) -> Tensor:
        """[., bands]: the norm of the coordinates of each band."""
        pairs = zip(self.edges, self.edges[1:], strict=False)
        parts = [true[:, a:b].norm(dim=1, keepdim=True) for a, b in pairs]
        return torch.cat([true[:, :0], *parts], 1)

    def backends_own(self, x: Tensor) -> None:
        """No backend projects to these coordinates by itself."""

    def project(self, x: Tensor, alpha: Tensor) -> Projected:
        """Queries [B, D] in these coordinates, and what rounding may do to products with them."""
        xc = x.double() - alpha[:, None] * self.center
        true = self._turned(xc)
        size = xc.norm(dim=1)
        norms = up(torch.cat([self._norms(true), size[:, None]], 1))
        # z in float32, level 0 of the rows in float32, products in float32.
        margin = U * (2 * (self.dims[-1] + self.bands + 16) + 4) * size * self.y_max
        # |xc|^2 and |yc_n|^2 are sums of D rounded squares of differences: the first goes down
        # by a bound on all these errors, whatever the row; the margin by what that takes from it.
        reach = self.y_max + 2 * self.center.norm()
        off = 2.0**-52 * (x.shape[1] + 32) * (size + alpha.abs() * reach).square()
        low = (size.square() - off).clamp(min=0.0)
        margin = margin + 2.0**-17 * self.y_max * (size - low.sqrt())
        return Projected(true[:, : self.dims[-1]].float(), norms, margin, low)

    def bounds(
        self, query: Query, eps: float = 1e-6, most_listed: int | None = None
    ) -> LogitBounds:
        """What bound_scan is given of these queries."""
        p = self.project(query.x, query.alpha)
        most = self.n if most_listed is None else most_listed
        return LogitBounds(
            self.coarse, self.fine, *p, self.dims, self.first_band, eps, most, self.blocks
        )  # fmt: skip

    def rows_with_norms(self, rows: Rows) -> Rows:
        """The rows, with this center and the norms about it."""
        return rows._replace(center=self.center, sq_norms=self.sq_norms)


def with_index(data: TrainingSet, **kwargs: object) -> TrainingSet:
    """The data set, indexed plainly."""
    data._derived.index = PlainIndex(data.as_rows(), **kwargs)
    return data


def check_lists(found: tuple[Tensor, ...], t: Tensor, eps: float = 1e-6) -> None:
    """The promise of bound_scan, literally, against all logits t [B, N]: (start, index, threshold,
    level)."""
    start, index, threshold, level = found
    assert start.dtype == index.dtype == level.dtype == torch.int64 and threshold.dtype == F64
    assert start[0] == 0 and start[-1] == len(index)
    count, bounded = start.diff(), level > 0
    assert bool(((count > 0) == bounded).all())
    query = torch.arange(len(t)).repeat_interleave(count)
    ascending = (index.diff() > 0) | (query.diff() > 0)
    assert bool(ascending.all())
    listed = torch.zeros(t.shape, dtype=torch.bool)
    listed[query, index] = True
    # Every row above the threshold is listed, and none whose bias is -inf.
    assert bool((listed | (t <= threshold[:, None]))[bounded].all())
    assert not bool(torch.isneginf(t[query, index]).any())
    # The threshold is a sum of doubles the size of the largest logit.
    slack = 1e-13 * t.amax(1).abs()
    off = math.log(t.shape[1]) + threshold - torch.logsumexp(t, 1) - slack
    assert bool((off[bounded] <= math.log(eps)).all())
