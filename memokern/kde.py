"""Kernel density estimates: the mixture of Gaussians on the rows, as statistics calls it.

The density of bandwidth h is that of x = y + h z, so that log density and score are those of the
sweep at sigma = h. What this face adds is leaving out the query's own row.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.compiler import is_compiling

from memokern import functional, validate
from memokern.calls.state import State, empty_state
from memokern.data.parted import PartedSet
from memokern.data.storage import as_given
from memokern.data.training_set import TrainingSet
from memokern.partial import PosteriorState, merge, posterior_state
from memokern.results import Posterior
from memokern.validate import PerQuery

# So many rows are met by their own queries without a call for each.
BLOCK = 32


def log_density(
    x: Tensor,
    data: TrainingSet | Tensor,
    bandwidth: PerQuery,
    *,
    leave_one_out: bool = False,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""log sum_n pi_n N(x; y_n, h^2 I), the kernel density estimate [\*batch] float64.

    Args:
        x: [\*batch, \*shape] as for :func:`memokern.posterior`. data: N rows of that shape.
        bandwidth: h > 0, a number or one per query [\*batch].
        leave_one_out: x are the rows themselves, [N, \*shape] in their order, and row i does not
            count for query i: the density of cross-validation, whose mean over i is largest at a
            good bandwidth. Needs N >= 2. Other rows that equal row i do count.
        bias: [N] log weights of the rows, which need not be normalised; a TrainingSet's are added.
        method: as :func:`memokern.posterior`; without effect where one is left out.

    Raises: TypeError, ValueError as :func:`memokern.posterior`; ValueError for a bandwidth that is
    not positive, and where rows are left out and x is not [N, \*shape] or no other row has weight.

    Numerics: in logarithms from beginning to end: finite in thousands of dimensions and a thousand
    bandwidths away, where the density itself underflows. Gradients for x, bandwidth and bias are
    finite there too.

    Cost: one sweep. Leaving one out takes as many operations, in N / 16 parts: every query meets
    every other row once.

    Source: Rosenblatt (1956), Parzen (1962).

    Example:
        >>> import torch
        >>> from memokern import kde
        >>> rows = torch.tensor([[0.0], [1.0], [1.5]])
        >>> round(kde.log_density(torch.tensor([[100.0]]), rows, 0.1).item(), 2)
        -485112.21
        >>> narrow, wide = (kde.log_density(rows, rows, h, leave_one_out=True) for h in (0.1, 1.0))
        >>> bool(wide.mean() > narrow.mean())
        True
    """
    if leave_one_out:
        found, log_total = _left_one_out(x, data, bandwidth, bias)
        h = found.sigma
        return found.log_z - log_total - found.dim * (math.log(2 * math.pi) / 2 + torch.log(h))
    _require_positive(bandwidth)
    return functional.log_density(x, data, bandwidth, bias=bias, method=method)


