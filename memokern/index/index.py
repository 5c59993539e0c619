"""What is kept of a training set to prove, cheaply, which rows have no weight.

In an orthonormal basis whose first coordinates hold most of the variance, let x and y be taken
about the center, and their coordinates from k on be cut into bands b. Then, by the Cauchy-Schwarz
inequality in each band,

    | <x, y> - <x[:k], y[:k]> |  <=  sum over the bands b beyond k of |x_b| |y_b|

The `Index` holds the norms of every row in the bands, and its first coordinates, of which each
level of the index uses more than the one before. `Index.project` gives the same numbers for
queries. All are rounded so that the inequality holds for what is stored, not only in exact
arithmetic; `Projected` says what has to be added for that.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memokern.calls import Blocks
from memokern.index.basis import Cosine, Principal, from_state
from memokern.index.blocks import Layout, worth_layout
from memokern.index.checksum import sealed
from memokern.index.projection import Projected, Projector
from memokern.util.text import byte_size

VERSION = 3
LAYOUT_TENSORS = ("order", "half", "boxes", "hulls")
AT_ONCE = 1 << 14  # rows that are summed together
# What to do with an index that cannot be used.
REBUILD_HINT = "load with index=False, then build_index() anew"
STORAGES = {"float16": torch.float16, "float32": torch.float32}
# A fingerprint looks at rows of at most this many bytes together.
FINGERPRINT_BYTES = 1 << 22


class Index:
    """The coordinates and band norms of all rows of a training set. Immutable.

    `TrainingSet.build_index` makes it, and says what the choices are.

    Attributes:
        basis: "dct" or "pca". dims: how many coordinates each level uses, k0 < k1 < ... = K.
        bands: how many bands the coordinates beyond k0 are cut into. edges: where they are cut,
            from k0 to D. first_band: for each level, the first band beyond its coordinates.
        coarse: [N, k0 + bands + 1] float32: the first k0 coordinates; the norms of the bands,
            rounded up; and the pad, a bound on the distance between the stored and the true
            coordinates.
        fine: [N, K - k0] float16 or float32, the other coordinates.
        center: [D] float32 or float64, what was subtracted from the rows.
        y_max: the largest |y_n - center|, rounded up. row_error: a bound on the distance between
            the computed coordinates of a row, before they are stored, and the true ones.
        fingerprint: a hash that tells whether the index belongs to given rows.
        n: N. dim: D. nbytes: of all that is kept. device: where the tensors are.

    Example:
        >>> from memokern.data.training_set import TrainingSet
        >>> index = TrainingSet.digits().build_index().index
        >>> index
        Index(dct: 1797 rows, 32 to 64 of 64 dimensions, 1 band, float16, 632.8 kB, cpu)
        >>> index.coarse.shape, index.fine.shape, index.first_band
        (torch.Size([1797, 34]), torch.Size([1797, 32]), (0, 1))
    """

    def __init__(
        self,
        basis: Cosine | Principal,
        dims: Sequence[int],
        edges: Sequence[int],
        coarse: Tensor,
        fine: Tensor,
        center: Tensor,
        *,
        y_max: float,
        row_error: float,
        fingerprint: str,
        layout: Layout | None = None,
    ) -> None:
        self._basis = basis
        self.basis = basis.name
        self.dims, self.edges = tuple(dims), tuple(edges)
        self.bands = len(edges) - 1
        self.first_band = tuple(self.edges.index(k) for k in self.dims)
        self.coarse, self.fine, self.center = coarse, fine, center
        self.y_max, self.row_error, self.fingerprint = y_max, row_error, fingerprint
        self._layout = layout
        last = self.dims[-1]
        self._projector = Projector(basis, center, last, self.edges, y_max, row_error)

    @property
    def transform(self) -> Cosine | Principal:
        """The basis itself, whose `coordinates` the index has of all rows."""
        return self._basis

    @property
    def n(self) -> int:
        """N, the number of rows."""
        return self.coarse.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.center.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.coarse.device

    @functools.cached_property
    def mean_square(self) -> float:
        """About the mean of |y - center|^2, which is half the mean squared distance of two rows."""
        held = self.coarse[:, :-1]  # k0 coordinates, and norms of bands that have all the others
        # Part by part: their copy in float64 would be as large as half an index.
        parts = (part.to(torch.float64).square().sum() for part in held.split(AT_ONCE))
        return float(sum(parts, torch.zeros((), device=self.device))) / max(1, self.n)

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """Rows near each other, by which the CPU's scan excludes many at once; None on other
        devices, for few rows, and in an index that an earlier version wrote."""
        return None if self._layout is None else self._layout.blocks(self.coarse)

    @property
    def nbytes(self) -> int:
        """Bytes of the coordinates and norms of the rows, and of the basis."""
        held = [self.coarse, self.fine, self.center, *self._basis.state().values()]
        if self._layout is not None:
            held += [*self._layout[:-1], self.coarse]  # and its copy
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def __repr__(self) -> str:
        stored = str(self.fine.dtype).removeprefix("torch.")
        bands = f"{self.bands} band{'s' * (self.bands != 1)}"
        return (
            f"Index({self.basis}: {self.n} rows, {self.dims[0]} to {self.dims[-1]} of {self.dim} "
            f"dimensions, {bands}, {stored}, {byte_size(self.nbytes)}, {self.device})"
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
            y_max=self.y_max,
            row_error=self.row_error,
            fingerprint=self.fingerprint,
            layout=self._layout if device.type == "cpu" else None,
        )

    def take(self, rows: Tensor | slice, fingerprint: str, *, for_once: bool = False) -> Index:
        """The index of some of the rows, chosen by index or slice. Its center stays that of all
        rows: the bounds hold for any center. for_once: it has no blocks, which take longer to find
        than one use of them saves."""
        part = copy.copy(self)
        part.__dict__.pop("blocks", None)
        part.__dict__.pop("mean_square", None)
        part.coarse, part.fine = (v[rows].contiguous() for v in (self.coarse, self.fine))
        part.fingerprint = fingerprint
        if for_once:
            part._layout = None
        elif self._layout is not None:
            half = self._layout.half_by_row()[rows]
            part._layout = worth_layout(part.coarse, self.dims[0], half, self._layout.excess)
        return part

    @torch.no_grad()
    def project(self, x: Tensor, alpha: Tensor) -> Projected:
        """The projection of queries x [B, D] float32 or float64 with alpha [B] float64.

        No gradient flows through it.

        Raises: ValueError for wrong shapes.

        Numerics: with the DCT, whose sums are short, the coordinates of float32 queries on the CPU
        are computed in float32, unless PyTorch may multiply float32 matrices in a shorter type
        (TF32, bfloat16). All others are computed in float64. The margin is for the type that was
        used.

        Cost: a matrix product along each axis of the image for the DCT, B D K multiplications for
        PCA.
        """
        if x.dim() != 2 or x.shape[1] != self.dim or alpha.shape != x.shape[:1]:
            raise ValueError(
                f"expected x [B, {self.dim}] and alpha [B], got {list(x.shape)} and "
                f"{list(alpha.shape)}"
            )
        return self._projector(x, alpha)

    def backends_own(self, x: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
        """The backend's own projection of such queries, where it has one: for its own calls."""
        return self._projector.backends_own(x)

    # --- files --------------------------------------------------------------------------------

    def state(self, rows: Tensor | str, sq_norms: Tensor) -> tuple[str, dict[str, Tensor]]:
        """What `restored` needs, for a file: JSON with checksums of everything and of the rows
        [N, D], which may be given as their checksum, and tensors by name.

        The rows' sq_norms and the center go with it, since the bounds are for these very numbers,
        and computing them again could change the last bits.
        """
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
        if self._layout is not None:
            described["excess"] = self._layout.excess
            tensors |= {name: getattr(self._layout, name) for name in LAYOUT_TENSORS}
        basis = {f"basis.{name}": tensor for name, tensor in self._basis.state().items()}
        return sealed(described, tensors | basis, rows), tensors | basis

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
        if self._layout is not None:
            self._layout.require_consistent(self.n, k0, self.bands)

    def require_match(self, rows: Tensor, scale: float, shift: float) -> None:
        """ValueError unless the index was built on these rows [N, D]: their number, type, scale and
        shift, and the bytes of up to 256 of them, are compared."""
        if self.fingerprint != fingerprint(rows, scale, shift) or self.n != len(rows):
            raise ValueError(
                f"the index does not belong to these {len(rows)} rows [{rows.shape[1]}] with scale "
                f"{scale!r} and shift {shift!r}: they changed after it was built; "
                f"{REBUILD_HINT}"
            )


