"""The last step of a sweep: the parts of its sums are joined, and normalised or left as a state."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.query_table import HARD, LOG, LOST, MODE
from memokern.backends.triton.core.state import KEY, S_BIAS, S_SQ, S_V, STATE, M, S
from memokern.backends.triton.core.variant import Variant
from memokern.backends.triton.posterior.queries import KernelQueries
from memokern.calls import State, Sums


@triton.jit
def finish_kernel(
    states,  # [n_states, STATE, B]
    accs,  # [n_accs, B, D]
    pulls,  # [n_pulls, B, D], or [1, B, D] if has_near
    near_s,  # [B], read if has_near
    x,  # [total, D]
    alpha,  # [total]
    table,  # [TABLE, total]
    sigma, temperature,  # [total]
    scale_shift,  # [2]
    center,  # [D], read unless NORMALISED
    residual,  # [total, D] out
    mean,  # [total, D] out; this and the next four are None unless NORMALISED
    log_z, mean_logit, mean_bias, weight_sq,  # [total] out
    acc,  # [total, D] out; this and the next six are None if NORMALISED
    key, m, s, s_v, s_bias, s_sq,  # [total] out
    total, b0, B, D, n_states, n_accs, n_pulls, has_near, offset,
    NORMALISED: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Joins the parts of the queries b0 .. b0 + B, by the monoid. One program owns a query and
    BLOCK_D features, and streams the parts: once for the smallest key, once for the largest m, once
    for the sums. There are as many states as accumulators, or one to which all accumulators are
    relative. The last n_pulls parts are of rows that were evaluated by direct differences, whose
    sums of w (alpha y - x) pulls has; of the other rows it follows from the accumulators. If
    has_near, pulls has those of rows that the accumulators lack, whose w add up to near_s. It
    writes the normalised sums of calls.Sums, or a calls.State."""
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_s = states + i_b
    inf, nan = float("inf"), float("nan")
    step = tl.cast(B, tl.int64) * STATE
    # PARTS at a time, since there may be thousands.
    o_p = tl.arange(0, PARTS)
    least = tl.full([PARTS], inf, tl.float64)
    for i in range(0, n_states, PARTS):
        at = p_s + (i + o_p) * step
        least = tl.minimum(least, tl.load(at + KEY * B, mask=i + o_p < n_states, other=inf))
    b_key = tl.min(least, 0)
    most = tl.full([PARTS], -inf, tl.float64)
    for i in range(0, n_states, PARTS):
        at, mask = p_s + (i + o_p) * step, i + o_p < n_states
        counts = (tl.load(at + KEY * B, mask=mask, other=inf) == b_key) & (b_key < inf)
        most = tl.maximum(most, tl.where(counts, tl.load(at + M * B, mask=mask, other=-inf), -inf))
    b_m = tl.max(most, 0)
    b_m = tl.where(b_m == -inf, 0.0, b_m)
    z_s = tl.zeros([PARTS], tl.float64)
    z_sv, z_sb, z_sq = z_s, z_s, z_s
    total_acc = tl.zeros([BLOCK_D], tl.float64)
    swept_acc, total_pull = total_acc, total_acc
    z_swept = z_s
    swept = n_accs - n_pulls
    for i in range(0, n_accs, PARTS):
        at = p_s + tl.minimum(i + o_p, n_states - 1) * step
        counts = (tl.load(at + KEY * B) == b_key) & (b_key < inf) & (i + o_p < n_accs)
        gap = tl.where(counts, tl.load(at + M * B), b_m) - b_m
        f = tl.where(counts, tl.exp(gap), 0.0)
        p_a = accs + ((i + o_p).to(tl.int64) * B + i_b)[:, None] * D + o_d[None, :]
        mask = (f > 0.0)[:, None] & (o_d < D)[None, :]
        part = tl.load(p_a, mask=mask, other=0.0).to(tl.float64)
        part = part * f[:, None]
        total_acc += tl.sum(part, 0)
        of_sweep = i + o_p < swept
        swept_acc += tl.sum(tl.where(of_sweep[:, None], part, 0.0), 0)
        p_r = pulls + ((i + o_p - swept).to(tl.int64) * B + i_b)[:, None] * D + o_d[None, :]
        mask = mask & (of_sweep == 0)[:, None]
        pull = tl.load(p_r, mask=mask, other=0.0).to(tl.float64)
        total_pull += tl.sum(pull * f[:, None], 0)
        # A state that all accumulators share counts once.
        f = tl.where(i + o_p < n_states, f, 0.0)
        s_i = tl.load(at + S * B)
        z_s += f * s_i
        z_swept += tl.where(of_sweep, f * s_i, 0.0)
        z_sv += f * (tl.load(at + S_V * B) + s_i * gap)
        z_sb += f * tl.load(at + S_BIAS * B)
        z_sq += f * f * tl.load(at + S_SQ * B)
    b_s, b_sv = tl.sum(z_s, 0), tl.sum(z_sv, 0)
    b_sb, b_sq = tl.sum(z_sb, 0), tl.sum(z_sq, 0)

    to = b0 + i_b
    mode = tl.load(table + MODE * total + to).to(tl.int32)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1) - offset * tl.load(scale_shift)
    lost = (mode == LOST) | (b_s != b_s)
    none = (b_s == 0.0) & (lost == 0)
    b_alpha, s_swept = tl.load(alpha + to), tl.sum(z_swept, 0)
    s_near = tl.load(near_s + i_b, mask=has_near != 0, other=0.0)
    s_near = tl.where((s_near > 0.0) & (lost == 0), s_near, 0.0)
    b_near = tl.load(pulls + i_b * D + o_d, mask=(o_d < D) & (s_near > 0.0), other=0.0)
    b_near = b_near.to(tl.float64)
    s_swept = tl.maximum(s_swept - s_near, 0.0)
    total_pull += b_near
    b_x = tl.load(x + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    # What the mean's sum lacks: w y = (w (alpha y - x) + w x) / alpha.
    per = tl.where(s_near > 0.0, 1.0 / tl.where(s_near > 0.0, b_alpha, 1.0), 0.0)
    s_acc = b_s - s_near
    b_pull = b_alpha * (swept_acc * scale + s_swept * shift) - s_swept * b_x + total_pull
    if NORMALISED:
        unknown = lost | none
        s_safe = tl.where(unknown, 1.0, b_s)
        b_sum = total_acc * scale + s_acc * shift + (b_near + s_near * b_x) * per
        b_mean = tl.where(unknown, nan, b_sum / s_safe)
        tl.store(mean + to * D + o_d, b_mean.to(tl.float32), mask=o_d < D)
        b_pull = tl.where(unknown, nan, b_pull / s_safe)
        tl.store(residual + to * D + o_d, b_pull.to(tl.float32), mask=o_d < D)
        if i_d == 0:
            b_t, b_sigma = tl.load(temperature + to), tl.load(sigma + to)
            lse = b_t * (b_m + tl.log(s_safe))
            logit = b_t * (b_m + b_sv / s_safe)
            # In the modes HARD and LOG an infinite part is missing: at sigma = 0 the distance,
            # unless the nearest row is hit; with weighting "log" that of a hit.
            hard = mode == HARD
            beyond = tl.where(hard & (b_key > 0.0), -0.5 * (b_key / b_sigma) / b_sigma, 0.0)
            hit = (mode == LOG) & (b_key == 0.0)
            b_lz = tl.where(none, -inf, tl.where(hit, inf, lse + beyond))
            tl.store(log_z + to, tl.where(lost, nan, b_lz))
            b_ml = tl.where(hit, inf, logit + beyond)
            tl.store(mean_logit + to, tl.where(unknown, nan, b_ml))
            tl.store(mean_bias + to, tl.where(unknown, nan, b_sb / s_safe))
            tl.store(weight_sq + to, tl.where(unknown, nan, b_sq / (s_safe * s_safe)))
    else:
        b_c = tl.load(center + o_d, mask=o_d < D, other=0.0)
        b_acc = total_acc * scale + s_acc * (shift - b_c)
        b_acc = tl.where(lost, nan, b_acc + (b_near + s_near * (b_x - b_alpha * b_c)) * per)
        tl.store(acc + to * D + o_d, b_acc.to(tl.float32), mask=o_d < D)
        b_pull = tl.where(lost, nan, b_pull)
        tl.store(residual + to * D + o_d, b_pull.to(tl.float32), mask=o_d < D)
        if i_d == 0:
            tl.store(key + to, tl.where(lost, 0.0, tl.where(none, inf, b_key)))
            tl.store(m + to, tl.where(lost, 0.0, tl.where(none, -inf, b_m)))
            tl.store(s + to, tl.where(lost, nan, b_s))
            tl.store(s_v + to, tl.where(lost, nan, b_sv))
            tl.store(s_bias + to, tl.where(lost, nan, b_sb))
            tl.store(s_sq + to, tl.where(lost, nan, b_sq))


_OUT = {True: Sums._fields, False: State._fields[:-1]}  # what a variant writes: all but the center


def finish_variant(normalised: bool) -> Variant:
    """normalised: whether it writes calls.Sums; else calls.State."""
    out = _OUT[normalised]
    other = [name for name in _OUT[not normalised] if name != "residual"]
    narrow = ("mean", "acc", "residual")
    wide = ("states", "near_s", "alpha", "table", "sigma", "temperature", "scale_shift", "center")
    return Variant(
        name=f"finish {'sums' if normalised else 'state'}",
        kernel=finish_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "accs": "*fp32", "pulls": "*fp32", "x": "*fp32",
            **{name: "*fp32" if name in narrow else "*fp64" for name in out},
            "total": "i32", "b0": "i32", "B": "i32", "D": "i32", "n_states": "i32",
            "n_accs": "i32", "n_pulls": "i32", "has_near": "i32", "offset": "fp32",
        },
        constexprs={
            **dict.fromkeys(other), "NORMALISED": normalised, "PARTS": 16, "BLOCK_D": 128,
        },
        aligned=(*wide, "accs", "pulls", "x", *out, "D"),
    )  # fmt: skip


