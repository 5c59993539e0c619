"""Queries in the coordinates of an index: what meets the numbers that it stores of the rows, and by
how much rounding can make the two miss each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.backends.protocol import Call, choose
from memokern.index import basis as bases

# Numbers in a chunk of queries.
QUERY_ELEMENTS = 1 << 22
U32, U64 = bases.unit(torch.float32), bases.unit(torch.float64)


class Projected(NamedTuple):
    """Queries x, for each the coordinates and norms that meet those of an `Index`.

    For every row n and ladder level l, with k = dims[l], in exact arithmetic on these numbers,

        | <xc, yc_n> - <z[:k], z_n[:k]> |
            <= sum over bands b >= first_band[l] of norms[b] norms_n[b]
               + (norms[-1] pad_n, at levels l >= 1) + margin

    where xc = x - alpha c, yc_n = y_n - c, and z_n, norms_n, pad_n are what the index stores. The
    same holds when the left product and the sum are accumulated in float32, in any order.

    Attributes:
        z: [B, K] float32, the leading coordinates of xc.
        norms: [B, bands + 1] float32, those of xc in each band; the last is |xc|, rounded up.
        margin: [B] float64, at least half of it for the accumulation; inf where a query is not
            finite, or so large that a product would not be.
        sq: [B] float64, |xc|^2 rounded down. With it, and the margin, the distance
            sq + alpha^2 sq_norms - 2 (alpha <z, z_n> + |alpha| (bands + pad + margin)) is at most
            |x - alpha y_n|^2: the margin covers the rounding of the rows' sq_norms too.
    """

    z: Tensor
    norms: Tensor
    margin: Tensor
    sq: Tensor


class Projector:
    """Takes queries to the coordinates of an index: its basis, center [D], the number of
    coordinates kept, the edges of its bands, the largest |y_n - center| and the error of the rows'
    coordinates.
    """

    def __init__(
        self,
        basis: bases.Cosine | bases.Principal,
        center: Tensor,
        kept: int,
        edges: Sequence[int],
        y_max: float,
        row_error: float,
    ) -> None:
        self._basis, self._center, self._kept, self._edges = basis, center, kept, edges
        self._bands, self._dim = len(edges) - 1, len(center)
        self._y_max, self._row_error = y_max, row_error
        self._center64 = center.to(torch.float64)
        self._center_norm = float(self._center64.norm())
        # Near enough for x - alpha c in float32.
        self._near = self._center_norm <= 4 * y_max
        self._margin_cache: dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._compiled: Callable[..., tuple[Tensor, ...]] | None = None
        self._cuts = cuts_of(edges, basis.size, center.device)

    def __call__(self, x: Tensor, alpha: Tensor) -> Projected:
        """Of x [B, D] float32 or float64 with alpha [B] float64; see `Index.project`."""
        compiled = self._backends_own(x)
        if compiled is not None:
            return Projected(*compiled(x, alpha))
        # A context costs as much as a product here.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, alpha)
        step = max(1, QUERY_ELEMENTS // self._dim)
        if len(x) <= step:
            return self._project(x, alpha)
        parts = [self._project(*p) for p in zip(x.split(step), alpha.split(step), strict=True)]
        return Projected(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _backends_own(self, x: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
        """The backend's own projection, where it has one of such queries."""
        near = x.dtype == self._center.dtype == torch.float32 and self._near
        if not near or not isinstance(self._basis, bases.Cosine):
            return None
        backend = choose("bound_scan", Call.of(x, x))
        make = getattr(backend, "cosine_projection", None)
        if make is None:
            return None
        if self._compiled is None:
            weights, constants = self._margins(U32, torch.float32)
            self._compiled = make(
                self._basis.transform(make.side()),
                self._kept,
                torch.tensor(self._edges),
                self._center.contiguous(),
                torch.cat([weights, constants[None]]),
                1e36 / max(1.0, self._y_max),
            )
        return self._compiled

    def _project(self, x: Tensor, alpha: Tensor) -> Projected:
        alpha = alpha.to(torch.float64)
        narrow = isinstance(self._basis, bases.Cosine) and _float32_is_float32(x.device)
        if narrow and x.dtype == self._center.dtype == torch.float32 and self._near:
            value = torch.addcmul(x, alpha.to(torch.float32)[:, None], self._center, value=-1)
            u = U32
        else:
            value = torch.addcmul(x.to(torch.float64), alpha[:, None], self._center64, value=-1)
            u = U64
        norm = torch.linalg.vector_norm(value, dim=1, dtype=torch.float64)
        coordinates = self._basis.coordinates(value.to(torch.float32) if narrow else value)
        weights, constants = self._margins(u, coordinates.dtype)
        scalars = torch.addmm(constants, torch.stack([norm, alpha.abs()], dim=1), weights)
        high, low, error, margin = scalars.unbind(dim=1)
        # False too where a query is NaN.
        margin = torch.where(high < 1e36 / max(1.0, self._y_max), margin, math.inf)
        norms = [*band_norms(coordinates, self._cuts, self._bands, high, error), high[:, None]]
        z = coordinates[:, : self._kept].to(torch.float32).contiguous()
        return Projected(z, rounded_up(torch.cat(norms, dim=1)), margin, low.clamp(min=0) ** 2)

    def _margins(self, u: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[2, 4] and [4] float64: what a query's norm as computed and |alpha| are worth in a bound
        of |xc| from above, one from below, of the error of its coordinates, and in the margin;
        for xc rounded in u, coordinates computed in dtype. (Few large operations: for a batch of
        64 small ones on [B] would cost as much as the transform.)"""
        found = self._margin_cache.get((u, dtype))
        if found is not None:
            return found
        dim, y_max, center = self._dim, self._y_max, self._center_norm
        # alpha, alpha c and the difference are each rounded once: at most u (2 |alpha c| + |xc|);
        # the norm 2^-53 per feature.
        slack = [1.01 * u + (dim + 8) * U64, 2.02 * u * center]
        high = [1 + slack[0], slack[1]]
        low = [1 - slack[0], -slack[1]]
        # Of all coordinates together, including their rounding to float32.
        relative = 1.01 * self._basis.error(dtype) + 2.02 * U32
        error = [relative * h + 1.01 * s for h, s in zip(high, slack, strict=True)]
        # In order: the products accumulated, and the rows' head rounded to float32 at level 0; the
        # rows' coordinates as computed; the query's, in the head and in the bands together; half
        # the rounding of alpha^2 sq_norms; products too small for float32.
        terms = self._kept + self._bands + 16
        share = y_max * (2 * terms + 2) * U32 + 2 * self._row_error
        margin = [share * h + y_max * e for h, e in zip(high, error, strict=True)]
        margin[1] += y_max * ((dim + 8) * U64 * y_max + 2 * self._row_error)
        least = dim * 2.0**-126 * (1 + y_max)
        weights = torch.tensor([high, low, error, margin], dtype=torch.float64).T.contiguous()
        constants = torch.tensor([0.0, 0.0, 0.0, least], dtype=torch.float64)
        found = weights.to(self._center.device), constants.to(self._center.device)
        self._margin_cache[u, dtype] = found
        return found


def cuts_of(edges: Sequence[int], size: int, device: torch.device) -> Tensor:
    """[size / step, 1 + inner bands] float64 of 0 and 1: which of the coordinates computed are in
    the head, and in each band that is cut out of them; `step` coordinates at a time."""
    inner = [0] + [edge for edge in edges if edge <= size]
    step = math.gcd(*inner)
    cuts = torch.zeros(size // step, len(inner) - 1, dtype=torch.float64)
    for band, (low, high) in enumerate(pairwise(inner)):
        cuts[low // step : high // step, band] = 1
    return cuts.to(device)


def band_norms(
    coordinates: Tensor, cuts: Tensor, bands: int, high: Tensor, error: Tensor
) -> list[Tensor]:
    """The norms of coordinates [m, M] as they are in each band cut out of them, [m, .] float64;
    then, for a last band that was not computed, a bound on its true norm, [m, 1].

    For that, |v| <= high, and the true coordinates are within `error` of those computed, with
    (M + 8) 2^-53 of their norm to spare. What float64 rounds beside that is left to `rounded_up`.
    """
    m, size = coordinates.shape
    squares = coordinates.to(torch.float64).square().view(m, len(cuts), size // len(cuts))
    sums = squares.sum(dim=2) @ cuts
    norms = [sums[:, 1:].sqrt()]
    if norms[0].shape[1] < bands:
        known = sums.sum(dim=1).sqrt_().sub_(error).clamp_(min=0.0)
        rest = ((high - known) * (high + known)).clamp_(min=0.0).sqrt_()
        norms.append(rest[:, None])
    return norms


def rounded_up(value: Tensor) -> Tensor:
    """float64 >= 0 to float32, rounded up; 1.5 of the 2.5 roundings to float32 that are added are
    left for what a sum in float64 of up to 10^8 numbers has lost."""
    return (value * (1 + 2.5 * U32) + 2.0**-120).to(torch.float32)


def _float32_is_float32(device: torch.device) -> bool:
    """Whether products of float32 matrices are made of float32, not of something shorter."""
    # set_float32_matmul_precision shows here too; its getter raises after newer settings.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and settings.fp32_precision in ("none", "ieee")
