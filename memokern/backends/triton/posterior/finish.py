"""The ends of a sweep: what centres the rows where their owner has not, and parts to results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.common import (
    HARD,
    KEY,
    LOG,
    MODE,
    SB,
    ST,
    SW2,
    M,
    S,
)
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.backends.triton.posterior.queries import Queries

_BLOCK_D = 128


@triton.jit
def sq_norms_kernel(
    rows,  # [N, D]
    center,  # [D]
    numbers,  # [2] scale, shift
    sq_norms,  # [N] out
    N, D, stride_n,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|y - center|^2 in float64. One program owns BLOCK_N rows and streams their features."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = o_n < N
    scale, shift = tl.load(numbers), tl.load(numbers + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (o_d < D)[None, :]
        b_y = tl.load(rows + o_n[:, None] * stride_n + o_d[None, :], mask=mask, other=0)
        b_c = tl.load(center + o_d, mask=o_d < D, other=0.0)
        b_y = b_y.to(tl.float64) * scale + shift - b_c[None, :]
        acc += tl.where(mask, b_y * b_y, 0.0)
    tl.store(sq_norms + o_n, tl.sum(acc, 1), mask=mask_n)


@triton.jit
def finish_kernel(
    state,  # [states, STATE, B]
    acc,  # [parts, B, D]
    table,  # [NUMBERS, total]
    sigma, temperature,  # [total]
    numbers,  # [2] scale, shift
    mean,  # [total, D] out
    log_z, mean_logit, mean_bias, weight_sq,  # [total] out
    total, b0, B, D, states, parts, offset,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Parts joined, by the monoid, to the results. One program owns a query and BLOCK_D features.
    states: as many as parts, or 1 where all parts are relative to the same m."""
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_s = state + i_b
    inf = float("inf")
    step = tl.cast(B, tl.int64) * 6
    # PARTS at a time, since there may be thousands.
    o_p = tl.arange(0, PARTS)
    least = tl.full([PARTS], inf, tl.float64)
    for i in range(0, states, PARTS):
        at = p_s + (i + o_p) * step
        least = tl.minimum(least, tl.load(at + KEY * B, mask=i + o_p < states, other=inf))
    key = tl.min(least, 0)
    most = tl.full([PARTS], -inf, tl.float64)
    for i in range(0, states, PARTS):
        at, mask = p_s + (i + o_p) * step, i + o_p < states
        counts = (tl.load(at + KEY * B, mask=mask, other=inf) == key) & (key < inf)
        most = tl.maximum(most, tl.where(counts, tl.load(at + M * B, mask=mask, other=-inf), -inf))
    m = tl.max(most, 0)
    m = tl.where(m == -inf, 0.0, m)
    z_s = tl.zeros([PARTS], tl.float64)
    z_st, z_sb, z_sw = z_s, z_s, z_s
    total_acc = tl.zeros([BLOCK_D], tl.float64)
    for i in range(0, parts, PARTS):
        at = p_s + tl.minimum(i + o_p, states - 1) * step
        counts = (tl.load(at + KEY * B) == key) & (key < inf) & (i + o_p < parts)
        gap = tl.where(counts, tl.load(at + M * B), m) - m
        f = tl.where(counts, tl.exp(gap), 0.0)
        p_a = acc + ((i + o_p).to(tl.int64) * B + i_b)[:, None] * D + o_d[None, :]
        mask = (f > 0.0)[:, None] & (o_d < D)[None, :]
        part = tl.load(p_a, mask=mask, other=0.0).to(tl.float64)
        total_acc += tl.sum(part * f[:, None], 0)
        # Of a state that all parts share, once.
        f = tl.where(i + o_p < states, f, 0.0)
        s_i = tl.load(at + S * B)
        z_s += f * s_i
        z_st += f * (tl.load(at + ST * B) + s_i * gap)
        z_sb += f * tl.load(at + SB * B)
        z_sw += f * f * tl.load(at + SW2 * B)
    s, st, sb, sw2 = tl.sum(z_s, 0), tl.sum(z_st, 0), tl.sum(z_sb, 0), tl.sum(z_sw, 0)

    to = b0 + i_b
    mode = tl.load(table + MODE * total + to).to(tl.int32)
    scale, shift = tl.load(numbers), tl.load(numbers + 1) - offset * tl.load(numbers)
    lost = (s == 0.0) | (s != s)
    nan = float("nan")
    b_mean = tl.where(lost, nan, total_acc / tl.where(lost, 1.0, s) * scale + shift)
    tl.store(mean + to * D + o_d, b_mean.to(tl.float32), mask=o_d < D)
    if i_d == 0:
        b_t, b_sigma = tl.load(temperature + to), tl.load(sigma + to)
        s_safe = tl.where(lost, 1.0, s)
        lse = b_t * (m + tl.log(s_safe))
        logit = b_t * (m + st / s_safe)
        # At a limit the logits lack the distance.
        hard = mode == HARD
        beyond = tl.where(hard & (key > 0.0), -0.5 * (key / b_sigma) / b_sigma, 0.0)
        hit = (mode == LOG) & (key == 0.0)
        tl.store(log_z + to, tl.where(lost, nan, tl.where(hit, inf, lse + beyond)))
        tl.store(mean_logit + to, tl.where(lost, nan, tl.where(hit, inf, logit + beyond)))
        tl.store(mean_bias + to, tl.where(lost, nan, sb / s_safe))
        tl.store(weight_sq + to, tl.where(lost, nan, sw2 / (s_safe * s_safe)))