def restored(
    described: str, tensors: Mapping[str, Tensor], shape: Sequence[int]
) -> tuple[Index, Tensor]:
    """The index that `Index.state` described, for rows of this shape, and the rows' sq_norms.

    Raises: ValueError for an index of another version, or a damaged one.
    """
    try:
        found: dict[str, Any] = json.loads(described)
        version = found["version"]
        if version != VERSION:
            raise ValueError(
                f"expected version {VERSION}, got {version!r}: another memokern wrote it"
            )
        state = {name[6:]: part for name, part in tensors.items() if name.startswith("basis.")}
        layout = None
        if "excess" in found:
            parts = [tensors[name] for name in LAYOUT_TENSORS]
            layout = Layout._make([*parts, float(found["excess"])])
        index = Index(
            from_state(found["basis"], state, shape),
            [int(k) for k in found["dims"]],
            [int(k) for k in found["edges"]],
            tensors["coarse"],
            tensors["fine"],
            tensors["center"],
            y_max=float(found["y_max"]),
            row_error=float(found["row_error"]),
            fingerprint=str(found["fingerprint"]),
            layout=layout,
        )
        index._require_consistent(math.prod(shape))
        sq_norms = tensors["sq_norms"]
        if (tuple(sq_norms.shape), sq_norms.dtype) != ((index.n,), torch.float64):
            raise ValueError("its sq_norms do not fit it")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the index in the file cannot be used ({error}); {REBUILD_HINT}"
        ) from error
    return index, sq_norms


