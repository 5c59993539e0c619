"""The partial result of a sweep over some of the rows, and the monoid that joins partial results.

Lanes, threads, tiles, chunks and shards each sweep their rows to a :class:`State`; :func:`merge`
joins two of them, :func:`to_sums` normalises the last one. The same merge is written once in C++
(``csrc/include/memokern/state.h``) and once in Triton
(:mod:`memokern.backends.triton.core.state`); the tests hold the three to the same laws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls.arguments import Query
from memokern.calls.results import Sums

_F64 = torch.float64


class State(NamedTuple):
    """Sums over some rows that are not normalised yet, of B queries.

    With v = l / T, only the rows whose key is the smallest have weight. A row's key is 0 where
    sigma > 0; at sigma = 0, where the nearest row takes all, its squared distance; with weighting
    "log", 0 for a row that x hits exactly and 1 for the others. Over the rows that have weight,

    key, m: [B] float64, their key and the largest v. At sigma = 0 (and where sigma is so small that
    r^2 / sigma^2 nearly overflows), and for an exact hit of "log",
    v is bias / T alone, since the rest is infinite. Where r^2 / sigma^2 is so large that a bias
    would be lost beside it, the key may be the nearest row's squared distance at sigma > 0 too:
    then v is less what the key makes of it.
    s, s_v, s_bias, s_sq: [B] float64, the sums of e^(v - m), e^(v - m) (v - m), e^(v - m) bias and
    e^(2 (v - m)).
    acc, residual: [B, D], the sums of e^(v - m) (y - center) and of e^(v - m) (alpha y - x), in the
    type that the sweep accumulates in. The second follows from the first but for rounding: it is
    made of differences where these are small beside y - center.
    center: [D] float64, any point near the rows.

    Without rows that have weight: key inf, m -inf, all sums 0. Of a query that is not finite: key
    and m 0, all sums NaN.
    """

    key: Tensor
    m: Tensor
    s: Tensor
    s_v: Tensor
    s_bias: Tensor
    s_sq: Tensor
    acc: Tensor
    residual: Tensor
    center: Tensor


def empty_state(b: int, center: Tensor, dtype: torch.dtype) -> State:
    """The neutral element of :func:`merge`: the state of no rows."""
    zeros = [torch.zeros(b, dtype=_F64, device=center.device) for _ in range(4)]
    inf = torch.full((b,), torch.inf, dtype=_F64, device=center.device)
    acc = torch.zeros(b, len(center), dtype=dtype, device=center.device)
    return State._make([inf, -inf, *zeros, acc, torch.zeros_like(acc), center.to(_F64)])


def without(state: State, lost: Tensor) -> State:
    """The same state, where nothing is known of the queries in `lost` [B]: those not finite."""
    key, m, *sums, acc, residual, center = state
    known = [*(torch.where(lost, 0.0, v) for v in (key, m))]
    known += [torch.where(lost, torch.nan, v) for v in sums]
    known += [torch.where(lost[:, None], torch.nan, v) for v in (acc, residual)]
    return State._make([*known, center])


def merge(a: State, b: State, by_key: Tensor | None = None) -> State:
    """The state of the rows of both: associative and commutative up to rounding.

    by_key: [B] float64, what a key takes from v for each 1 that it is larger, from :func:`by_key`.
    None stands for infinity: only the smallest key counts. That is right unless a sweep took a
    sigma > 0 for 0 because r^2 / sigma^2 nearly overflows, which may differ from part to part.

    The result is about a's center. Cost: a few operations on [B, D].
    """
    key = torch.minimum(a.key, b.key)
    m = torch.maximum(*(_beside(state, key, by_key) for state in (a, b)))
    one, other = (rescaled(state, key, m, by_key, a.center) for state in (a, b))
    sums = (u + v for u, v in zip(one[2:8], other[2:8], strict=True))
    weighs = (a.s != 0) | (b.s != 0)  # NaN, of a query that is not finite, counts
    return State._make([torch.where(weighs, key, torch.inf), m, *sums, a.center])


def joint_key(key: Tensor, m: Tensor, s: Tensor, by_key: Tensor | None) -> tuple[Tensor, Tensor]:
    """key and m [B] of the union of parts whose key, m and s are [parts, B]."""
    least = key.amin(0)
    beside = torch.where(s == 0, -torch.inf, _m_at(key, m, least, by_key))
    return torch.where((s != 0).any(0), least, torch.inf), beside.amax(0)


def rescaled(state: State, key: Tensor, m: Tensor, by_key: Tensor | None, center: Tensor) -> State:
    """The state's sums relative to the key and m of a union that it is a part of, and about that
    one's center: those of the parts add up to the union's. 0 where the part has no weight in it."""
    mine = _beside(state, key, by_key)
    has = ~torch.isneginf(mine)
    gap = torch.where(has, mine - m, 0.0)
    f = torch.where(has, gap.exp(), 0.0)
    kind = state.acc.dtype
    return State(
        key,
        m,
        _times(f, state.s),
        _times(f, state.s_v + state.s * gap),
        _times(f, state.s_bias),
        _times(f.square(), state.s_sq),
        _times(f[:, None], _about(state, center)).to(kind),
        _times(f[:, None], state.residual).to(kind),
        center,
    )


def by_key(query: Query) -> Tensor:
    """1 / (2 sigma^2 T) [B] for the gaussian weighting, whose keys are squared distances; inf at
    sigma = 0, and for "log", whose hits take all."""
    if query.weighting != "gaussian":
        return torch.full_like(query.sigma, torch.inf)
    return (0.5 / query.sigma / query.sigma / query.temperature).detach()


def _beside(state: State, key: Tensor, by_key: Tensor | None) -> Tensor:
    """m as if the state had this key, which is no larger than its own; -inf without weight."""
    # A query that is not finite counts as having weight: a comparison with NaN is false.
    return torch.where(state.s == 0, -torch.inf, _m_at(state.key, state.m, key, by_key))


def _m_at(mine: Tensor, m: Tensor, key: Tensor, by_key: Tensor | None) -> Tensor:
    """m of a part with key `mine`, as if its key were this one."""
    same = (mine == key) & ~torch.isinf(key)
    if by_key is None:
        return torch.where(same, m, -torch.inf)
    return torch.where(same, m, m - (mine - key) * by_key)


def _times(f: Tensor, value: Tensor) -> Tensor:
    """f times the value, where a factor of 0 leaves it out, whatever it is."""
    return torch.where(f == 0, 0.0, f * value)


def _about(state: State, center: Tensor) -> Tensor:
    """The accumulator about another center."""
    if state.center is center:
        return state.acc
    return state.acc.to(_F64) + state.s[:, None] * (state.center - center)


def to_sums(state: State, query: Query) -> Sums:
    """The normalised sums. Of a query without rows that have weight: log_z -inf, the others NaN."""
    lse = query.temperature * (state.m + state.s.log())
    mean_logit = query.temperature * (state.m + state.s_v / state.s)
    if query.weighting == "gaussian":
        # The logits lack the key's distance: at sigma = 0 it makes them -inf, unless the nearest
        # row is hit. It has no derivative here: where it moves, the sums carry that, as with m.
        with torch.no_grad():
            limit = state.key > 0
            infinite = limit & torch.isinf(state.key / query.sigma / query.sigma)
            finite = limit & ~infinite
            sigma = torch.where(finite, query.sigma, 1.0)
            pull = torch.where(finite, -0.5 * (state.key / sigma) / sigma, 0.0)
        lse, mean_logit = (torch.where(infinite, -torch.inf, v + pull) for v in (lse, mean_logit))
    else:
        hit = (state.key == 0) & (state.s > 0)
        lse, mean_logit = (torch.where(hit, torch.inf, v) for v in (lse, mean_logit))
    none = state.s == 0
    mean = state.acc / state.s[:, None] + state.center
    return Sums(
        torch.where(none[:, None], torch.nan, mean).to(query.x.dtype),
        torch.where(none, -torch.inf, lse),
        torch.where(none, torch.nan, mean_logit),
        torch.where(none, torch.nan, state.s_bias / state.s),
        torch.where(none, torch.nan, state.s_sq / state.s.square()),
        torch.where(none[:, None], torch.nan, state.residual / state.s[:, None]).to(query.x.dtype),
    )
