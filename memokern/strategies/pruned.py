"""The exact answer for a fraction of the arithmetic, with a proof attached.

Almost all weights are negligible at small sigma, and a projection of the rows to a few dozen
dimensions proves it. For a batch of queries:

1. project them as the index did the rows                                (:meth:`.Index.project`);
2. bound the logits, keep the rows that may weigh more than eps together (``bound_scan``);
3. sweep over the rows kept, by direct differences                       (``posterior_listed``);
4. sweep densely for the queries of which too many rows were kept        (``posterior``).

A backend may have the first three as one call, for queries without a gradient to record.

What was dropped is bounded by the :class:`.Certificate`. Proofs: ``docs/pruning.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memokern import ops
from memokern.backends import protocol
from memokern.calls import Kept, LogitBounds, Query, RowLists, Rows, Scan, Sums
from memokern.index.index import Index
from memokern.index.projection import Projected
from memokern.ops.flat import tensors
from memokern.strategies.certificate import Certificate, certify, nothing_dropped
from memokern.strategies.costs import Costs
from memokern.util.torch_internals import undispatched
from memokern.util.warned import warn

# The weight that may be dropped: what it moves the mean by, at most 2 eps times the radius of the
# data, is then below what the sweep's own rounding promises (1e-5 of the mean in float32) or, in
# float64, does (1e-13). Smaller is cheap: the rows kept are those within log(N / eps) of the best.
EPS = {torch.float32: 1e-6, torch.float64: 1e-14}
# Numbers that Python goes through faster than four operations of PyTorch do.
FEW = 64
# Queries that the backend's own call projects.
_NOT_YET = Projected(*[torch.empty(0, device="cpu")] * 4)
# Of the mean squared distance of two rows. CIFAR-10: sigma = 3.2; from 3 on pruning hardly pays.
HOPELESS = 0.3


def weight_allowed(query: Query, rows: Rows, index: Index, tol: float | None) -> float:
    """eps: the weight that may be dropped for each query, so that the mean errs by tol at most."""
    eps = EPS[torch.float64 if query.computes_in_float64(rows) else torch.float32]
    if tol is None or index.y_max == 0:
        return eps
    # |mean_dropped - mean_kept| <= 2 y_max: both lie in the ball that holds the rows.
    return min(eps, tol / (2 * index.y_max))


def warn_of_gradients(**numbers: object) -> None:
    """UserWarning where a gradient is recorded for sigma, alpha or temperature: rows that weigh
    nothing may still matter to it, by their logits times their weight."""
    if torch.is_grad_enabled():
        for name, value in numbers.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                warn(
                    f"{name} requires a gradient, and the data's index is used: what dropped rows"
                    " add to it is left out, which certificate and tol do not bound;"
                    " method='dense' has the whole gradient"
                )
                return


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
    if _dense_at_once(query, rows, index, eps, costs):
        dense = ops.posterior(query, rows)
        return dense, nothing_dropped(query.sigma, rows.n) if certificate else None
    found = _in_one_call(query, rows, index, eps, costs)
    if found is not None:
        sums, kept = found
    else:
        scan, swept = _scanned(query, rows, index, eps, costs)
        sums, kept = _by_both_ways(query, rows, scan, swept), scan.kept
        kept = kept._replace(level=torch.where(swept, 0, scan.level))
    return sums, certify(query, rows, index, kept, sums) if certificate else None


def _dense_at_once(query: Query, rows: Rows, index: Index, eps: float, costs: Costs | None) -> bool:
    """Whether it is clear before any work that all queries are better swept densely."""
    b = query.x.shape[0]
    if b == 0 or costs is None:
        return b == 0
    # Four calls: to project, to scan, to sweep, and what lies between.
    small = costs.dense(b, rows.n, rows.dim) < 4 * costs.call
    return small or _hopeless(query, index, eps)


def _in_one_call(
    query: Query, rows: Rows, index: Index, eps: float, costs: Costs | None
) -> tuple[Sums, Kept] | None:
    """The sums, and what the scan found, level 0 for queries swept densely: by the backend's one
    call for all steps, where it has one and nothing asks for the steps themselves."""
    if not undispatched(*tensors(query, rows)):
        return None
    call = protocol.Call.of(query.x, rows.data)
    run = getattr(protocol.choose("bound_scan", call), "pruned_posterior", None)
    if run is None:
        return None
    n = rows.n
    wide = query.computes_in_float64(rows)
    projection = None if wide else index.backends_own(query.x)
    if projection is None:
        projected = index.project(query.x, query.alpha)
    else:
        projected = _NOT_YET
    most_listed, prices = n, None
    if costs is not None:
        most_listed = _most_listed(n, costs)
        prices = (costs.listed, n * costs.row, n * costs.query)
    bounds = _bounds(index, projected, eps, most_listed, costs)
    sums, kept, swept = run(query, rows, bounds, projection, prices)
    if swept == len(query.x):
        return ops.posterior(query, rows), kept
    if swept > 0:
        at = (kept.level == 0).nonzero()[:, 0]
        for to, of in zip(sums, ops.posterior(query.take(at), rows), strict=True):
            to[at] = of
    return sums, kept


def _scanned(
    query: Query, rows: Rows, index: Index, eps: float, costs: Costs | None
) -> tuple[Scan, Tensor]:
    """What the bounds leave, and which queries [B] are swept densely all the same."""
    n = rows.n
    with torch.no_grad():
        most_listed = n if costs is None else _most_listed(n, costs)
        projected = index.project(query.x, query.alpha)
        bounds = _bounds(index, projected, eps, most_listed, costs)
        scan = ops.bound_scan(query, rows, bounds)
        return scan, _swept_densely(scan, n, costs)


def choose(
    query: Query, rows: Rows, index: Index, eps: float, costs: Costs | None
) -> tuple[Scan, Tensor] | None:
    """What the bounds leave, and which queries [B] are better off with all rows; None where all
    are."""
    query = query.detach()
    if _dense_at_once(query, rows, index, eps, costs):
        return None
    return _scanned(query, rows, index, eps, costs)


def lists_of(scan: Scan, which: Tensor) -> RowLists:
    """The lists of the queries in `which` [B]."""
    start, index = scan.lists
    count = start.diff()
    kept = which.nonzero()[:, 0]
    return RowLists(
        torch.cat([start[:1], count[kept].cumsum(0)]), index[which.repeat_interleave(count)]
    )


def scan_index(
    query: Query, rows: Rows, index: Index, projected: Projected, eps: float, most_listed: int
) -> Scan:
    """Which rows can matter to queries that were projected."""
    return ops.bound_scan(query, rows, _bounds(index, projected, eps, most_listed))


def _bounds(
    index: Index, projected: Projected, eps: float, most_listed: int, costs: Costs | None = None
) -> LogitBounds:
    reading = () if costs is None else (costs.row / costs.query,)
    return LogitBounds(
        index.coarse,
        index.fine,
        projected.z,
        projected.norms,
        projected.margin,
        projected.sq,
        index.dims,
        index.first_band,
        eps,
        most_listed,
        index.blocks,
        *reading,
    )


def _by_both_ways(query: Query, rows: Rows, scan: Scan, swept: Tensor) -> Sums:
    """Dense sums of the queries where `swept` [B], those over their lists of the others."""
    n_swept = int(swept.sum())
    if n_swept == 0:
        return ops.posterior_listed(query, rows, scan.lists)
    if n_swept == len(swept):
        return ops.posterior(query, rows)
    kept, rest = (~swept).nonzero()[:, 0], swept.nonzero()[:, 0]
    lists = lists_of(scan, ~swept)
    near = ops.posterior_listed(query.take(kept), rows, lists)
    far = ops.posterior(query.take(rest), rows)
    order = torch.argsort(torch.cat([kept, rest]))
    return Sums(*(torch.cat(pair)[order] for pair in zip(near, far, strict=True)))


# --- which way ----------------------------------------------------------------------------------


def _hopeless(query: Query, index: Index, eps: float) -> bool:
    """Whether the noise is such, for all queries, that rows at a common distance from each other
    have weight: all within 2 sigma^2 T log(N / eps) of the nearest |x - alpha y|^2 are kept,
    whatever is proven."""
    sigma, alpha, temperature = query.sigma, query.alpha, query.temperature
    if len(sigma) <= FEW and sigma.device.type == "cpu":
        each = zip(sigma.tolist(), alpha.tolist(), temperature.tolist(), strict=True)
        noise = min((s / a) * (s / a) * t if a else math.inf for s, a, t in each)
    else:
        noise = float(((sigma / alpha).square() * temperature).detach().min())
    return noise * math.log(index.n / eps) > HOPELESS * index.mean_square


def hopeless(query: Query, rows: Rows, index: Index) -> bool:
    """The same for the least weight that is dropped where no tol is asked for."""
    return len(query.x) == 0 or _hopeless(query, index, weight_allowed(query, rows, index, None))


def _most_listed(n: int, costs: Costs) -> int:
    """The rows whose list costs what one more query does in a sweep."""
    return max(1, min(n, int(n * costs.query / costs.listed)))


def _swept_densely(scan: Scan, n: int, costs: Costs | None) -> Tensor:
    """[B] bool: the split into listed and dense that costs least; given up ones are dense."""
    count, gone = scan.lists.start.diff(), scan.level == 0
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
