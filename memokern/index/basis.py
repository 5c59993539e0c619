"""Orthonormal bases whose first coordinates hold most of the variance of a set of rows.

There are two. :class:`Principal` has the principal directions of the rows, a matrix that has to be
fitted. :class:`Cosine` is the discrete cosine transform of images, a product along each axis, which
needs no D x D matrix; only the order of its coordinates is fitted. Each basis bounds the distance
between the coordinates it computes and those in an exactly orthonormal basis, so that bounds built
on these coordinates stay proven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A basis is fitted on at most this many rows: the first number is for principal directions, the
# second for the variances that order the coordinates of a cosine transform.
FIT_ROWS = 4096
ORDER_ROWS = 1024
# Above this many features the principal directions come from products with the sample (subspace
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


def defect(matrix: Tensor) -> float:
    """A bound d on ||Q Q^T - I||_2, which also bounds the distance to an orthonormal matrix.

    If the singular values s of Q have |s^2 - 1| <= d, then |s - 1| <= d, so that the polar factor
    of Q, which is orthonormal, is no farther than d from Q. The Frobenius norm bounds the 2-norm;
    the product itself is rounded by at most gamma |q_i| |q_j| in each entry.
    """
    n = matrix.shape[1]
    gram = matrix @ matrix.T
    gram.diagonal().sub_(1)
    size = float(torch.linalg.matrix_norm(matrix)) ** 2  # sum of |q_i|^2
    return 1.001 * (float(torch.linalg.matrix_norm(gram)) + gamma(n + 2, torch.float64) * size)


class Boxes(NamedTuple):
    """A cosine transform as the compiled projection takes it.

    For each rotated channel the kernel computes a box of frequencies, stored as [across, down] with
    `down` padded, and then picks the coordinates that are kept out of all boxes.
    """

    turn: Tensor  # [C, C] float32, rotates the channels
    down: Tensor  # [H, H] float32, one frequency per row
    across: Tensor  # [W, W] float32
    box: Tensor  # [C, 2] int64, how many frequencies down and across
    size: int  # of all boxes together, in numbers
    place: Tensor  # [M] int32, where in the boxes each coordinate is


class Cosine:
    """The orthonormal DCT-II along every axis of a row, the channels included. Of three channels it
    makes grey, red against blue, and green against both.

    Args:
        shape: of a row, [H, W], [C, H, W] or [H, W, C]. The axis with at most 4 entries has the
            channels; where there is none, as in [64, 32, 32], the first axis has them.
        order: [M] int64, which coordinates of the flattened transform are kept, in which order.

    The channels are rotated first, because each rotated channel then needs only the frequencies up
    to the largest that is kept, and these are few for the colours.
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
        # The first rotated channel (grey) needs most frequencies, so it is computed by itself.
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
        self._defects = [defect(cosines(n)) for n in self.axes]
        self._typed: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}

    @classmethod
    def fit(cls, sample: Tensor, shape: Sequence[int], size: int) -> Cosine:
        """The `size` coordinates with the largest mean square over a centred sample [m, D]."""
        everything = cls(shape, torch.arange(sample.shape[1], device=sample.device))
        energy = everything.coordinates(sample).square_().sum(dim=0)
        order = torch.sort(energy, descending=True, stable=True).indices[:size]
        return cls(shape, order.contiguous())

    def coordinates(self, value: Tensor) -> Tensor:
        """The coordinates [m, M] of centred rows [m, D] float64 or float32, in their type."""
        parts = self._typed.get(value.dtype)
        if parts is None:
            with torch.inference_mode(False):
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
        """Whether rows are [H, W, C]."""
        return len(self.shape) == 3 and self.axes[0] != self.shape[0]

    def boxes(self, side: int) -> Boxes:
        """The transform for a kernel that pads the frequencies down to multiples of `side`."""
        channel, row, column = torch.unravel_index(self.order, self.axes)
        box = torch.zeros(self.axes[0], 2, dtype=torch.int64, device="cpu")
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
        return Boxes(turn, down_all, across_all, box, count, place.to(torch.int32))

    def error(self, dtype: torch.dtype) -> float:
        """e such that the coordinates of v, computed in this type, are within e |v| of exact ones.

        Along an axis of n entries a coordinate is a sum of n products with entries of a matrix C
        that were rounded once, so its error is at most gamma(n + 1) |C| |v|. The 2-norm of |C| is
        at most its Frobenius norm, sqrt(n).
        """
        total = 1.0
        for n, defect in zip(self.axes, self._defects, strict=True):
            if n > 1:
                total *= 1 + defect + 1.001 * gamma(n + 1, dtype) * math.sqrt(n)
        return total - 1

    def state(self) -> dict[str, Tensor]:
        """What :func:`from_state` needs besides the rows' shape."""
        return {"order": self.order}

    def to(self, device: torch.device) -> Cosine:
        """The same basis on another device."""
        return Cosine(self.shape, self.order.to(device))