def score(
    x: Tensor,
    data: TrainingSet | Tensor,
    bandwidth: PerQuery,
    *,
    leave_one_out: bool = False,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""grad_x of :func:`log_density`, (sum_n w_n y_n - x) / h^2 [\*batch, \*shape] in x's type: the
    direction of mean shift.

    Args, Raises, Numerics, Cost: as :func:`log_density`.

    Example:
        >>> import torch
        >>> from memokern import kde
        >>> rows = torch.tensor([[0.0], [2.0]])
        >>> kde.score(rows, rows, 1.0, leave_one_out=True).tolist()
        [[2.0], [-2.0]]
    """
    if leave_one_out:
        found, _ = _left_one_out(x, data, bandwidth, bias)
        return found.score.to(x.dtype)
    _require_positive(bandwidth)
    return functional.score(x, data, bandwidth, bias=bias, method=method)


def _require_positive(bandwidth: PerQuery) -> None:
    if is_compiling():  # as sigma is trusted there: a branch on its value would split the graph
        return
    value = as_given(bandwidth, "bandwidth")
    if not bool((value > 0).all()):
        raise ValueError(f"expected bandwidth > 0, got {float(value.min())}")


def _left_one_out(
    x: Tensor, data: TrainingSet | Tensor, bandwidth: PerQuery, bias: Tensor | None
) -> tuple[Posterior, Tensor]:
    """The posterior of query i over all rows but row i, and the log of the weight of those rows
    [N]."""
    rows = data if isinstance(data, TrainingSet) else None
    if isinstance(data, PartedSet):
        data.refuse("leave_one_out", "use posterior(x, data, h, leave_out=torch.arange(n))")
    found = validate.as_data(data)
    n, query = found.rows.n, validate.computable(x)
    batch = validate.batch_shape(query, found)
    if tuple(batch) != (n,):
        raise ValueError(
            f"leave_one_out takes x as the rows in their order, [{n}, ...], got {tuple(x.shape)}"
        )
    if n < 2:
        raise ValueError("leave_one_out needs at least 2 rows, got 1")
    _require_positive(bandwidth)
    h = validate.per_query("bandwidth", bandwidth, batch, query.device)
    state = _of_others(query, data if rows is None else rows, h, bias)
    weights = validate.checked(query, data, h, 1.0, 1.0, bias).query.bias
    log_total = _log_total_of_others(weights, n, query.device)
    if bool(torch.isneginf(log_total).any()):
        raise ValueError("one row has all the weight: without it no density is left")
    return state.posterior(), log_total


def _of_others(
    x: Tensor, data: TrainingSet | Tensor, h: Tensor, bias: Tensor | None
) -> PosteriorState:
    """The state of query i over all rows but row i.

    Blocks of BLOCK rows are met by their own queries directly. Rows of two blocks have numbers that
    first differ, from above, in one binary digit. So for each digit 2^j, stretches of 2^(j+1) rows
    are halved, and each half's queries are swept over the other half's rows: together every query
    meets every row once, but its own.
    """
    n = len(x)
    total = _within_blocks(x, data, h, bias)
    for j in range(BLOCK.bit_length() - 1, (n - 1).bit_length()):
        half, parts = 1 << j, []
        for start in range(0, n, 2 * half):
            middle, end = min(start + half, n), min(start + 2 * half, n)
            for mine, other in ((slice(start, middle), slice(middle, end)),
                                (slice(middle, end), slice(start, middle))):  # fmt: skip
                if mine.start == mine.stop:
                    continue
                if other.start == other.stop:
                    parts.append(_no_rows(x[mine], h[mine]))
                    continue
                rows = data.subset(other) if isinstance(data, TrainingSet) else data[other]
                chosen = None if bias is None else bias[other]
                parts.append(posterior_state(x[mine], rows, h[mine], bias=chosen))
        total = merge(total, _joined(x, h, parts))
    return total


def _within_blocks(
    x: Tensor, data: TrainingSet | Tensor, h: Tensor, bias: Tensor | None
) -> PosteriorState:
    """The state of query i over the rows of its own block but row i, in float64."""
    n, flat = len(x), x.flatten(1).double()
    asked = validate.checked(x, data, h, 1.0, 1.0, bias)
    weights, rows = asked.query.bias, asked.data.rows
    center = torch.zeros(flat.shape[1], dtype=torch.float64, device=x.device)
    parts = []
    for start in range(0, n, BLOCK):
        block = slice(start, min(start + BLOCK, n))
        y = rows.values(block)
        square = (flat[block, None] - y).square().sum(-1)
        own = torch.eye(len(y), dtype=torch.bool, device=x.device)
        b = square.new_zeros(len(y)) if weights is None else weights[block]
        width = h[block, None]
        v = (-square / 2 / width / width + b).masked_fill(own, -torch.inf)
        m = v.detach().amax(1)
        some = ~torch.isneginf(m)
        gap = torch.where(torch.isneginf(v), 0.0, v - torch.where(some, m, 0.0)[:, None])
        e = torch.where(torch.isneginf(v), 0.0, gap.exp())
        sums = {
            "key": torch.where(some, 0.0, torch.inf), "m": m, "s": e.sum(1),
            "s_v": (e * gap).sum(1), "s_sq": e.square().sum(1), "acc": e @ y,
            "s_bias": (e * torch.where(torch.isneginf(b), 0.0, b)).sum(1),
            "residual": (e[:, :, None] * (y - flat[block, None])).sum(1),
        }  # fmt: skip
        state = empty_state(len(y), center, torch.float64)._replace(**sums)
        parts.append(replace(_no_rows(x[block], h[block]), state=state))
    return _joined(x, h, parts)


def _no_rows(x: Tensor, h: Tensor) -> PosteriorState:
    """The neutral element of `merge` for these queries."""
    dim = x[0].numel()
    center = torch.zeros(dim, dtype=torch.float64, device=x.device)
    one = torch.ones_like(h)
    return PosteriorState(
        x=x, sigma=h, alpha=one, temperature=one, weighting="gaussian",
        state=empty_state(len(x), center, x.dtype), n=0,
        log_weight_total=torch.full((), -math.inf, dtype=torch.float64, device=x.device),
    )  # fmt: skip


def _joined(x: Tensor, h: Tensor, parts: list[PosteriorState]) -> PosteriorState:
    """States of parts of the queries, as one about one center."""
    center = parts[0].state.center
    states = [part.state for part in parts]
    # In float64, because a state's own center may be far from the first one's.
    acc = [s.acc.to(torch.float64) + s.s[:, None] * (s.center - center) for s in states]
    rest = [name for name in State._fields if name not in ("acc", "center")]
    same = {name: torch.cat([getattr(state, name) for state in states]) for name in rest}
    one = torch.ones_like(h)
    return replace(
        parts[0], x=x, sigma=h, alpha=one, temperature=one, n=len(x) - 1,
        state=State(**same, acc=torch.cat(acc), center=center),
    )  # fmt: skip


def _log_total_of_others(weights: Tensor | None, n: int, device: torch.device) -> Tensor:
    """log of the sum of exp(b_m) over m other than n, [N] float64: by sums from both ends, since a
    difference would lose what is small beside a row's own weight."""
    if weights is None:
        return torch.full((n,), math.log(n - 1), dtype=torch.float64, device=device)
    none = torch.full((1,), -math.inf, dtype=torch.float64, device=device)
    below = torch.cat([none, torch.logcumsumexp(weights, 0)[:-1]])
    above = torch.cat([torch.logcumsumexp(weights.flip(0), 0).flip(0)[1:], none])
    return torch.stack([below, above]).logsumexp(0)