# --- which rows --------------------------------------------------------------------------------


def evenly_spaced_rows(n: int, most: int) -> Tensor:
    """At most `most` of n row numbers, spaced evenly, the same ones in every call.

    Example:
        >>> from memokern.index.index import evenly_spaced_rows
        >>> evenly_spaced_rows(3, 5).tolist(), evenly_spaced_rows(1000, 4).tolist()
        ([0, 1, 2], [0, 236, 618, 854])
    """
    if n <= most:
        return torch.arange(n, device="cpu")
    # Multiples of the golden ratio modulo 1 leave no large gap, and rows that repeat with any
    # period are not all hit alike.
    golden = 0x9E3779B97F4A7C15
    chosen = sorted({(i * golden % 2**64) * n >> 64 for i in range(most)})
    return torch.tensor(chosen, device="cpu")


def fingerprint(rows: Tensor, scale: float, shift: float) -> str:
    """A hash of the rows' number, type, scale and shift, and of the bytes of some of them."""
    some = rows.index_select(0, fingerprint_rows(len(rows), rows).to(rows.device))
    return fingerprint_of(some, tuple(rows.shape), scale, shift)


def fingerprint_rows(n: int, like: Tensor) -> Tensor:
    """The numbers of the rows, of n of this type and size, that a fingerprint looks at."""
    return evenly_spaced_rows(
        n, min(256, max(1, FINGERPRINT_BYTES // (like.shape[1] * like.element_size())))
    )


def fingerprint_of(some: Tensor, shape: tuple[int, ...], scale: float, shift: float) -> str:
    """The fingerprint of rows of this shape, of which these were looked at."""
    said = f"{shape} {some.dtype} {scale!r} {shift!r}"
    seen = some.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(said.encode() + seen).hexdigest()
