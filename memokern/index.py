"""What is kept of a training set to prove, cheaply, which rows have no weight.

In an orthonormal basis whose first coordinates hold most of the variance, with x and y taken about
the center, the coordinates from k on cut into bands b,

    | <x, y> - <x[:k], y[:k]> |  <=  sum over the bands b beyond k of |x_b| |y_b|

by Cauchy and Schwarz in each band. The `Index` holds the first coordinates of every row, in a
ladder of more and more, and the norms of its bands; `Index.project` gives the same of queries.
Every number is rounded so that the inequality holds for what is stored, not only in exact
arithmetic: `Projected` says what has to be added.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern import bases
from memokern.rows import readable

VERSION = 1
STORAGES = {"float16": torch.float16, "float32": torch.float32}
# Numbers in a chunk of queries.
QUERY_ELEMENTS = 1 << 22
# Of the rows that a fingerprint looks at.
SEEN_BYTES = 1 << 22
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


class Index:
    """The coordinates and band norms of all rows of a training set. Immutable.

    Made by `TrainingSet.build_index`, which says what the choices are.

    Attributes:
        basis: "dct" or "pca". dims: the ladder k0 < k1 < ... = K. bands: how many bands the
            coordinates beyond k0 are cut into, edges: where, from k0 to D. first_band: for each
            level, the first band beyond its coordinates.
        coarse: [N, k0 + bands + 1] float32: the first k0 coordinates, the norms of the bands,
            rounded up, and the pad: a bound on |z_n as stored - z_n|.
        fine: [N, K - k0] float16 or float32, the other coordinates.
        center: [D], what was subtracted. y_max: the largest |y_n - center|, rounded up.
        n, dim, nbytes, device.

    Example:
        >>> from memokern.data import TrainingSet
        >>> index = TrainingSet.digits().build_index().index
        >>> index
        Index(dct: 1797 rows, 32 to 64 of 64 dimensions, 1 band, float16, 360.2 kB, cpu)
        >>> index.coarse.shape, index.fine.shape, index.first_band
        (torch.Size([1797, 34]), torch.Size([1797, 32]), (0, 1))
    """

    def __init__(
        self,
        basis: bases.Cosine | bases.Principal,
        dims: Sequence[int],
        edges: Sequence[int],
        coarse: Tensor,
        fine: Tensor,
        center: Tensor,
        y_max: float,
        row_error: float,
        fingerprint: str,
    ) -> None:
        self._basis = basis
        self.basis = basis.name
        self.dims, self.edges = tuple(dims), tuple(edges)
        self.bands = len(edges) - 1
        self.first_band = tuple(self.edges.index(k) for k in self.dims)
        self.coarse, self.fine, self.center = coarse, fine, center
        self.y_max, self.row_error, self.fingerprint = y_max, row_error, fingerprint
        self._center64 = center.to(torch.float64)
        self._center_norm = float(self._center64.norm())
        # Near enough for x - alpha c in float32.
        self._near = self._center_norm <= 4 * y_max
        self._margin_cache: dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._cuts = cuts_of(self.edges, basis.size, center.device)

    @property
    def n(self) -> int:
        return self.coarse.shape[0]

    @property
    def dim(self) -> int:
        return self.center.shape[0]

    @property
    def device(self) -> torch.device:
        return self.coarse.device

    @property
    def nbytes(self) -> int:
        """Bytes of the coordinates and norms of the rows, and of the basis."""
        held = (self.coarse, self.fine, self.center, *self._basis.state().values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def __repr__(self) -> str:
        stored = str(self.fine.dtype).removeprefix("torch.")
        bands = f"{self.bands} band{'s' * (self.bands != 1)}"
        return (
            f"Index({self.basis}: {self.n} rows, {self.dims[0]} to {self.dims[-1]} of {self.dim} "
            f"dimensions, {bands}, {stored}, {readable(self.nbytes)}, {self.device})"
        )

    def to(self, device: torch.device | str) -> Index:
        """The same index on another device."""
        device = torch.device(device)
        return Index(
            self._basis.to(device),
            self.dims,
            self.edges,
            self.coarse.to(device),
            self.fine.to(device),
            self.center.to(device),
            self.y_max,
            self.row_error,
            self.fingerprint,
        )

    # --- queries ------------------------------------------------------------------------------

    @torch.no_grad()
    def project(self, x: Tensor, alpha: Tensor) -> Projected:
        """What `Projected` says, of queries x [B, D] float32 or float64 with alpha [B] float64.

        Raises ValueError for wrong shapes. No gradient flows.

        Numerics: the coordinates of float32 queries on the CPU are computed in float32 with the
        DCT, whose sums are short, in float64 otherwise, and the margin is for that. float64 is
        used too where the products of float32 are allowed to be less than that (TF32, bfloat16).

        Cost: two products per axis of the image for the DCT, B D K multiplications for PCA.
        """
        if x.dim() != 2 or x.shape[1] != self.dim or alpha.shape != x.shape[:1]:
            raise ValueError(
                f"expected x [B, {self.dim}] and alpha [B], got {list(x.shape)} and "
                f"{list(alpha.shape)}"
            )
        # A context costs as much as a product here.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.project(x, alpha)
        step = max(1, QUERY_ELEMENTS // self.dim)
        if len(x) <= step:
            return self._project(x, alpha)
        parts = [self._project(*p) for p in zip(x.split(step), alpha.split(step), strict=True)]
        return Projected(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _project(self, x: Tensor, alpha: Tensor) -> Projected:
        alpha = alpha.to(torch.float64)
        narrow = self.basis == "dct" and _float32_is_float32(x.device)
        if narrow and x.dtype == self.center.dtype == torch.float32 and self._near:
            value = torch.addcmul(x, alpha.to(torch.float32)[:, None], self.center, value=-1)
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
        margin = torch.where(high < 1e36 / max(1.0, self.y_max), margin, math.inf)
        norms = [*band_norms(coordinates, self._cuts, self.bands, high, error), high[:, None]]
        z = coordinates[:, : self.dims[-1]].to(torch.float32).contiguous()
        return Projected(z, rounded_up(torch.cat(norms, dim=1)), margin, low.clamp(min=0) ** 2)

    def _margins(self, u: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[2, 4] and [4] float64: what a query's norm as computed and |alpha| are worth in a bound
        of |xc| from above, one from below, of the error of its coordinates, and in the margin;
        for xc rounded in u, coordinates computed in dtype. (Few large operations: for a batch of
        64 small ones on [B] would cost as much as the transform.)"""
        found = self._margin_cache.get((u, dtype))
        if found is not None:
            return found
        dim, y_max, center = self.dim, self.y_max, self._center_norm
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
        terms = self.dims[-1] + self.bands + 16
        share = y_max * (2 * terms + 2) * U32 + 2 * self.row_error
        margin = [share * h + y_max * e for h, e in zip(high, error, strict=True)]
        margin[1] += y_max * ((dim + 8) * U64 * y_max + 2 * self.row_error)
        least = dim * 2.0**-126 * (1 + y_max)
        weights = torch.tensor([high, low, error, margin], dtype=torch.float64).T.contiguous()
        constants = torch.tensor([0.0, 0.0, 0.0, least], dtype=torch.float64)
        found = weights.to(self.device), constants.to(self.device)
        self._margin_cache[u, dtype] = found
        return found

    # --- files --------------------------------------------------------------------------------

    def state(self, sq_norms: Tensor) -> tuple[str, dict[str, Tensor]]:
        """What `restored` needs, for a file: JSON, and tensors by name. With what the index was
        built about: computed anew the last bits could differ."""
        described = {
            "version": VERSION,
            "basis": self.basis,
            "dims": self.dims,
            "edges": self.edges,
            "y_max": self.y_max,
            "row_error": self.row_error,
            "fingerprint": self.fingerprint,
        }
        tensors = {"coarse": self.coarse, "fine": self.fine, "center": self.center}
        tensors["sq_norms"] = sq_norms
        basis = {f"basis.{name}": tensor for name, tensor in self._basis.state().items()}
        return json.dumps(described), tensors | basis

    def _require_consistent(self, dim: int) -> None:
        """ValueError unless the parts fit each other and rows of `dim` features."""
        dims, edges = self.dims, self.edges
        k0, last = dims[0], dims[-1]
        size = self._basis.size
        fits = (
            list(dims) == sorted(set(dims))
            and list(edges) == sorted(set(edges))
            and (edges[0], edges[-1]) == (k0, dim)
            and size in (edges[-1], edges[-2] if self.bands else dim)
            and size >= last
            and self.center.shape == (dim,)
            and self.center.dtype in (torch.float32, torch.float64)
            and self.coarse.dtype == torch.float32
            and self.fine.dtype in STORAGES.values()
            and self.coarse.shape == (self.n, k0 + self.bands + 1)
            and self.fine.shape == (self.n, last - k0)
            and math.isfinite(self.y_max)
            and self.y_max >= 0 <= self.row_error < math.inf
        )
        if not fits:
            raise ValueError("its parts do not fit each other, or the rows")

    def require_match(self, rows: Tensor, scale: float, shift: float) -> None:
        """ValueError unless this index is of these rows [N, D], by their number, type, scale and
        shift, and the bytes of some 256 of them."""
        if self.fingerprint != fingerprint(rows, scale, shift) or self.n != len(rows):
            raise ValueError(
                f"the index does not belong to these {len(rows)} rows [{rows.shape[1]}] with scale "
                f"{scale!r} and shift {shift!r}: they changed after it was built. Load with "
                "index=False, and build_index() anew"
            )


