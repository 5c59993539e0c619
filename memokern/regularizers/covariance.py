"""Tikhonov with the precision of the data: a penalty that grows where the data vary little."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memokern.data.parted import PartedSet
from memokern.data.storage import chunks
from memokern.data.training_set import TrainingSet
from memokern.regularizers.base import (
    Data,
    Level,
    Query,
    Regularizer,
    check_level,
    level_at,
    show,
    shrink,
)
from memokern.results import Posterior
from memokern.util import checks

# fit() iterates on this many directions beyond the rank, until |Sigma v - lambda v| / lambda is
# below the tolerance for each direction that it returns.
OVERSAMPLING, TOLERANCE = 8, 1e-2


class CovarianceTikhonov(Regularizer):
    r"""score_k = (alpha mean - x)_k / (sigma^2 + c / lambda_k) in the data covariance's eigenbasis.

    It is the minimiser with the penalty (c / sigma^2) s^T Sigma^{-1} s, which damps most the
    directions in which the data vary least. Directions outside the basis have lambda = `rest`. The
    field has no potential in general.

    Args:
        c: >= 0, in units of sigma^2 times those of the variances; a number or a function of sigma.
        eigenvalues: [K] > 0. eigenvectors: [K, D], orthonormal rows.
        rest: > 0, the variance of every direction outside; by default the smallest eigenvalue.

    Raises: TypeError, ValueError for wrong types or shapes, eigenvalues that are not positive,
    eigenvectors that are not orthonormal.

    Cost: 4 B K D operations beyond the sweep.

    Source: arXiv 2501.15785, theorem 5.1.

    Example:
        >>> import torch
        >>> from memokern.regularizers import CovarianceTikhonov, evaluate
        >>> reg = CovarianceTikhonov(1.0, torch.tensor([1.0, 0.5]), torch.eye(2))
        >>> x, rows = torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2)
        >>> evaluate(x, rows, 1.0, regularizer=reg).score.tolist()
        [[-1.0, -1.0]]
    """

    def __init__(
        self, c: Level, eigenvalues: Tensor, eigenvectors: Tensor, rest: float | None = None
    ) -> None:
        self.c = check_level("c", c, 0.0)
        for name, value in (("eigenvalues", eigenvalues), ("eigenvectors", eigenvectors)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {name} as a tensor, got {type(value).__name__}")
        if eigenvectors.dim() != 2 or eigenvalues.shape != eigenvectors.shape[:1]:
            raise ValueError(
                f"expected eigenvalues [K] and eigenvectors [K, D], got"
                f" {tuple(eigenvalues.shape)} and {tuple(eigenvectors.shape)}"
            )
        if not len(eigenvalues):
            raise ValueError("expected at least one direction, got K = 0; Tikhonov(c) needs none")
        values, vectors = eigenvalues.to(torch.float64), eigenvectors.to(torch.float64)
        if not bool((values > 0).all()) or not bool(torch.isfinite(values).all()):
            raise ValueError(f"expected finite eigenvalues > 0, got {values.min().item()}")
        gap = vectors @ vectors.T - torch.eye(
            len(vectors), dtype=vectors.dtype, device=vectors.device
        )
        if not bool(gap.abs().max() <= 1e-4):
            raise ValueError(
                f"expected orthonormal eigenvectors, got rows off by {gap.abs().max().item():.1e}"
            )
        self.eigenvalues, self.eigenvectors = values, vectors
        smallest = float(values.min())
        self.rest = smallest if rest is None else checks.number("rest", rest, 0.0, strict=True)

    @classmethod
    def fit(cls, c: Level, data: Data, rank: int = 64) -> CovarianceTikhonov:
        r"""The regulariser with the leading `rank` directions of the data's covariance.

        All rows count alike. Directions outside get the mean of the variance that is left.

        Args: c: as above. data: N >= 2 rows. rank: 1 <= rank <= min(N - 1, D).

        Raises: TypeError for a rank that is no int; ValueError for one that is out of range, or
        larger than what the data span.

        Numerics: block Krylov iteration in float64, from seeded noise, until every direction has
        \|Sigma v - lambda v\| <= 0.01 lambda. Then each lambda is within 1 % of an eigenvalue, as a
        rule far nearer, and never above the one that it stands for.

        Cost: a pass over the rows takes 4 N D (rank + 8) operations, in chunks of 32 MiB, and keeps
        16 D (rank + 8) bytes. Photographs take about five passes (50,000 of 3072 bytes: 6 to 10 s
        on 2 cores), data without leading directions up to about twenty.

        Example:
            >>> from memokern import TrainingSet
            >>> from memokern.regularizers import CovarianceTikhonov
            >>> CovarianceTikhonov.fit(0.1, TrainingSet.digits(), rank=8)
            CovarianceTikhonov(c=0.1, rank=8)
        """
        rows = data if isinstance(data, TrainingSet) else TrainingSet(data)
        if isinstance(rows, PartedSet):
            rows.refuse("a fit of eigenvectors", "fit on a TrainingSet of some of the rows")
        rank = checks.integer("rank", rank, 1, min(rows.n - 1, rows.dim), "; N - 1 and D limit it")
        values, vectors, total = _leading_directions(rows, rank)
        outside = rows.dim - rank
        rest = (total - float(values.sum())) / outside if outside else 0.0
        # Where the data lie inside the basis no variance is left, and the smallest eigenvalue is
        # taken.
        floor = float(values[-1])
        return cls(c, values, vectors, rest if rest > 1e-6 * floor else floor)

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        flat = residual.flatten(query.sigma.dim())
        if flat.shape[-1] != self.eigenvectors.shape[1]:
            raise ValueError(
                f"the eigenvectors have {self.eigenvectors.shape[1]} numbers each and the rows"
                f" {flat.shape[-1]}; fit them on this data set"
            )
        values = self.eigenvalues.to(flat.device)
        vectors = self.eigenvectors.to(flat.device, flat.dtype)
        s2, c = query.sigma.square()[..., None], level_at("c", self.c, query.sigma, 0.0)[..., None]
        inside, outside = shrink(s2, c / values), shrink(s2, c / self.rest)
        along = flat @ vectors.T
        out = outside.to(flat.dtype) * flat + ((inside - outside).to(flat.dtype) * along) @ vectors
        return out.reshape(residual.shape)

    def __repr__(self) -> str:
        return f"CovarianceTikhonov(c={show(self.c)}, rank={len(self.eigenvalues)})"


def _leading_directions(rows: TrainingSet, rank: int) -> tuple[Tensor, Tensor, float]:
    """The leading eigenvalues [rank] and eigenvectors [rank, D] of the covariance, and its
    trace."""

    def parts() -> Iterator[Tensor]:
        return (rows.dequantize(chunk).to(torch.float64) for chunk in chunks(rows.rows))

    center = torch.stack([part.sum(0) for part in parts()]).sum(0) / rows.n
    trace = sum(float((part - center).square().sum()) for part in parts()) / (rows.n - 1)

    def covariance(vectors: Tensor) -> Tensor:
        image = torch.zeros_like(vectors)
        for part in parts():
            offset = part - center  # not in place: float64 rows were not copied
            image += offset.T @ (offset @ vectors)
        return image / (rows.n - 1)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(
        rows.dim,
        min(rows.dim, rank + OVERSAMPLING),
        dtype=torch.float64,
        generator=generator,
        device="cpu",
    )
    basis, _ = torch.linalg.qr(start.to(rows.device))
    image = covariance(basis)
    while True:
        # The Rayleigh-Ritz method in the whole basis, whose image under the covariance is known.
        ritz = basis.T @ image
        values, turn = torch.linalg.eigh((ritz + ritz.T) / 2)
        values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
        vectors = basis @ turn
        gap = (image @ turn - vectors * values).norm(dim=0)
        converged = bool((gap <= TOLERANCE * values).all())
        spanned = bool(values[-1] > 1e-12 * values[0])
        # The first basis is noise alone, in which small eigenvalues appear too small to judge.
        again = basis.shape[1] > start.shape[1]
        if converged or (again and not spanned) or basis.shape[1] == rows.dim:
            if not spanned:
                raise ValueError(f"the data span fewer than rank = {rank} directions; lower it")
            return values, vectors.T, trace
        # `fresh` is what the last image adds to the basis; QR makes it orthonormal even where the
        # image adds nothing.
        width = min(basis.shape[1] + start.shape[1], rows.dim)
        whole, _ = torch.linalg.qr(torch.cat([basis, image[:, -start.shape[1] :]], 1)[:, :width])
        fresh = whole[:, basis.shape[1] :]
        basis, image = torch.cat([basis, fresh], 1), torch.cat([image, covariance(fresh)], 1)
