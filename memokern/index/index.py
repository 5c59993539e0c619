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

import copy
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memokern.data.storage import readable
from memokern.index import basis as bases
from memokern.index.projection import Projected, Projector

VERSION = 1
# What to do with an index that cannot be used.
ANEW = "load with index=False, then build_index() anew"
STORAGES = {"float16": torch.float16, "float32": torch.float32}
# Of the rows that a fingerprint looks at.
SEEN_BYTES = 1 << 22


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
        >>> from memokern.data.training_set import TrainingSet
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
        last = self.dims[-1]
        self._projector = Projector(basis, center, last, self.edges, y_max, row_error)

    @property
    def n(self) -> int:
        return self.coarse.shape[0]

    @property
    def dim(self) -> int:
        return self.center.shape[0]

    @property
    def device(self) -> torch.device:
        return self.coarse.device

    @functools.cached_property
    def mean_square(self) -> float:
        """The mean square of y - center, about: half the mean squared distance of two rows."""
        held = self.coarse[:, :-1]  # the coordinates, and the norms of the bands of all others
        return float(torch.linalg.vector_norm(held, dtype=torch.float64)) ** 2 / max(1, self.n)

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

    def take(self, rows: Tensor | slice, fingerprint: str) -> Index:
        """The index of some of the rows, by their numbers; the bounds are about the same center."""
        part = copy.copy(self)
        part.coarse, part.fine = (v[rows].contiguous() for v in (self.coarse, self.fine))
        part.fingerprint = fingerprint
        return part

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
        return self._projector(x, alpha)

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
                f"{scale!r} and shift {shift!r}: they changed after it was built; "
                f"{ANEW}"
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
        raise ValueError(f"the index in the file cannot be used ({error}); {ANEW}") from error
    return index, sq_norms


# --- bands, rounding, which rows ---------------------------------------------------------------


def spread(n: int, most: int) -> Tensor:
    """At most `most` row numbers of n, spread evenly, the same ones always; all of them if few.

    Example:
        >>> from memokern.index.index import spread
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
