"""Parts of the data, swept apart: the state that each leaves, and the posterior of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memokern import ops
from memokern.calls import Query, State, by_key, to_sums
from memokern.calls import merge as merge_states
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.results import Posterior
from memokern.strategies import parted
from memokern.strategies.local import How
from memokern.util.torch_internals import traced
from memokern.validate import Asked, PerQuery, checked, computable, log_sum_exp


@dataclass(frozen=True, kw_only=True)
class PosteriorState:
    r"""What a sweep over some of the rows leaves, before it is normalised; :func:`merge` joins
    those of several parts of the data, whatever sigma is.

    Attributes:
        x: the queries [\*batch, \*shape]. sigma, alpha, temperature: as used, [\*batch] float64.
        weighting: as asked for.
        state: the sums, of the queries as [B], B their number: see :class:`memokern.calls.State`.
        n: how many rows were swept. log_weight_total: log sum_n exp(b_n) over them, [] float64.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[0.0], [1.0], [4.0]])
        >>> x = torch.tensor([[2.5]])
        >>> halves = [memokern.posterior_state(x, part, 0.0) for part in (rows[:2], rows[2:])]
        >>> memokern.merge(*halves).posterior().mean  # 1 and 4 are equally near
        tensor([[2.5000]])
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    weighting: str
    state: State
    n: int
    log_weight_total: Tensor

    @property
    def query(self) -> Query:
        """The queries as the operations take them; the bias is in the state."""
        b, dim = self.state.acc.shape
        return Query(
            self.x.reshape(b, dim),
            self.sigma.reshape(-1),
            self.alpha.reshape(-1),
            self.temperature.reshape(-1),
            weighting=self.weighting,
        )

    def posterior(self) -> Posterior:
        """The posterior over the rows swept so far. Without rows that have weight: log_z -inf, the
        other sums NaN."""
        batch, sums = self.sigma.shape, to_sums(self.state, self.query)
        return Posterior(
            x=self.x,
            mean=sums.mean.reshape(self.x.shape),
            residual=sums.residual.reshape(self.x.shape),
            log_z=sums.log_z.reshape(batch),
            mean_logit=sums.mean_logit.reshape(batch),
            mean_bias=sums.mean_bias.reshape(batch),
            weight_sq=sums.weight_sq.reshape(batch),
            sigma=self.sigma,
            alpha=self.alpha,
            temperature=self.temperature,
            n=self.n,
            dim=self.state.acc.shape[1],
            log_weight_total=self.log_weight_total,
        )


def merge(*states: PosteriorState) -> PosteriorState:
    """The state of all rows that these states were swept over; of one state, itself.

    The sum is associative and commutative up to rounding. Gradients flow through it.

    Raises: TypeError for anything but states. ValueError for none at all, and for states of other
    queries, sigma, alpha, temperature or weighting.

    Cost: a few operations on [B, D] for each state.

    Example:
        >>> import torch, memokern
        >>> rows, x = torch.randn(10, 3), torch.zeros(2, 3)
        >>> parts = [memokern.posterior_state(x, part, 0.5) for part in rows.split(4)]
        >>> whole = memokern.posterior(x, rows, 0.5)
        >>> bool(torch.allclose(memokern.merge(*parts).posterior().mean, whole.mean, atol=1e-6))
        True
    """
    if not states:
        raise ValueError("merge needs at least one state")
    for state in states:
        if not isinstance(state, PosteriorState):
            raise TypeError(
                f"expected states of memokern.posterior_state, got {type(state).__name__}"
            )
    first, *rest = states
    if not rest:
        return first
    total, n = first.state, first.n
    for state in rest:
        _require_same_queries(first, state)
        total = merge_states(total, state.state, by_key(first.query))
        n += state.n
    # Not logaddexp, whose second derivatives are NaN where one part has no rows.
    totals = torch.stack([state.log_weight_total for state in states])
    return replace(first, state=total, n=n, log_weight_total=log_sum_exp(totals))


def _require_same_queries(a: PosteriorState, b: PosteriorState) -> None:
    if a.weighting != b.weighting:
        raise ValueError(f"expected states of one weighting, got {a.weighting} and {b.weighting}")
    for name in ("x", "sigma", "alpha", "temperature"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine.shape != other.shape or mine.dtype != other.dtype or mine.device != other.device:
            raise ValueError(
                f"expected states of the same queries: {name} is {mine.dtype} {list(mine.shape)} on"
                f" {mine.device} and {other.dtype} {list(other.shape)} on {other.device}"
            )
        if mine is other or traced(mine, other):
            continue
        if not bool(((mine == other) | (mine.isnan() & other.isnan())).all()):
            raise ValueError(f"expected states of the same queries, and their {name} differs")


def posterior_state(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    weighting: str = "gaussian",
    precision: str = "auto",
) -> PosteriorState:
    r"""The sums of :func:`posterior` before they are normalised, for a part of the data.

    States of several parts, on several machines or read one after the other, are joined by
    :func:`merge`; `merge(...).posterior()` is then that of all rows, at sigma = 0 too, where the
    nearest row of all parts takes all and ties share.

    Args, errors, numerics, gradients and cost: as :func:`posterior` with method="dense"; `bias` is
    that of these rows, and may leave none of them.

    Example:
        >>> import torch, memokern
        >>> rows, x = torch.tensor([[-1.0], [1.0]]), torch.zeros(1, 1)
        >>> left, right = (memokern.posterior_state(x, part, 0.5) for part in rows.split(1))
        >>> memokern.merge(left, right).posterior().mean
        tensor([[0.]])
    """
    x = computable(x)
    apart = data if isinstance(data, PartedSet) else None

    def check() -> Asked:
        return checked(x, data, sigma, alpha, temperature, bias, weighting, precision, part=True)

    asked = check() if apart is None else parted.together(apart, "posterior", check)
    query, rows = asked.query, asked.data.rows
    if apart is not None:
        total = torch.as_tensor(parted.total(query.bias, apart), dtype=torch.float64)
        return PosteriorState(
            x=x, sigma=asked.sigma, alpha=asked.alpha, temperature=asked.temperature,
            weighting=weighting, state=parted.state(query, apart, How()), n=apart.n,
            log_weight_total=total.to(x.device),
        )  # fmt: skip
    return PosteriorState(
        x=x,
        sigma=asked.sigma,
        alpha=asked.alpha,
        temperature=asked.temperature,
        weighting=weighting,
        state=ops.posterior_state(query, rows),
        n=rows.n,
        log_weight_total=(
            torch.full((), math.log(rows.n), dtype=torch.float64, device=x.device)
            if query.bias is None
            else log_sum_exp(query.bias)
        ),
    )
