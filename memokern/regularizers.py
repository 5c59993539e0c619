r"""Regularised scores: small classes that change the logits before the sweep, or gate its result.

The residual R = alpha mean - x is what is gated: with R' the gated one, score = R' / sigma^2 and
x0 = mean + (R' - R) / alpha, both as the unregularised ones when R' = R. Composed regularisers
change the logits in their order, then gate in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memokern import checks, functional
from memokern.data import CHUNK_ELEMENTS, TrainingSet
from memokern.functional import PerQuery, Posterior, wide

# CovarianceTikhonov.fit: directions beyond the rank, and the largest |Sigma v - lambda v| / lambda.
OVERSAMPLING, TOLERANCE = 8, 1e-2

Data = TrainingSet | Tensor
# A number, or a function of the noise level: [*batch] float64 -> [*batch] float64.
Level = float | int | Callable[[Tensor], Tensor]


def _level(name: str, value: Level, low: float, *, strict: bool = False) -> Level:
    """Checks a number; a function of sigma is checked where it is used."""
    if callable(value):
        return value
    return checks.number(name, value, low, strict=strict, hint="; or a function of sigma")


def _shown(value: object) -> str:
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at(name: str, level: Level, sigma: Tensor, low: float, *, strict: bool = False) -> Tensor:
    """The level at these noise levels [*batch] float64; what a function returned is checked."""
    value = level(sigma) if callable(level) else level
    out = functional.per_query(f"{name}(sigma)", value, sigma.shape, sigma.device)
    if callable(level):
        ok = torch.isfinite(out) & (out > low if strict else out >= low)
        what = f"finite and {'>' if strict else '>='} {low:g}"
        functional.require(f"{name}(sigma)", value, out, ok, what)
    return out


def _shrink(s2: Tensor, c: Tensor) -> Tensor:
    """s2 / (s2 + c), and 1 where c = 0, also at s2 = 0."""
    return torch.where(c == 0, 1.0, s2 / torch.where(c == 0, 1.0, s2 + c))


@dataclass(frozen=True)
class Query:
    r"""What the sweep is asked: x [\*batch, \*shape]; sigma, alpha, temperature [\*batch] float64;
    bias [N] or None; kernel "gaussian" or "log"."""

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    kernel: str = "gaussian"


class Regularizer:
    """The protocol: override what the variant changes. Combine two with ``a & b``.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Regularizer, evaluate
        >>> class Half(Regularizer):  # a score of half the length
        ...     def gate(self, residual, query, posterior):
        ...         return 0.5 * residual
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Half()).score.tolist()
        [[-1.0]]
    """

    def prepare(self, query: Query, data: Data) -> Query:
        """Before the sweep: the query it runs with."""
        return query

    def spread(self, query: Query) -> Query:
        """Before the sweep: one query as M, along a new first axis of every tensor per query."""
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        """After the sweep: the gated residual. `query` is the one asked, before `prepare`."""
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        """After the gates: undoes `spread`."""
        return residual

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor | None:
        r"""phi [\*batch] with regularised score = grad_x phi; None where there is none."""
        return None

    def __and__(self, other: Regularizer) -> Compose:
        return Compose(self, other)

    def __repr__(self) -> str:
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        shown = ", ".join(f"{k}={_shown(v)}" for k, v in public.items())
        return f"{type(self).__name__}({shown})"


class Compose(Regularizer):
    """Several regularisers: their changes of the logits in order, then their gates in order.

    Example:
        >>> from memokern.regularizers import Temperature, Tikhonov
        >>> Temperature(0.5) & Tikhonov(0.01)
        Compose(Temperature(sigma_c=0.5), Tikhonov(c=0.01))
    """

    def __init__(self, *parts: Regularizer) -> None:
        self._parts: list[Regularizer] = []
        for part in parts:
            if not isinstance(part, Regularizer):
                raise TypeError(f"expected regularizers, got {type(part).__name__}")
            self._parts.extend(part._parts if isinstance(part, Compose) else [part])
        for once in (GaussianSmoothing, SmoothedBank):
            if sum(isinstance(part, once) for part in self._parts) > 1:
                raise ValueError(f"compose one {once.__name__} only: use h = sqrt(h1^2 + h2^2)")

    def prepare(self, query: Query, data: Data) -> Query:
        for part in self._parts:
            query = part.prepare(query, data)
        return query

    def spread(self, query: Query) -> Query:
        for part in self._parts:
            query = part.spread(query)
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        for part in self._parts:
            residual = part.gate(residual, query, posterior)
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        for part in self._parts:
            residual = part.gather(residual)
        return residual

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self._parts))})"


class Tikhonov(Regularizer):
    r"""score = (alpha mean - x) / (sigma^2 + c): the weights keep sigma^2.

    The minimiser of E\|s - s_target\|^2 + (c / sigma^2) \|s\|^2 (arXiv 2501.15785, eq. 5.7).
    Potential: sigma^2 / (sigma^2 + c) log Z.

    Args:
        c: >= 0, in units of sigma^2; a number or a function of sigma [\*batch].

    Example:
        >>> import torch
        >>> from memokern.regularizers import Tikhonov, evaluate
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Tikhonov(3.0)).score.tolist()
        [[-0.5]]
    """

    def __init__(self, c: Level) -> None:
        self.c = _level("c", c, 0.0)

    def _factor(self, sigma: Tensor) -> Tensor:
        return _shrink(sigma.square(), _at("c", self.c, sigma, 0.0))

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        return wide(self._factor(query.sigma), residual) * residual

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return self._factor(query.sigma) * posterior.log_z


class CovarianceTikhonov(Regularizer):
    r"""score_k = (alpha mean - x)_k / (sigma^2 + c / lambda_k) in the data covariance's eigenbasis.

    The minimiser with the penalty (c / sigma^2) s^T Sigma^{-1} s: directions in which the data vary
    little are damped most (arXiv 2501.15785, theorem 5.1). Directions outside the basis count as
    lambda = `rest`. Its field has no potential in general.

    Args:
        c: >= 0, in units of sigma^2 times those of the variances; number or function of sigma.
        eigenvalues: [K] > 0. eigenvectors: [K, D], orthonormal rows.
        rest: > 0, the variance of every direction outside; default the smallest eigenvalue.

    Cost: 4 B K D beyond the sweep.

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
        self.c = _level("c", c, 0.0)
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
        gap = vectors @ vectors.T - torch.eye(len(vectors)).to(vectors)
        if not bool(gap.abs().max() <= 1e-4):
            raise ValueError(
                f"expected orthonormal eigenvectors, got rows off by {gap.abs().max().item():.1e}"
            )
        self.eigenvalues, self.eigenvectors = values, vectors
        smallest = float(values.min())
        self.rest = smallest if rest is None else checks.number("rest", rest, 0.0, strict=True)

    @classmethod
    def fit(cls, c: Level, data: Data, rank: int = 64) -> CovarianceTikhonov:
        r"""The leading `rank` directions of the data's covariance; directions outside get the mean
        of the variance left over. All rows count alike.

        Block Krylov iteration in float64 from seeded noise, until every direction has
        \|Sigma v - lambda v\| <= 0.01 lambda: each lambda is then within 1 % of an eigenvalue (as
        a rule far nearer), and never above the one that it stands for.

        Args: c: as above. data: N >= 2 rows. rank: 1 <= rank <= min(N - 1, D).

        Raises: TypeError, ValueError: a rank that is no int or out of range, or more than the data
            span.

        Cost: a pass over the rows is 4 N D (rank + 8) operations, in chunks of 32 MiB, and keeps
        16 D (rank + 8) bytes. Photographs take about five passes (50,000 of 3072 bytes: 6 to 10 s
        on 2 cores), data without leading directions up to about twenty.

        Example:
            >>> from memokern import TrainingSet
            >>> from memokern.regularizers import CovarianceTikhonov
            >>> CovarianceTikhonov.fit(0.1, TrainingSet.digits(), rank=8)
            CovarianceTikhonov(c=0.1, rank=8)
        """
        rows = data if isinstance(data, TrainingSet) else TrainingSet(data)
        rank = checks.integer("rank", rank, 1, min(rows.n - 1, rows.dim), "; N - 1 and D limit it")
        values, vectors, total = _leading_directions(rows, rank)
        if not bool(values[-1] > 1e-12 * values[0]):
            raise ValueError(f"the data span fewer than rank = {rank} directions; lower it")
        outside = rows.dim - rank
        rest = (total - float(values.sum())) / outside if outside else 0.0
        # Data inside the basis have no variance left: the smallest one stands for it.
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
        s2, c = query.sigma.square()[..., None], _at("c", self.c, query.sigma, 0.0)[..., None]
        inside, outside = _shrink(s2, c / values), _shrink(s2, c / self.rest)
        along = flat @ vectors.T
        out = outside.to(flat.dtype) * flat + ((inside - outside).to(flat.dtype) * along) @ vectors
        return out.reshape(residual.shape)

    def __repr__(self) -> str:
        return f"CovarianceTikhonov(c={_shown(self.c)}, rank={len(self.eigenvalues)})"