def restored(
    described: str, tensors: Mapping[str, Tensor], shape: Sequence[int]
) -> tuple[Index, Tensor]:
    """The index that `Index.state` described, of rows of this shape, and the rows' sq_norms.
    ValueError if it is none: of another version, or damaged."""
    try:
        found: dict[str, Any] = json.loads(described)
        version = found["version"]
        if version != VERSION:
            raise ValueError(f"it has version {version!r}, expected {VERSION}: of another memokern")
        state = {name[6:]: part for name, part in tensors.items() if name.startswith("basis.")}
        index = Index(
            bases.from_state(found["basis"], state, shape),
            [int(k) for k in found["dims"]],
            [int(k) for k in found["edges"]],
            tensors["coarse"],
            tensors["fine"],
            tensors["center"],
            float(found["y_max"]),
            float(found["row_error"]),
            str(found["fingerprint"]),
        )
        index._require_consistent(math.prod(shape))
        sq_norms = tensors["sq_norms"]
        if (tuple(sq_norms.shape), sq_norms.dtype) != ((index.n,), torch.float64):
            raise ValueError("its sq_norms do not fit it")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the index in the file cannot be used ({error}): load with index=False, then "
            "build_index() anew"
        ) from error
    return index, sq_norms


# --- bands, rounding, which rows ---------------------------------------------------------------


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


def spread(n: int, most: int) -> Tensor:
    """At most `most` row numbers of n, spread evenly, the same ones always; all of them if few.

    Example:
        >>> from memokern.index import spread
        >>> spread(3, 5).tolist(), spread(1000, 4).tolist()
        ([0, 1, 2], [0, 236, 618, 854])
    """
    if n <= most:
        return torch.arange(n)
    # Multiples of the golden ratio modulo 1 leave no large gap, and no period of the rows shows.
    golden = 0x9E3779B97F4A7C15
    return torch.tensor(sorted({(i * golden % 2**64) * n >> 64 for i in range(most)}))


def fingerprint(rows: Tensor, scale: float, shift: float) -> str:
    """A hash of what the rows are: number, type, scale, shift, and the bytes of some of them."""
    most = min(256, max(1, SEEN_BYTES // (rows.shape[1] * rows.element_size())))
    some = rows.index_select(0, spread(len(rows), most).to(rows.device)).cpu()
    said = f"{tuple(rows.shape)} {rows.dtype} {scale!r} {shift!r}"
    return hashlib.sha256(said.encode() + some.view(torch.uint8).numpy().tobytes()).hexdigest()
