"""The Gaussian with the mean and the variances of a training set, whose flow has a closed form."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memokern.conditional import EVERY_ROW, Label, label_numbers
from memokern.data.training_set import TrainingSet
from memokern.index.basis import FULL_EIGEN, Cosine, Principal, cosines, is_image
from memokern.index.index import evenly_spaced_rows
from memokern.util.torch_internals import version

# Moments are taken of rows of at most this many numbers together, spread evenly over the set.
FIT_ELEMENTS = 1 << 24
CHUNK_ELEMENTS = 1 << 20
# So many cosine coordinates, those that vary most, are turned to their own principal directions.
TURNED = 256
# How many principal directions rows have that are neither few-featured nor images.
LEADING = 128


class Transform:
    """An orthonormal change of coordinates of rows [m, D].

    Of images the cosine transform, of which the coordinates that vary most are turned to their
    principal directions; of other rows the principal directions, with what lies outside of them
    appended as it is, so that `coordinates` gives [m, K] with K = D or more.
    """

    def __init__(
        self,
        dim: int,
        cosine: Cosine | None = None,
        order: Tensor | None = None,
        turn: Tensor | None = None,
    ) -> None:
        self.dim, self.cosine, self.order, self.turn = dim, cosine, order, turn
        self._back = None if order is None else torch.argsort(order)
        self._axes: list[Tensor] = []
        if cosine is not None:
            self._axes = [cosines(n) for n in cosine.axes]

    @property
    def size(self) -> int:
        """K, how many coordinates there are."""
        whole = self.turn is None or self.cosine is not None or len(self.turn) == self.dim
        return self.dim if whole or self.turn is None else self.dim + len(self.turn)

    def coordinates(self, rows: Tensor) -> Tensor:
        """The coordinates [m, K] of rows [m, D] float64 or float32, in their type."""
        value = rows
        turn = None if self.turn is None else self.turn.to(value)
        if self.cosine is None:
            if turn is None:
                return value
            along = value @ turn.T
            return along if len(turn) == self.dim else torch.cat([along, value - along @ turn], 1)
        z = self._along_axes(value, back=False)
        if self.order is not None:
            z = z[:, self.order.to(z.device)]
        if turn is None:
            return z
        return torch.cat([z[:, : len(turn)] @ turn.T, z[:, len(turn) :]], 1)

    def values(self, z: Tensor) -> Tensor:
        """The rows [m, D] with these coordinates."""
        turn = None if self.turn is None else self.turn.to(z)
        if self.cosine is None:
            if turn is None:
                return z
            along = z[:, : len(turn)] @ turn
            return along if len(turn) == self.dim else along + z[:, len(turn) :]
        if turn is not None:
            z = torch.cat([z[:, : len(turn)] @ turn, z[:, len(turn) :]], 1)
        if self._back is not None:
            z = z[:, self._back.to(z.device)]
        return self._along_axes(z, back=True)

    def _along_axes(self, value: Tensor, back: bool) -> Tensor:
        """The cosine transform along channels, height and width, or its inverse; coordinates are
        laid out as [C, H, W] whatever the rows are."""
        assert self.cosine is not None
        last = self.cosine.channels_last
        c, h, w = self.cosine.axes
        turn, down, across = (m.to(value) for m in self._axes)
        if back:
            turn, down, across = turn.T, down.T, across.T
        shaped = value.reshape(-1, c, h, w) if back or not last else value.reshape(-1, h, w, c)
        if last and not back:
            shaped = shaped.permute(0, 3, 1, 2)
        shaped = down @ (shaped @ across.T)
        if c > 1:
            shaped = (turn @ shaped.reshape(-1, c, h * w)).reshape(-1, c, h, w)
        if last and back:
            shaped = shaped.permute(0, 2, 3, 1)
        return shaped.reshape(len(value), -1)


class Gaussian:
    r"""N(mean, C) with C diagonal in an orthonormal basis, in place of the rows' law.

    Its ideal denoiser is linear, D(u, s) = mean + C (C + s^2)^{-1} (u - mean) with u = x / alpha
    and s = sigma / alpha, and its probability flow multiplies each coordinate of u - mean by
    sqrt((lambda + s'^2) / (lambda + s^2)). At high noise the posterior of any rows with these
    moments is nearly that.

    Attributes:
        mean: [D], or [S, D] where each sample has its own. variances: [K] or [S, K] float64 >= 0,
            along the coordinates of `transform`.

    Args:
        mean, variances: these. transform: by default the coordinates are the features themselves.
        of: [S] int64, where samples share a few: which of the means [C, D] and variances [C, K]
            each of them has.

    Source: the flow of a Gaussian is in arXiv 2206.00364, appendix B; its use for whole
    trajectories in Wang & Vastola, arXiv 2311.10892.

    Example:
        >>> from memokern import TrainingSet
        >>> from memokern.samplers import Gaussian
        >>> found = Gaussian.fit(TrainingSet.digits())
        >>> found.mean.shape, found.variances.shape
        (torch.Size([64]), torch.Size([64]))
    """

    def __init__(
        self,
        mean: Tensor,
        variances: Tensor,
        transform: Transform | None = None,
        of: Tensor | None = None,
    ) -> None:
        for name, value in (("mean", mean), ("variances", variances)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {name} as a tensor, got {type(value).__name__}")
        self.transform = Transform(mean.shape[-1]) if transform is None else transform
        if mean.dim() not in (1, 2) or variances.shape[-1] != self.transform.size:
            raise ValueError(
                f"expected mean [D] and variances [{self.transform.size}], got"
                f" {list(mean.shape)} and {list(variances.shape)}"
            )
        if not bool(((variances >= 0) & torch.isfinite(variances)).all()):
            raise ValueError("expected finite variances >= 0")
        self.of = of
        # Before they are those of each sample.
        self.means, self.table = mean.to(torch.float64), variances.to(torch.float64)
        self.mean = self.means if of is None else self.means[of]
        self.variances = self.table if of is None else self.table[of]

    @classmethod
    def fit(cls, data: TrainingSet | Tensor, weights: Tensor | None = None) -> Gaussian:
        r"""The mean and the variances of rows.

        The basis is that of the data's index, where there is one. Otherwise, up to 1024 features
        have all their principal directions; images have the cosine transform, whose 256
        coordinates that vary most are turned to their principal directions; other rows have 128
        leading directions, and one variance for all others. No D x D matrix is made beyond 1024
        features.

        Args:
            data: N rows. weights: [N] >= 0, how much each counts; by default by the set's
                `log_weights`.

        Cost: a pass over rows of at most 2^24 numbers together, spread evenly.
        """
        rows = data if isinstance(data, TrainingSet) else TrainingSet(data)
        if weights is None and rows.log_weights is not None:
            weights = torch.softmax(rows.log_weights, 0)
        transform = _transform(rows)
        mean, variances, turn = _moments(rows, transform, weights)
        if turn is not None:
            cosine, order = transform.cosine, transform.order
            transform = Transform(rows.dim, cosine, order, turn)
        return cls(mean, variances, transform)

    @property
    def top(self) -> float:
        """The standard deviation along the coordinate that varies most."""
        return math.sqrt(float(self.variances.max()))

    def take(self, at: Tensor) -> Gaussian:
        """The same for some of the samples."""
        if self.of is not None:
            return Gaussian(self.means, self.table, self.transform, self.of[at])
        if self.mean.dim() == 1:
            return self
        return Gaussian(self.mean[at], self.variances[at], self.transform)

    def to(self, device: torch.device) -> Gaussian:
        """The same on a device."""
        of = None if self.of is None else self.of.to(device)
        return Gaussian(self.means.to(device), self.table.to(device), self.transform, of)


class _Kept:
    """The Gaussians of training sets, kept as long as their rows stay as they are."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[TrainingSet, tuple[object, Gaussian]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, data: TrainingSet, given: object, fit: Callable[[], Gaussian]) -> Gaussian:
        """That of a set, for what is given beside its rows."""
        state = (version(data.rows), given)
        known = self._known.get(data)
        if known is None or known[0] != state:
            known = self._known[data] = (state, fit())
        return known[1]


_sets, _classes = _Kept(), _Kept()


def of_rows(data: TrainingSet) -> Gaussian:
    """The Gaussian of a training set."""
    return _sets.of(data, data.index is None, lambda: Gaussian.fit(data))


def _of_class(rows: TrainingSet, basis: Transform) -> Gaussian:
    """That of some rows in the basis of all."""
    return _classes.of(rows, basis, lambda: Gaussian(*_moments(rows, basis, None)[:2], basis))


def of_samples(data: TrainingSet, label: Label, bias: Tensor | None, count: int) -> Gaussian:
    """The Gaussian of the rows that `count` samples ask for: of all, of those with a label, or for
    labels of each sample's own, each of its class in the basis of all."""
    if bias is not None:
        total = bias if data.log_weights is None else bias + data.log_weights
        return Gaussian.fit(data, torch.softmax(total.detach().to("cpu", torch.float64), 0))
    if label is None:
        return of_rows(data)
    numbers = label_numbers(label, (count,), data.device, data.label_count)
    known, which = numbers.reshape(-1).unique(return_inverse=True)
    everywhere = of_rows(data)
    whole = data.labels is None or not bool((data.labels == EVERY_ROW).any())
    if len(known) == 1:
        one = int(known[0])
        return everywhere if one == EVERY_ROW and whole else of_rows(data.of_label(one)[1])
    basis = everywhere.transform
    found = [
        everywhere if one == EVERY_ROW and whole else _of_class(data.of_label(one)[1], basis)
        for one in known.tolist()
    ]
    means, variances = [g.mean for g in found], [g.variances for g in found]
    return Gaussian(torch.stack(means), torch.stack(variances), basis, which)


def _transform(data: TrainingSet) -> Transform:
    """The coordinates that suit the rows; cosine ones are not turned yet."""
    basis = None if data.index is None else data.index.transform
    if isinstance(basis, Cosine) or (
        basis is None and data.dim > FULL_EIGEN and is_image(data.shape)
    ):
        device = data.device
        kept = basis.order if isinstance(basis, Cosine) else torch.arange(0, device=device)
        every = Cosine(data.shape, torch.arange(data.dim, device=device))
        left = torch.ones(data.dim, dtype=torch.bool, device=device)
        left[kept] = False
        if len(kept) == 0:  # by their variances, of some rows
            some = next(_chunks(data, None))[0]
            energy = every.coordinates(some).square().sum(0)
            return Transform(data.dim, every, energy.argsort(descending=True))
        return Transform(data.dim, every, torch.cat([kept, left.nonzero()[:, 0]]))
    if isinstance(basis, Principal) and data.dim > FULL_EIGEN:
        return Transform(data.dim, turn=basis.matrix[:LEADING])
    if data.dim <= FULL_EIGEN:
        return Transform(data.dim)
    sample = next(_chunks(data, None))[0]
    fitted = Principal.fit(sample, data.shape, min(LEADING, len(sample), data.dim))
    return Transform(data.dim, turn=fitted.matrix)


def _chunks(data: TrainingSet, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows less the center [m, D], float32 or for float64 rows float64, and their weights [m]
    float64, chunk by chunk."""
    most = max(1, FIT_ELEMENTS // data.dim)
    if weights is None:
        chosen = evenly_spaced_rows(data.n, most)
        weight = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64, device="cpu")
    else:
        weight, chosen = weights.to("cpu", torch.float64).topk(min(most, data.n))
        weight = weight / weight.sum()
    step = max(1024 if data.dim > FULL_EIGEN else 1, CHUNK_ELEMENTS // data.dim)
    for at, part in zip(chosen.split(step), weight.split(step), strict=True):
        rows = data.gather(at.to(data.device)).reshape(len(at), -1)
        yield rows - data.center.to(rows.dtype), part.to(data.device)


def _moments(
    data: TrainingSet, transform: Transform, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean [D], the variances [K], and the turn to principal directions where there is none
    yet: [k, k] of the leading cosine coordinates, [D, D] of features."""
    turned = transform.turn is not None
    k = 0 if turned else min(TURNED if transform.cosine is not None else data.dim, data.dim)
    first = torch.zeros(transform.size, dtype=torch.float64, device=data.device)
    second = torch.zeros_like(first)
    block = first.new_zeros(k, k)
    for rows, weight in _chunks(data, weights):
        z = transform.coordinates(rows)
        heavy = weight[:, None].to(z.dtype) * z
        first += heavy.sum(0)
        second += (heavy * z).sum(0)
        block += heavy[:, :k].T @ z[:, :k]
    center = data.center.to(torch.float64)
    mean = center + transform.values(first[None])[0]
    variances = (second - first.square()).clamp(min=0.0)
    if turned:
        lead = transform.turn.shape[0] if transform.turn is not None else 0
        if transform.cosine is None and lead < data.dim:  # one variance for all that is outside
            rest = variances[lead:].sum() / (data.dim - lead)
            variances = torch.cat([variances[:lead], rest.expand(data.dim)])
        return mean, variances, None
    block -= first[:k, None] * first[:k]
    values, vectors = torch.linalg.eigh(block)
    variances = torch.cat([values.clamp(min=0.0), variances[k:]])
    return mean, variances, vectors.T.contiguous()
