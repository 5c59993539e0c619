"""The exact answer for a fraction of the arithmetic, with a proof attached.

Almost all weights are negligible at small sigma, and a projection of the rows to a few dozen
dimensions proves it. For a batch of queries:

1. project them as the index did the rows                                (:meth:`.Index.project`);
2. bound the logits, keep the rows that may weigh more than eps together (``bound_scan``);
3. sweep over the rows kept, by direct differences                       (``posterior_on_support``);
4. sweep densely for the queries of which too many rows were kept        (``posterior``).

What was dropped is bounded by the :class:`.Certificate`. Proofs: ``docs/pruning.md``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern import backends, env, ops, ops_support
from memokern.index import Index
from memokern.projection import Projected
from memokern.queries import Rows, undispatched
from memokern.results import Certificate

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The weight that may be dropped: what it moves the mean by, at most 2 eps times the radius of the
# data, is then below what the sweep's own rounding promises (1e-5 of the mean in float32) or, in
# float64, does (1e-13). Smaller is cheap: the rows kept are those within log(N / eps) of the best.
EPS = {torch.float32: 1e-6, torch.float64: 1e-14}
# Of the mean squared distance of two rows. CIFAR-10: sigma = 3.6; from 3 on pruning never pays.
HOPELESS = 0.4
_ULP = 2.0**-52  # twice the unit roundoff: pays for the second-order terms too


class Query(NamedTuple):
    """What the operations are asked, flat: x [B, D], the numbers [B], bias [N] or None; precision:
    of a dense sweep."""

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None
    precision: str = "auto"

    def take(self, at: Tensor) -> Query:
        """The queries at these positions."""
        columns = (self.sigma[at], self.alpha[at], self.temperature[at])
        return Query(self.x[at], *columns, self.bias, self.precision)


class Costs(NamedTuple):
    """Seconds on this machine: of a sweep, N D (row + B query); of M listed rows, M D listed; of
    any call of an operation, call."""

    row: float
    query: float
    listed: float
    call: float

    def dense(self, b: int, n: int, dim: int) -> float:
        """The dense sweep's time for b queries."""
        return n * dim * (self.row + b * self.query)


def weight_allowed(query: Query, rows: Rows, index: Index, tol: float | None) -> float:
    """eps: the weight that may be dropped for each query, so that the mean errs by tol at most."""
    wide = torch.float64 in (query.x.dtype, rows.rows.dtype)
    eps = EPS[torch.float64 if wide else torch.float32]
    if tol is None or index.y_max == 0:
        return eps
    # |mean_dropped - mean_kept| <= 2 y_max: both lie in the ball that holds the rows.
    return min(eps, tol / (2 * index.y_max))


def posterior(
    query: Query,
    rows: Rows,
    index: Index,
    *,
    eps: float,
    costs: Costs | None = None,
    certificate: bool = False,
) -> tuple[Sums, Certificate | None]:
    """The sums of the posterior, from the rows that the bounds cannot exclude.

    With costs, each query goes the way that is expected to be faster; without, all that can be
    pruned are. A query of sigma = 0 or with NaN is always swept densely.
    """
    n, dim = rows.rows.shape
    b = query.x.shape[0]
    # Four calls: to project, to scan, to sweep, and what lies between.
    small = costs is not None and costs.dense(b, n, dim) < 4 * costs.call
    if b == 0 or small or (costs is not None and _hopeless(query, index, eps)):
        return _dense(query, rows), dense_certificate(query.sigma, n) if certificate else None
    with torch.no_grad():
        cap = n if costs is None else _cap(n, costs)
        p = index.project(query.x, query.alpha)
        start, listed, threshold, level = bound_scan(query, rows, index, p, eps, cap)
        swept = _swept_densely(start.diff(), level, n, costs)
        n_swept = int(swept.sum())
    if n_swept == 0:
        sums = _on_support(query, rows, start, listed)
    elif n_swept == b:
        sums = _dense(query, rows)
    else:
        kept, rest = (~swept).nonzero()[:, 0], swept.nonzero()[:, 0]
        count = start.diff()
        listed = listed[(~swept).repeat_interleave(count)]
        some = torch.cat([start[:1], count[kept].cumsum(0)])
        near = _on_support(query.take(kept), rows, some, listed)
        far = _dense(query.take(rest), rows)
        order = torch.argsort(torch.cat([kept, rest]))
        mean, log_z, mean_logit, mean_bias, weight_sq = (
            torch.cat(pair)[order] for pair in zip(near, far, strict=True)
        )
        sums = (mean, log_z, mean_logit, mean_bias, weight_sq)
    if not certificate:
        return sums, None
    level = torch.where(swept, 0, level)
    return sums, _certificate(query, rows, index, sums, start.diff(), threshold, level)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "posterior": ops.posterior,
    "bound_scan": ops_support.bound_scan,
    "posterior_on_support": ops_support.posterior_on_support,
}