def variants() -> list[Variant]:
    return [finish_variant(normalised) for normalised in (True, False)]


class Parts(NamedTuple):
    """What a sweep found for a block of queries, not joined yet.

    states: [n_states, STATE, b] float64. accs: [n_accs, b, D] float32, sums of weights times rows
    as they enter products. There are as many of both, or one state for all accumulators. Both are
    flat and may be longer. pulls: [n_pulls, b, D] float32, of the last parts: the sums of weights
    times alpha y - x. near_s: [b] float64, the weights of rows that only pulls has.
    """

    states: Tensor
    n_states: int
    accs: Tensor
    n_accs: int
    pulls: Tensor | None = None
    n_pulls: int = 0
    near_s: Tensor | None = None


def empty_sums(q: KernelQueries) -> Sums:
    """Where the normalised results go; mean and residual are float32."""
    b, device = q.x.shape[0], q.x.device
    columns = [torch.empty(b, dtype=torch.float64, device=device) for _ in range(4)]
    # Apart: results of an operation may not share memory.
    mean, residual = (torch.empty(q.x.shape, dtype=torch.float32, device=device) for _ in range(2))
    return Sums._make([mean, *columns, residual])


def empty_state(q: KernelQueries) -> State:
    """Where a state goes, about the rows' center; the accumulator is float32."""
    b, device = q.x.shape[0], q.x.device
    columns = [torch.empty(b, dtype=torch.float64, device=device) for _ in range(6)]
    acc, residual = (torch.empty(q.x.shape, dtype=torch.float32, device=device) for _ in range(2))
    return State._make([*columns, acc, residual, q.center])


def launch(q: KernelQueries, b0: int, b: int, parts: Parts, into: Sums | State) -> None:
    """Join the parts of the queries b0 .. b0 + b, and write their results."""
    total, d = q.x.shape
    variant = finish_variant(isinstance(into, Sums))
    out = {name: value for name, value in into._asdict().items() if name != "center"}
    variant.launch(
        (b, -(-d // variant.constexprs["BLOCK_D"])), q.x.device, states=parts.states,
        accs=parts.accs, pulls=parts.accs if parts.pulls is None else parts.pulls, x=q.x,
        alpha=q.alpha, n_pulls=parts.n_pulls, has_near=int(parts.near_s is not None),
        near_s=parts.states if parts.near_s is None else parts.near_s, table=q.table,
        sigma=q.sigma, temperature=q.temperature,
        scale_shift=q.scale_shift, center=q.center, total=total, b0=b0, B=b, D=d,
        n_states=parts.n_states, n_accs=parts.n_accs, offset=q.operand.offset, **out,
    )  # fmt: skip