def _leading_directions(rows: TrainingSet, rank: int) -> tuple[Tensor, Tensor, float]:
    """The leading eigenvalues [rank], eigenvectors [rank, D] and the trace of the covariance."""
    chunk = max(1, CHUNK_ELEMENTS // rows.dim)

    def parts() -> Iterator[Tensor]:
        for start in range(0, rows.n, chunk):
            yield rows.dequantize(rows.rows[start : start + chunk]).to(torch.float64)

    center = torch.stack([part.sum(0) for part in parts()]).sum(0) / rows.n
    trace = sum(float((part - center).square().sum()) for part in parts()) / (rows.n - 1)

    def covariance(vectors: Tensor) -> Tensor:
        image = torch.zeros_like(vectors)
        for part in parts():
            offset = part - center  # not in place: float64 rows are not copied
            image += offset.T @ (offset @ vectors)
        return image / (rows.n - 1)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(
        rows.dim, min(rows.dim, rank + OVERSAMPLING), dtype=torch.float64, generator=generator
    )
    basis, _ = torch.linalg.qr(start.to(rows.device))
    image = covariance(basis)
    while True:
        # Rayleigh-Ritz in the whole basis, whose image is known.
        ritz = basis.T @ image
        values, turn = torch.linalg.eigh((ritz + ritz.T) / 2)
        values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
        vectors = basis @ turn
        gap = (image @ turn - vectors * values).norm(dim=0)
        converged = bool((gap <= TOLERANCE * values).all())
        spanned = bool(values[-1] > 1e-12 * values[0])
        if converged or not spanned or basis.shape[1] == rows.dim:
            return values, vectors.T, trace
        # What the last image adds to the basis, orthonormal even where that is nothing.
        width = min(basis.shape[1] + start.shape[1], rows.dim)
        whole, _ = torch.linalg.qr(torch.cat([basis, image[:, -start.shape[1] :]], 1)[:, :width])
        fresh = whole[:, basis.shape[1] :]
        basis, image = torch.cat([basis, fresh], 1), torch.cat([image, covariance(fresh)], 1)


class EmpiricalBayes(Regularizer):
    r"""Weights exp(l_n) / max(Z, tau): score = (alpha mean - x) / sigma^2 min(1, Z / tau).

    The asymptotically consistent regulariser (arXiv 2501.15785, section 5.2; Wibisono et al.,
    arXiv 2402.07747): far from the data, where the density is not known, the score fades.
    Potential: log Z where Z > tau, else Z / tau + log tau - 1.

    Args:
        log_tau: log tau, since Z underflows in high dimension (Z is about N exp(-D/2) at a typical
            x); a number or a function of sigma.
        normalized: the floor is on the density p(x) instead of on Z.

    At sigma = 0 the score fades everywhere but on the rows: x0 = x / alpha.

    Example:
        >>> import torch
        >>> from memokern.regularizers import EmpiricalBayes, evaluate
        >>> x, rows = torch.tensor([[2.0]]), torch.tensor([[0.0]])  # log Z = -2
        >>> s = evaluate(x, rows, 1.0, regularizer=EmpiricalBayes(log_tau=-1.0)).score
        >>> round(s.item(), 4)  # -2 exp(-1)
        -0.7358
    """

    def __init__(self, log_tau: Level, normalized: bool = False) -> None:
        self.log_tau = _level("log_tau", log_tau, -math.inf, strict=True)
        self.normalized = bool(normalized)

    def _excess(self, posterior: Posterior, query: Query) -> Tensor:
        """log(Z / tau), with p(x) for Z if normalized."""
        log_p = posterior.log_z
        if self.normalized:
            # At sigma = 0 the limit of the density: infinite on a row, 0 elsewhere.
            spike = torch.where(torch.isneginf(log_p), log_p, torch.inf)
            log_p = torch.where(posterior.sigma == 0, spike, posterior.log_density)
        return log_p - _at("log_tau", self.log_tau, query.sigma, -math.inf)

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        return wide(self._excess(posterior, query).clamp(max=0.0).exp(), residual) * residual

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        excess = self._excess(posterior, query)
        log_tau = _at("log_tau", self.log_tau, query.sigma, -math.inf)
        return log_tau + torch.where(excess > 0, excess, torch.exp(excess.clamp(max=0.0)) - 1)


class Temperature(Regularizer):
    r"""w = softmax(l / T), T(sigma) = max(sigma_c / sigma, 1) (Zhou et al., arXiv 2601.19285).

    Several rows share the weight at small noise. Potential: T logsumexp(l / T).

    Args:
        sigma_c: > 0, the noise level below which the weights are flattened; or a function that
            gives T itself from sigma.

    At sigma = 0 T would be infinite; it is held at 1e300 there, where the nearest row still wins.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Temperature, evaluate
        >>> x, rows = torch.tensor([[0.5]]), torch.tensor([[-1.0], [1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Temperature(1e6)).x0.abs().item() < 1e-5
        True
    """

    def __init__(self, sigma_c: Level) -> None:
        self.sigma_c = _level("sigma_c", sigma_c, 0.0, strict=True)

    def prepare(self, query: Query, data: Data) -> Query:
        if callable(self.sigma_c):
            t = _at("temperature", self.sigma_c, query.sigma, 0.0, strict=True)
        else:
            t = (self.sigma_c / query.sigma.clamp(min=1e-300)).clamp(min=1.0, max=1e300)
        return replace(query, temperature=query.temperature * t)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z


class GaussianSmoothing(Regularizer):
    r"""The score averaged over M shifted queries x + h eps_m (Scarvelis et al., arXiv 2310.12395;
    Gabriel et al., arXiv 2505.22841), the same eps_m for every query.

    A shift by h eps_m is the row bias h alpha <eps_m, y_n> / sigma^2, up to a constant. The shifts
    come in pairs eps, -eps, so that they average to zero. Potential: mean_m log Z(x + h eps_m).

    Args:
        h: > 0, in units of x; a number or a function of sigma. samples: M, even.
        seed: of the eps_m, which are the same at every call.

    Cost: M times the sweep. torch.compile breaks the graph where the eps_m are drawn.

    Example:
        >>> import torch
        >>> from memokern.regularizers import GaussianSmoothing, evaluate
        >>> x, rows = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
        >>> evaluate(x, rows, 0.1, regularizer=GaussianSmoothing(0.5, 8)).x0.abs().item() < 1e-6
        True
    """

    def __init__(self, h: Level, samples: int = 16, seed: int = 0) -> None:
        self.h = _level("h", h, 0.0, strict=True)
        self.samples = checks.integer("samples", samples, 2)
        if self.samples % 2:
            raise ValueError(f"expected an even number of samples (pairs), got {samples}")
        self.seed = checks.integer("seed", seed, -(2**63), 2**64 - 1)

    def shifts(self, query: Query) -> Tensor:
        r"""eps_m [M, \*shape], antithetic."""
        shape = query.x.shape[query.sigma.dim() :]
        generator = torch.Generator().manual_seed(self.seed)
        half = torch.randn(self.samples // 2, *shape, generator=generator, dtype=torch.float64)
        return torch.cat([half, -half]).to(query.x)

    def spread(self, query: Query) -> Query:
        eps = self.shifts(query)
        batch = query.sigma.dim()
        eps = eps.reshape(eps.shape[:1] + (1,) * batch + eps.shape[1:])
        x = query.x + wide(_at("h", self.h, query.sigma, 0.0), query.x) * eps
        size = (self.samples, *query.sigma.shape)
        return replace(
            query,
            x=x,
            sigma=query.sigma.expand(size),
            alpha=query.alpha.expand(size),
            temperature=query.temperature.expand(size),
        )

    def gather(self, residual: Tensor) -> Tensor:
        return residual.mean(0)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z.mean(0)


class SmoothedBank(Regularizer):
    r"""Rows replaced by N(y_n, h^2 I): sigma^2 -> sigma^2 + alpha^2 h^2 in weights and score.

    The exact score of the kernel density estimate of bandwidth h, diffused to sigma. Potential:
    log Z at the wider sigma.

    Args:
        h: >= 0, in the rows' units; a number or a function of sigma.

    Example:
        >>> import torch
        >>> from memokern.regularizers import SmoothedBank, evaluate
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> round(evaluate(x, rows, 1.0, regularizer=SmoothedBank(1.0)).score.item(), 6)
        -1.0
    """

    def __init__(self, h: Level) -> None:
        self.h = _level("h", h, 0.0)

    def _spread2(self, query: Query) -> Tensor:
        return (query.alpha * _at("h", self.h, query.sigma, 0.0)).square()

    def prepare(self, query: Query, data: Data) -> Query:
        h2 = self._spread2(query)
        wider = (query.sigma.square() + h2).sqrt()
        return replace(query, sigma=torch.where(h2 == 0, query.sigma, wider))

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        factor = _shrink(query.sigma.square(), self._spread2(query))
        return wide(factor, residual) * residual

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor:
        return posterior.log_z


class NoiseUnconditioned(Regularizer):
    r"""Weights that don't know sigma: l_n = -(D / 2) log(\|x - alpha y_n\|^2 / D),
    w = softmax(l / T) (Zhou et al., arXiv 2601.19285): the distance itself tells the noise level.

    No potential is offered: its score divides by sigma^2, which its weights ignore.

    Args:
        temperature: T > 0.

    Example:
        >>> import torch
        >>> from memokern.regularizers import NoiseUnconditioned, evaluate
        >>> x, rows = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
        >>> evaluate(x, rows, 1.0, regularizer=NoiseUnconditioned()).x0.item()  # weights 1/1, 1/3
        1.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = checks.number("temperature", temperature, 0.0, strict=True)

    def prepare(self, query: Query, data: Data) -> Query:
        return replace(query, kernel="log", temperature=query.temperature * self.temperature)


@dataclass(frozen=True)
class Prediction:
    r"""A regularised evaluation: residual R' [\*batch, \*shape] and what follows from it.

    Attributes:
        x, sigma, alpha: as asked. x0: mean + (R' - R) / alpha. residual: R' = sigma^2 score.
        posterior: of the sweep behind it (with the regulariser's sigma and temperature).
        query, regularizer: what `log_potential` is computed from.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    x0: Tensor
    residual: Tensor
    posterior: Posterior
    query: Query = field(repr=False)
    regularizer: Regularizer

    @property
    def log_potential(self) -> Tensor | None:
        r"""phi [\*batch] with score = grad_x phi, None where there is none. Computed when asked."""
        return self.regularizer.log_potential(self.posterior, self.query)

    @property
    def score(self) -> Tensor:
        """R' / sigma^2."""
        sigma = wide(self.sigma, self.x)
        return self.residual / sigma / sigma

    @property
    def eps(self) -> Tensor:
        """-sigma score."""
        return -self.residual / wide(self.sigma, self.x)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return wide(self.alpha, self.x) * self.eps - wide(self.sigma, self.x) * self.x0

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """(sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x0, of the probability flow."""
        return functional.flow_velocity(self.x, self.x0, self.sigma, self.alpha, d_alpha, d_sigma)


def evaluate(
    x: Tensor,
    data: Data,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    regularizer: Regularizer | None = None,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Prediction:
    r"""The regularised score at x, and x0, eps, v and velocity from it.

    Args: as :func:`memokern.posterior`; regularizer: None for the score that memorises.

    With alpha = 0 and a regulariser x0 is the mean, ungated: x says nothing about the data.

    Example:
        >>> import torch
        >>> from memokern.regularizers import evaluate
        >>> evaluate(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 2.0).score.tolist()
        [[-0.5]]
    """
    reg = Regularizer() if regularizer is None else regularizer
    if not isinstance(reg, Regularizer):
        raise TypeError(
            f"expected regularizer as a memokern.regularizers.Regularizer, got"
            f" {type(regularizer).__name__}; parse('tikhonov:c=0.01') makes one from text"
        )
    asked = _ask(x, data, sigma, alpha, bias)
    spread = reg.spread(asked)
    query = reg.prepare(spread, data)
    posterior = functional.posterior(
        query.x, data, query.sigma, query.alpha, query.temperature,
        bias=query.bias, kernel=query.kernel, method=method,
    )  # fmt: skip
    plain = posterior.residual
    gated = reg.gate(plain, spread, posterior)
    residual = reg.gather(gated)
    back = posterior.mean
    if gated is not plain:
        # That is x0 = (x + R') / alpha, written so that nothing cancels.
        a = wide(spread.alpha, spread.x)
        back = back + torch.where(a == 0, 0.0, (gated - plain) / torch.where(a == 0, 1.0, a))
    x0 = reg.gather(back)
    return Prediction(x, asked.sigma, asked.alpha, x0, residual, posterior, spread, reg)


def _ask(x: Tensor, data: Data, sigma: PerQuery, alpha: PerQuery, bias: Tensor | None) -> Query:
    batch = functional.batch_shape(x, data)
    s = functional.per_query("sigma", sigma, batch, x.device)
    a = functional.per_query("alpha", alpha, batch, x.device)
    return Query(x, s, a, torch.ones_like(s), bias)


# --- from text --------------------------------------------------------------------------------


def _flag(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return known[text.lower()]


# What parse() knows: name -> (class, the type of each parameter; the first is required).
_KNOWN: dict[str, tuple[Callable[..., Regularizer], dict[str, Callable[[str], object]]]] = {
    "tikhonov": (Tikhonov, {"c": float}),
    "empirical-bayes": (EmpiricalBayes, {"log_tau": float, "normalized": _flag}),
    "temperature": (Temperature, {"sigma_c": float}),
    "smoothing": (GaussianSmoothing, {"h": float, "samples": int, "seed": int}),
    "bank": (SmoothedBank, {"h": float}),
    "unconditioned": (NoiseUnconditioned, {"temperature": float}),
}


def parse(text: str) -> Regularizer | None:
    """A regulariser from text: ``name:key=value,key=value``, several joined with ``+``.

    None for "none". Raises ValueError that lists what is known.

    Example:
        >>> from memokern.regularizers import parse
        >>> parse("temperature:sigma_c=0.5+tikhonov:c=1e-2")
        Compose(Temperature(sigma_c=0.5), Tikhonov(c=0.01))
        >>> parse("none") is None
        True
    """
    parts = [_parse_one(part.strip()) for part in _split(text) if part.strip() != "none"]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else Compose(*parts)


def _split(text: str) -> list[str]:
    """At each "+" that starts a name: 1e+2 stays whole."""
    parts: list[str] = []
    for piece in text.split("+"):
        if parts and not piece.strip()[:1].isalpha():
            parts[-1] += "+" + piece
        else:
            parts.append(piece)
    return parts


def _parse_one(text: str) -> Regularizer:
    name, _, arguments = text.partition(":")
    forms = ", ".join(
        f"{known}:{','.join(k + '=...' for k in keys)}" for known, (_, keys) in _KNOWN.items()
    )
    if name not in _KNOWN:
        raise ValueError(f"unknown regularizer {name!r}; expected none, {forms}")
    make, keys = _KNOWN[name]
    found: dict[str, object] = {}
    for item in filter(None, arguments.split(",")):
        key, sep, value = (p.strip() for p in item.partition("="))
        if key in found:
            raise ValueError(f"{name}: {key} is given twice")
        if not sep or key not in keys:
            raise ValueError(f"{name} knows {', '.join(k + '=...' for k in keys)}; got {item!r}")
        try:
            found[key] = keys[key](value)
        except (ValueError, KeyError):
            raise ValueError(f"{name}: {key}={value!r} is not a value that it takes") from None
    first = next(iter(keys))
    if first not in found and make is not NoiseUnconditioned:
        raise ValueError(f"{name} needs {first}=..., for example {name}:{first}=0.1")
    return make(**found)