class Principal:
    """Coordinates along the rows of a matrix [M, D] float64, orthonormal up to rounding."""

    name = "pca"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dim = matrix.shape
        self._defect = defect(matrix)

    @classmethod
    def fit(cls, sample: Tensor, shape: Sequence[int], size: int) -> Principal:
        """The `size` leading principal directions of a centred sample [m, D] float64.

        Up to `FULL_EIGEN` features these are eigenvectors of the covariance. Beyond, subspace
        iteration from a fixed start finds directions that are close to the principal ones; a bound
        needs no more than that they are orthonormal.
        """
        dim = sample.shape[1]
        if dim <= FULL_EIGEN:
            vectors = torch.linalg.eigh(sample.T @ sample).eigenvectors
            return cls(vectors.flip(1)[:, :size].T.contiguous())
        generator = torch.Generator().manual_seed(0)
        draw: dict[str, Any] = {
            "generator": generator,
            "dtype": torch.float32,
            "device": generator.device,
        }
        start = torch.randn(dim, min(dim, size + 32), **draw)
        # float32 is enough for these products, since the directions only have to be good; they are
        # made orthonormal in float64 at the end.
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
        """The coordinates [m, M] float64 of centred rows [m, D]."""
        return value.to(torch.float64) @ self.matrix.T

    def error(self, dtype: torch.dtype) -> float:
        """As :meth:`Cosine.error`. The type is ignored: coordinates are always computed in float64,
        because a float32 sum over all features would lose too much."""
        rounding = gamma(self.dim + 1, torch.float64) * math.sqrt(self.size)
        return self._defect + 1.001 * rounding

    def state(self) -> dict[str, Tensor]:
        """What :func:`from_state` needs besides the rows' shape."""
        return {"matrix": self.matrix}

    def to(self, device: torch.device) -> Principal:
        """The same basis on another device."""
        return Principal(self.matrix.to(device))


def from_state(name: str, state: Mapping[str, Tensor], shape: Sequence[int]) -> Cosine | Principal:
    """The basis of rows of this shape from what its `state()` gave; ValueError if that is
    damaged."""
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
    # Matrices are made on the CPU, whatever torch.device() context this is called in.
    place = torch.arange(n, device="cpu")
    frequency = place[:, None]
    # The angle is a whole multiple of pi / 2n, and is reduced to one turn while it is an integer:
    # the cosine of a large float angle would be less exact.
    turn = ((2 * place + 1) * frequency) % (4 * n)
    matrix = torch.cos(turn.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix


def is_image(shape: Sequence[int]) -> bool:
    """Whether rows of this shape are images: [H, W], [C, H, W] or [H, W, C] with at least 8 x 8
    pixels and 1 to 4 channels.

    Example:
        >>> from memokern.index.basis import is_image
        >>> is_image((3, 32, 32)), is_image((32, 32, 3)), is_image((100,)), is_image((64, 4, 4))
        (True, True, False, False)
    """
    if len(shape) not in (2, 3):
        return False
    channels, height, width = _axes(tuple(shape))
    return channels <= 4 and min(height, width) >= 8


def image_shape(dim: int) -> tuple[int, ...] | None:
    """The shape that flat rows of so many features have if they are square images in colour of at
    least 24 x 24 pixels, or of MNIST's size; None for others, which are rarely images.

    Example:
        >>> from memokern.index.basis import image_shape
        >>> image_shape(3072), image_shape(784), image_shape(1024)
        ((3, 32, 32), (28, 28), None)
    """
    if dim == 784:
        return (28, 28)
    side = math.isqrt(dim // 3)
    return (3, side, side) if side >= 24 and 3 * side * side == dim else None


def _axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a row's shape."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if shape[0] > 4 and shape[2] <= 4:
        return shape[2], shape[0], shape[1]
    return shape[0], shape[1], shape[2]