def sq_norms_variant(rows: torch.dtype) -> Variant:
    return Variant(
        name=f"sq_norms {row_name(rows)}",
        kernel=sq_norms_kernel,
        signature={
            "rows": POINTERS[rows], "center": "*fp64", "numbers": "*fp64", "sq_norms": "*fp64",
            "N": "i32", "D": "i32", "stride_n": "i64",
        },
        constexprs={"BLOCK_N": 32, "BLOCK_D": 64},
        loose={"registers": 255},
        aligned=("rows", "center", "numbers", "sq_norms", "D", "stride_n"),
    )  # fmt: skip


def finish_variant() -> Variant:
    return Variant(
        name="finish",
        kernel=finish_kernel,
        signature={
            "state": "*fp64", "acc": "*fp32", "table": "*fp64", "sigma": "*fp64",
            "temperature": "*fp64", "numbers": "*fp64", "mean": "*fp32", "log_z": "*fp64",
            "mean_logit": "*fp64", "mean_bias": "*fp64", "weight_sq": "*fp64", "total": "i32",
            "b0": "i32", "B": "i32", "D": "i32", "states": "i32", "parts": "i32", "offset": "fp32",
        },
        constexprs={"PARTS": 16, "BLOCK_D": _BLOCK_D},
        aligned=("state", "acc", "table", "sigma", "temperature", "numbers", "mean", "log_z",
                 "mean_logit", "mean_bias", "weight_sq", "D"),
    )  # fmt: skip


def variants() -> list[Variant]:
    return [finish_variant(), *(sq_norms_variant(t) for t in ROW_TYPES)]


def row_norms(rows: Tensor, center: Tensor, numbers: Tensor) -> Tensor:
    """|y_n - center|^2 [N] float64."""
    n, d = rows.shape
    out = torch.empty(n, dtype=torch.float64, device=rows.device)
    v = sq_norms_variant(rows.dtype)
    v.launch(
        (-(-n // v.constexprs["BLOCK_N"]),), rows.device, rows=rows, center=center, numbers=numbers,
        sq_norms=out, N=n, D=d, stride_n=rows.stride(0) if n > 1 else d,
    )  # fmt: skip
    return out


def launch(
    q: Queries, b0: int, b: int, state: Tensor, states: int, acc: Tensor, parts: int,
    out: list[Tensor],
) -> None:  # fmt: skip
    """Write the results of the queries b0 .. b0 + b to out: mean, log_z, mean_logit, ..."""
    total, d = q.x.shape
    v = finish_variant()
    v.launch(
        (b, -(-d // v.constexprs["BLOCK_D"])), q.x.device, state=state, acc=acc, table=q.table,
        sigma=q.sigma, temperature=q.temperature, numbers=q.numbers, mean=out[0], log_z=out[1],
        mean_logit=out[2], mean_bias=out[3], weight_sq=out[4], total=total, b0=b0, B=b, D=d,
        states=states, parts=parts, offset=q.how.offset,
    )  # fmt: skip
