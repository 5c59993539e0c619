"""Orthonormal bases whose first coordinates hold most of the variance of a set of rows.

Two of them: the principal directions of the rows (`Principal`), fitted, a matrix; and for images
the discrete cosine transform (`Cosine`), a product along each axis, which needs no fit but the
order of its coordinates and no D x D matrix. Each says how far the coordinates it computes can be
from those in an exactly orthonormal basis, so that what is built on them stays proven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memokern.calls import CosineTransform

# Rows that a basis is fitted on, at most: the directions of 4096 rows, the variances of 1024.
FIT_ROWS = 4096
ORDER_ROWS = 1024
# From this many features on the principal directions come from products with the sample (subspace
# iteration), because all eigenvectors of a [D, D] matrix would take longer than everything else.
FULL_EIGEN = 1024


def unit(dtype: torch.dtype) -> float:
    """The relative error of one rounding to nearest.

    Example:
        >>> import torch
        >>> from memokern.index.basis import unit
        >>> unit(torch.float32) == 2.0**-24
        True
    """
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """The relative error of a sum of n products, in any order, against the sum of their sizes.

    Example:
        >>> import torch
        >>> from memokern.index.basis import gamma
        >>> f"{gamma(100, torch.float32):.3g}"
        '5.96e-06'
    """
    nu = n * unit(dtype)
    return nu / (1 - nu) if nu < 1 else math.inf


def _defect(matrix: Tensor) -> float:
    """A bound on ||Q Q^T - I||_2, and with it on the distance to an orthonormal matrix.

    If the singular values s of Q have |s^2 - 1| <= d then |s - 1| <= d: the polar factor of Q,
    which is orthonormal, is no farther than d from it. The Frobenius norm bounds the 2-norm; the
    product itself is rounded by at most gamma |q_i| |q_j| in each entry.
    """
    n = matrix.shape[1]
    gram = matrix @ matrix.T
    gram.diagonal().sub_(1)
    size = float(torch.linalg.matrix_norm(matrix)) ** 2  # sum of |q_i|^2
    return 1.001 * (float(torch.linalg.matrix_norm(gram)) + gamma(n + 2, torch.float64) * size)


class Cosine:
    """The orthonormal DCT-II along every axis of a row, channels included (for three channels that
    is the rotation to grey, red against blue, and green against both).

    Args:
        shape: of a row, [H, W], [C, H, W] or [H, W, C] (C <= 4 tells which axis has the channels;
            of [64, 32, 32] the first).
        order: [M] int64, which coordinates of the flattened transform are kept, in which order.

    The rotation of the channels comes first, because in each of the rotated ones only the
    frequencies up to the largest one kept have to be computed: few for colours.
    """

    name = "dct"

    def __init__(self, shape: Sequence[int], order: Tensor) -> None:
        self.shape = tuple(shape)
        self.axes = _axes(self.shape)
        self.order = order
        self.size, self.dim = len(order), math.prod(self.axes)
        channel, row, column = torch.unravel_index(order.cpu(), self.axes)
        place = torch.empty_like(channel)
        turn, down, across = (cosines(n) for n in self.axes)
        self._parts: list[tuple[Tensor, ...]] = []
        offset = 0
        # The first (grey), which needs most frequencies, and all others.
        for first, end in ((0, 1), (1, self.axes[0])):
            here = (channel >= first) & (channel < end)
            if here.any():
                height, width = (int(k[here].max()) + 1 for k in (row, column))
                local = ((channel - first) * height + row) * width + column
                place[here] = offset + local[here]
                offset += (end - first) * height * width
                part = (turn[first:end], down[:height], across[:width].T.contiguous())
                self._parts.append(tuple(matrix.to(order.device) for matrix in part))
        self._place = place.to(order.device)
        self._defects = [_defect(cosines(n)) for n in self.axes]
        self._typed: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}

    @classmethod
    def fit(cls, sample: Tensor, shape: Sequence[int], size: int) -> Cosine:
        """The `size` coordinates with the largest mean square over a centred sample [m, D]."""
        everything = cls(shape, torch.arange(sample.shape[1], device=sample.device))
        energy = everything.coordinates(sample).square_().sum(dim=0)
        order = torch.sort(energy, descending=True, stable=True).indices[:size]
        return cls(shape, order.contiguous())

    def coordinates(self, value: Tensor) -> Tensor:
        """[m, D] float64 or float32, centred rows -> their coordinates [m, M], in that type."""
        parts = self._typed.get(value.dtype)
        if parts is None:
            parts = [tuple(m.to(value.dtype) for m in part) for part in self._parts]
            self._typed[value.dtype] = parts
        m, (channels, height, width) = len(value), self.axes
        if self.channels_last:
            value = value.reshape(m, height, width, channels).transpose(1, 3).transpose(2, 3)
        value = value.reshape(m, channels, height * width)
        found = []
        for turn, down, across in parts:
            turned = turn @ value if channels > 1 else value
            rows = turned.reshape(m * len(turn) * height, width) @ across
            box = down @ rows.reshape(m * len(turn), height, across.shape[1])
            found.append(box.reshape(m, len(turn) * len(down) * across.shape[1]))
        return torch.cat(found, dim=1).index_select(1, self._place)

    @property
    def channels_last(self) -> bool:
        return len(self.shape) == 3 and self.axes[0] != self.shape[0]

    def transform(self, side: int) -> CosineTransform:
        """The transform as a kernel takes it, whose boxes are padded to multiples of `side`."""
        channel, row, column = torch.unravel_index(self.order, self.axes)
        box = torch.zeros(self.axes[0], 2, dtype=torch.int64)
        place = torch.empty_like(channel)
        count = 0
        for c in range(self.axes[0]):
            here = channel == c
            if here.any():
                down, across = int(row[here].max()) + 1, int(column[here].max()) + 1
                tall = -(-down // side) * side
                box[c, 0], box[c, 1] = down, across
                place[here] = count + column[here] * tall + row[here]
                count += across * tall
        turn, down_all, across_all = (cosines(n).to(torch.float32) for n in self.axes)
        return CosineTransform(
            self.axes,
            self.channels_last,
            turn,
            down_all,
            across_all,
            box,
            count,
            place.to(torch.int32),
        )

    def error(self, dtype: torch.dtype) -> float:
        """Coordinates computed in this type from v are within error * |v| of the exact ones.

        Along an axis of n entries a coordinate is a sum of n products with a matrix rounded once:
        gamma(n + 1) |C| |v|, and the 2-norm of |C| is at most its Frobenius norm, sqrt(n).
        """
        total = 1.0
        for n, defect in zip(self.axes, self._defects, strict=True):
            if n > 1:
                total *= 1 + defect + 1.001 * gamma(n + 1, dtype) * math.sqrt(n)
        return total - 1

    def state(self) -> dict[str, Tensor]:
        return {"order": self.order}

    def to(self, device: torch.device) -> Cosine:
        return Cosine(self.shape, self.order.to(device))


class Principal:
    """Coordinates along the rows of a matrix [M, D] float64, orthonormal up to rounding."""

    name = "pca"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dim = matrix.shape
        self._defect = _defect(matrix)

    @classmethod
    def fit(cls, sample: Tensor, shape: Sequence[int], size: int) -> Principal:
        """The `size` leading principal directions of a centred sample [m, D] float64.

        All eigenvectors of the covariance up to `FULL_EIGEN` features. Beyond, subspace
        iteration from a fixed start: its directions are close to the principal ones, and being
        orthonormal is all that a bound needs.
        """
        dim = sample.shape[1]
        if dim <= FULL_EIGEN:
            vectors = torch.linalg.eigh(sample.T @ sample).eigenvectors
            return cls(vectors.flip(1)[:, :size].T.contiguous())
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(dim, min(dim, size + 32), generator=generator, dtype=torch.float32)
        # The products may be rounded: the directions only have to be good. They are made
        # orthonormal in float64 at the end.
        scale = float(sample.abs().amax()) or 1.0
        rows = (sample / scale).to(torch.float32)
        found = start.to(sample.device)
        for _ in range(3):
            found = torch.linalg.qr(rows.T @ (rows @ found)).Q
        small = (rows @ found).to(torch.float64)
        vectors = torch.linalg.eigh(small.T @ small).eigenvectors.flip(1)
        leading = found.to(torch.float64) @ vectors[:, :size]
        return cls(torch.linalg.qr(leading).Q.T.contiguous())

    def coordinates(self, value: Tensor) -> Tensor:
        """[m, D] centred rows -> [m, M] float64."""
        return value.to(torch.float64) @ self.matrix.T

    def error(self, dtype: torch.dtype) -> float:
        """As for `Cosine`; always float64 here, where a sum over all features loses nothing."""
        rounding = gamma(self.dim + 1, torch.float64) * math.sqrt(self.size)
        return self._defect + 1.001 * rounding

    def state(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def to(self, device: torch.device) -> Principal:
        return Principal(self.matrix.to(device))


def from_state(name: str, state: Mapping[str, Tensor], shape: Sequence[int]) -> Cosine | Principal:
    """The basis that `state()` described. ValueError for what is none."""
    dim = math.prod(shape)
    if name == "dct" and len(shape) in (2, 3):
        order = state.get("order")
        if order is not None and order.dtype == torch.int64 and order.dim() == 1:
            distinct = order.unique()
            if len(distinct) == len(order) > 0 and 0 <= int(distinct[0]) <= int(distinct[-1]) < dim:
                return Cosine(shape, order)
    if name == "pca":
        matrix = state.get("matrix")
        if (
            matrix is not None
            and (matrix.dtype, matrix.dim()) == (torch.float64, 2)
            and matrix.shape[1] == dim
            and bool(torch.isfinite(matrix).all())
        ):
            return Principal(matrix)
    raise ValueError(f"the basis {name!r} of the index is damaged")


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of length n, [n, n] float64, one frequency per row.

    Example:
        >>> from memokern.index.basis import cosines
        >>> cosines(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    place, frequency = torch.arange(n), torch.arange(n)[:, None]
    # The angle's multiple of pi / 2n, modulo one turn, is exact; a large angle would not be.
    turn = ((2 * place + 1) * frequency) % (4 * n)
    matrix = torch.cos(turn.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix


def is_image(shape: Sequence[int]) -> bool:
    """Whether the cosine transform is meant for rows of this shape: [H, W], [C, H, W] or
    [H, W, C] with at least 8 x 8 pixels and 1 to 4 channels.

    Example:
        >>> from memokern.index.basis import is_image
        >>> is_image((3, 32, 32)), is_image((32, 32, 3)), is_image((100,)), is_image((64, 4, 4))
        (True, True, False, False)
    """
    if len(shape) not in (2, 3):
        return False
    channels, height, width = _axes(tuple(shape))
    return channels <= 4 and min(height, width) >= 8


def _axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a row's shape."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if shape[0] > 4 and shape[2] <= 4:
        return shape[2], shape[0], shape[1]
    return shape[0], shape[1], shape[2]
