"""Queries in the coordinates of an index, with bounds on what rounding does to their products with
the rows' coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern.backends.protocol import Call, choose
from memokern.index.basis import Cosine, Principal, unit

# Queries are projected in chunks of at most this many numbers.
QUERY_ELEMENTS = 1 << 22
U32, U64 = unit(torch.float32), unit(torch.float64)


class Projected(NamedTuple):
    """Coordinates and norms of queries x, to be combined with those of the rows in an `Index`.

    For every row n and every level l of the index, with k = dims[l], in exact arithmetic on these
    numbers,

        | <xc, yc_n> - <z[:k], z_n[:k]> |
            <= sum over bands b >= first_band[l] of norms[b] norms_n[b]
               + (norms[-1] pad_n, at levels l >= 1) + margin

    where xc = x - alpha c, yc_n = y_n - c, and z_n, norms_n, pad_n are what the index stores. The
    same holds when the left product and the sum are accumulated in float32, in any order.

    Attributes:
        z: [B, K] float32, the leading coordinates of xc.
        norms: [B, bands + 1] float32, the norm of xc in each band, and last |xc|, rounded up.
        margin: [B] float64. At least half of it is for the accumulation. It is inf where a query is
            not finite, or so large that a product would not be.
        sq: [B] float64, |xc|^2 rounded down. With it and the margin,
            sq + alpha^2 sq_norms - 2 (alpha <z, z_n> + |alpha| (bands + pad + margin)) is at most
            |x - alpha y_n|^2: the margin covers the rounding of the rows' sq_norms too.
    """

    z: Tensor
    norms: Tensor
    margin: Tensor
    sq: Tensor


class Projector:
    """Takes queries to the coordinates of an index.

    Args:
        basis: of the index. center: [D], subtracted from rows and queries.
        kept: K, how many coordinates the index keeps. edges: where its bands are cut.
        y_max: the largest |y_n - center|. row_error: a bound on the error of a row's coordinates.
    """

    def __init__(
        self,
        basis: Cosine | Principal,
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
        # Where the center is far from zero, compared with the rows' radius about it, x - alpha c
        # would lose too much in float32.
        self._near = self._center_norm <= 4 * y_max
        self._margin_cache: dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._compiled: Callable[..., tuple[Tensor, ...]] | None = None
        self._indicator = band_indicator(edges, basis.size, center.device)

    def __getstate__(self) -> dict[str, object]:
        # The compiled projection is made again at first use: it is no Python object to copy.
        return self.__dict__ | {"_compiled": None}

    def __call__(self, x: Tensor, alpha: Tensor) -> Projected:
        """The projection of x [B, D] float32 or float64 with alpha [B] float64; see
        `Index.project`."""
        compiled = self.backends_own(x)
        if compiled is not None:
            return Projected(*compiled(x, alpha))
        # The context is entered only where it is needed: it costs as much as a product here.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, alpha)
        step = max(1, QUERY_ELEMENTS // self._dim)
        if len(x) <= step:
            return self._project(x, alpha)
        parts = [self._project(*p) for p in zip(x.split(step), alpha.split(step), strict=True)]
        return Projected(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def backends_own(self, x: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
        """The backend's own projection, where it has one for such queries."""
        near = x.dtype == self._center.dtype == torch.float32 and self._near
        if not near or not isinstance(self._basis, Cosine):
            return None
        backend = choose("bound_scan", Call.of(x, x))
        make = getattr(backend, "cosine_projection", None)
        if make is None:
            return None
        if self._compiled is None:
            weights, constants = self._margins(U32, torch.float32)
            self._compiled = make(
                axes=self._basis.axes,
                channels_last=self._basis.channels_last,
                **self._basis.boxes(make.side())._asdict(),
                kept=self._kept,
                edges=torch.tensor(self._edges, device="cpu"),
                center=self._center.contiguous(),
                bound_weights=torch.cat([weights, constants[None]]),
                largest=1e36 / max(1.0, self._y_max),
            )
        return self._compiled

    def _project(self, x: Tensor, alpha: Tensor) -> Projected:
        alpha = alpha.to(torch.float64)
        narrow = isinstance(self._basis, Cosine) and _float32_is_float32(x.device)
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
        # The comparison is False, and the margin infinite, where a query is NaN too.
        margin = torch.where(high < 1e36 / max(1.0, self._y_max), margin, math.inf)
        norms = [*band_norms(coordinates, self._indicator, self._bands, high, error), high[:, None]]
        z = coordinates[:, : self._kept].to(torch.float32).contiguous()
        return Projected(z, rounded_up(torch.cat(norms, dim=1)), margin, low.clamp(min=0) ** 2)

    @torch.inference_mode(False)
    def _margins(self, u: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The coefficients of four bounds that are linear in the computed |xc| and in |alpha|.

        The bounds are, in this order: |xc| from above, |xc| from below, the error of the query's
        coordinates, and the margin. Returned are the coefficients [2, 4] and constants [4],
        float64, for xc rounded with unit roundoff u and coordinates computed in dtype. One matrix
        product then gives all four: as many small operations on [B] would cost as much as the
        transform of 64 queries.
        """
        found = self._margin_cache.get((u, dtype))
        if found is not None:
            return found
        dim, y_max, center = self._dim, self._y_max, self._center_norm
        # alpha, alpha c and the difference are each rounded once, which adds at most
        # u (2 |alpha c| + |xc|); the norm adds 2^-53 per feature.
        slack = [1.01 * u + (dim + 8) * U64, 2.02 * u * center]
        high = [1 + slack[0], slack[1]]
        low = [1 - slack[0], -slack[1]]
        # The error of all coordinates together, including their rounding to float32.
        relative = 1.01 * self._basis.error(dtype) + 2.02 * U32
        error = [relative * h + 1.01 * s for h, s in zip(high, slack, strict=True)]
        # The margin is the sum of: the accumulation of the products, and the rounding of the rows'
        # first coordinates to float32 at level 0; the error of the rows' coordinates; that of the
        # query's, in coordinates and bands together; half the rounding of alpha^2 sq_norms; and
        # products that underflow in float32.
        terms = self._kept + self._bands + 16
        share = y_max * (2 * terms + 2) * U32 + 2 * self._row_error
        margin = [share * h + y_max * e for h, e in zip(high, error, strict=True)]
        margin[1] += y_max * ((dim + 8) * U64 * y_max + 2 * self._row_error)
        least = dim * 2.0**-126 * (1 + y_max)
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self._center.device}
        weights = torch.tensor([high, low, error, margin], **kind).T.contiguous()
        found = weights, torch.tensor([0.0, 0.0, 0.0, least], **kind)
        self._margin_cache[u, dtype] = found
        return found


def band_indicator(edges: Sequence[int], size: int, device: torch.device) -> Tensor:
    """A matrix [size / step, 1 + inner bands] float64 of 0 and 1 that sums squared coordinates by
    band: column 0 selects the coordinates before the first band, each other column a band. A row
    stands for `step` coordinates, which lie in one band together."""
    inner = [0] + [edge for edge in edges if edge <= size]
    step = math.gcd(*inner)
    indicator = torch.zeros(size // step, len(inner) - 1, dtype=torch.float64, device=device)
    for band, (low, high) in enumerate(pairwise(inner)):
        indicator[low // step : high // step, band] = 1
    return indicator


def band_norms(
    coordinates: Tensor, indicator: Tensor, bands: int, high: Tensor, error: Tensor
) -> list[Tensor]:
    """The norms [m, bands] float64, in one or two pieces, of vectors v in each band.

    The bands among the coordinates computed, [m, M], have the norms of these. Where the coordinates
    of the last band were not computed, its piece [m, 1] is an upper bound on the true norm, from
    |v| <= high and the distance of the true coordinates from those computed, which must be at most
    `error` with (M + 8) 2^-53 of their norm to spare. Other roundings in float64 are left to
    `rounded_up`.
    """
    m, size = coordinates.shape
    squares = coordinates.to(torch.float64).square().view(m, len(indicator), size // len(indicator))
    sums = squares.sum(dim=2) @ indicator
    norms = [sums[:, 1:].sqrt()]
    if norms[0].shape[1] < bands:
        known = sums.sum(dim=1).sqrt_().sub_(error).clamp_(min=0.0)
        rest = ((high - known) * (high + known)).clamp_(min=0.0).sqrt_()
        norms.append(rest[:, None])
    return norms


def rounded_up(value: Tensor) -> Tensor:
    """Numbers >= 0 from float64 to float32, rounded up.

    2.5 units of float32's rounding are added: one covers the conversion, the others what a float64
    sum of up to 10^8 numbers has lost.
    """
    return (value * (1 + 2.5 * U32) + 2.0**-120).to(torch.float32)


def _float32_is_float32(device: torch.device) -> bool:
    """Whether PyTorch multiplies float32 matrices in float32 there, not in something shorter."""
    # torch.set_float32_matmul_precision shows in this setting too. Its own getter is not asked,
    # since it raises after the newer settings were used.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and settings.fp32_precision in ("none", "ieee")