def shortest(name: str, x: Tensor, *others: Tensor | None) -> Callable[..., Any]:
    """The operation of that name: where the dispatcher, which takes as long as scanning a thousand
    rows, would have nothing to do, the backend's own. The rows have no gradient here."""
    if undispatched(x, *others):
        found: Callable[..., Any] = getattr(backends.choose_for("cpu", name), name)
        return found
    return _OPERATIONS[name]


def bound_scan(
    query: Query, rows: Rows, index: Index, p: Projected, eps: float, cap: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation on all rows, for queries as projected."""
    run = shortest("bound_scan", *query[:5])
    out: tuple[Tensor, Tensor, Tensor, Tensor] = run(
        query.x, rows.rows, query.sigma, query.alpha, query.temperature, query.bias, rows.center,
        rows.sq_norms, rows.scale, rows.shift, index.coarse, index.fine, p.z, p.norms, p.margin,
        p.sq, index.dims, index.first_band, eps, cap,
    )  # fmt: skip
    return out


def _dense(query: Query, rows: Rows) -> Sums:
    x, sigma, alpha, temperature, bias, precision = query
    out: Sums = shortest("posterior", *query[:5])(
        x, rows.rows, sigma, alpha, temperature, bias, rows.center, rows.sq_norms, rows.scale,
        rows.shift, "gaussian", precision,
    )  # fmt: skip
    return out


def _on_support(query: Query, rows: Rows, start: Tensor, listed: Tensor) -> Sums:
    x, sigma, alpha, temperature, bias, _ = query
    out: Sums = shortest("posterior_on_support", *query[:5])(
        x, rows.rows, sigma, alpha, temperature, bias, start, listed, rows.scale, rows.shift
    )
    return out


# --- planner ------------------------------------------------------------------------------------


def _hopeless(query: Query, index: Index, eps: float) -> bool:
    """Whether the noise is such, for all queries, that rows at a common distance from each other
    have weight: all within 2 sigma^2 T log(N / eps) of the nearest |x - alpha y|^2 are kept,
    whatever is proven."""
    noise = (query.sigma / query.alpha).square() * query.temperature
    return float(noise.min()) * math.log(index.n / eps) > HOPELESS * index.spread


def _cap(n: int, costs: Costs) -> int:
    """The rows whose list costs what one more query does in a sweep."""
    return max(1, min(n, int(n * costs.query / costs.listed)))


def _swept_densely(count: Tensor, level: Tensor, n: int, costs: Costs | None) -> Tensor:
    """[B] bool: the split into listed and dense that costs least; given up ones are dense."""
    gone = level == 0
    if costs is None:
        return gone
    some_gone = bool(gone.any())
    if not some_gone and int(count.max()) * costs.listed <= n * costs.query:
        return gone  # each list costs less than what its query would add to a sweep
    # The longest lists go first: after g of them, the sweep costs row + g query, the lists what is
    # left. The sweep reads the rows once for all, so what the first one pays the others save.
    length, order = torch.where(gone, n + 1, count).sort(descending=True)
    left = length.flip(0).cumsum(0).flip(0)
    g = torch.arange(len(left), dtype=torch.float64, device=left.device)
    price = costs.listed * left + n * (costs.row * (g > 0) + costs.query * g)
    price[: int(gone.sum())] = torch.inf
    if n * (costs.row + costs.query * len(left)) <= float(price.min()):
        return torch.ones_like(gone)
    gone[order[: int(price.argmin())]] = True
    return gone


@functools.cache
def _measured(
    device: str, rows_dtype: torch.dtype, dtype: torch.dtype, dim: int, threads: int, backend: str
) -> Costs:
    """The costs of such rows and queries; threads and backend are for the cache."""
    costs = _sample(device, rows_dtype, dtype, dim, 1 << 17)
    if costs.dense(1, 1 << 22, 1) < 0.05:  # no time at all: as many as in earnest, then
        costs = _sample(device, rows_dtype, dtype, dim, 1 << 22)
    return costs


@torch.no_grad()
def _sample(
    device: str, rows_dtype: torch.dtype, dtype: torch.dtype, dim: int, elements: int
) -> Costs:
    """Sweeps of synthetic rows of so many numbers, and lists of them, timed."""
    b, n, count = 64, max(64, elements // dim), 64
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(n, dim, generator=g) * 255).to(rows_dtype).to(device)
    x = torch.rand(b, dim, generator=g).to(device, dtype)
    ones = torch.ones(b, dtype=torch.float64, device=device)
    # As where pruning is worth a thought: few rows have weight. |x - y|^2 is spread by some 20,000
    # sqrt(D), and sigma^2 is a hundredth of it.
    many = Query(x, (200 * dim**0.5) ** 0.5 * ones, ones, ones, None)
    one = many.take(torch.zeros(1, dtype=torch.int64, device=device))
    norms = torch.linalg.vector_norm(rows.to(torch.float64), dim=1).square()
    data = Rows(rows, (dim,), 1.0, 0.0, ones.new_zeros(dim), norms, None)
    listed = torch.randint(n, (b * count,), generator=g).sort().values.to(device)
    start = torch.arange(0, b * count + 1, count, device=device)
    wait = _waiting(device)
    dense_one = _seconds(lambda: _dense(one, data), wait)
    dense_many = _seconds(lambda: _dense(many, data), wait)
    call = _seconds(lambda: _on_support(one, data, start[:2] // count, listed[:1]), wait)
    lists = _seconds(lambda: _on_support(many, data, start, listed), wait)
    # Differences of timings: never below a hundredth of what they are differences of.
    query = max(dense_many - dense_one, 0.01 * dense_many) / (b - 1)
    row = max(dense_one - call - query, 0.0)
    per_listed = max(lists - call, 0.01 * lists) / (b * count * dim)
    return Costs(row / (n * dim), query / (n * dim), per_listed, call)


def _waiting(device: str) -> Callable[[], None]:
    """Waits for what a device was given to do."""
    if device == "cpu":
        return lambda: None
    return functools.partial(torch.accelerator.synchronize, torch.device(device))


def _seconds(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """The shortest of a few runs after a first one, each waited for: a GPU's work goes on after the
    call."""
    call()
    wait()
    best, spent = float("inf"), 0.0
    for _ in range(5):
        began = time.perf_counter()
        call()
        wait()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
        if spent > 0.05:
            break
    return best


def costs_of(x: Tensor, rows: Tensor) -> Costs:
    """What sweeps and lists cost here, measured at the first call for such rows and queries."""
    return _measured(
        str(x.device), rows.dtype, x.dtype, rows.shape[1], torch.get_num_threads(), env.backend()
    )


# --- certificate --------------------------------------------------------------------------------


def _certificate(
    query: Query, rows: Rows, index: Index, sums: Sums, count: Tensor, threshold: Tensor,
    level: Tensor,
) -> Certificate:  # fmt: skip
    """N - count rows of t <= threshold each, beside the rows kept, whose sum is known."""
    n, dim = rows.rows.shape
    pruned = level > 0
    with torch.no_grad():
        kept = sums[1] / query.temperature  # logsumexp t
        # The direct differences' own rounding, in t: relative to the logit, as its squares are.
        rounding = _ULP * (dim + 16) * kept.abs()
        ratio = (n - count) * torch.exp(threshold - kept + rounding)
        ratio = torch.where(pruned, ratio, 0.0)
        weight = ratio.clamp(max=1.0)
        assert rows.center is not None
        offset = sums[0].to(torch.float64) - rows.center.to(torch.float64)
        radius = index.y_max + torch.linalg.vector_norm(offset, dim=1) * (1 + 2.0**-20)
        mean_error = torch.where(pruned, weight * radius, 0.0)
        score_error = query.alpha.abs() * mean_error / query.sigma / query.sigma
        return Certificate(
            weight=weight,
            mean_error=mean_error,
            score_error=torch.where(pruned, score_error, 0.0),
            log_z_error=query.temperature.detach() * torch.log1p(ratio),
            rows_kept=torch.where(pruned, count, n),
            levels=level,
        )


def dense_certificate(like: Tensor, n: int) -> Certificate:
    """Nothing was dropped: zeros."""
    zero = torch.zeros_like(like)
    none = torch.zeros_like(zero, dtype=torch.int64)
    return Certificate(zero, zero, zero, zero, none + n, none)
