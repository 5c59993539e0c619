"""Queries in the backward sweep whose rows are so far, for their noise, that log_z has no digits
left for weights: at |x - y| = 10^7 sigma its last place is a hundredth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.exactness import exact_differences
from memokern.backends.triton.core.query_table import MODE, SOFT
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name

# log_z / T beyond which the weights e^((l - log_z) / T) would be off by its rounding, 10^-7.
FAR = tl.constexpr(1e9)


@triton.jit
def far_sums_kernel(
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [TABLE, B]
    x,  # [B, D]
    sigma, alpha, temperature,  # [B]
    scale_shift,  # [2]
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    far,  # [5, B] out
    B, N, D, stride_n, has_bias,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a query that is far the least |x - alpha y|^2 of rows that have weight, and `stats` anew,
    with -r^2 / (2 sigma^2) of that row left out of every logit; of all others 0 and `stats`. One
    program owns a query and, where it is far, streams every row twice: for the least distance, then
    for the sums, of which each lane has those of its rows: a State."""
    i_b = tl.program_id(0).to(tl.int64)
    inf = float("inf")
    inv_t = 1.0 / tl.load(temperature + i_b)
    log_z = tl.load(stats + i_b)
    tl.store(far + i_b, 0.0)
    tl.store(far + B + i_b, log_z)
    for i_s in tl.static_range(1, 4):
        tl.store(far + (i_s + 1) * B + i_b, tl.load(stats + i_s * B + i_b))
    soft = tl.load(table + MODE * B + i_b).to(tl.int32) == SOFT
    if soft & (tl.abs(log_z) * inv_t > FAR) & (tl.abs(log_z) < inf):
        b_sigma, scale, shift = tl.load(sigma + i_b), tl.load(scale_shift), tl.load(scale_shift + 1)
        alphas = tl.zeros([BLOCK_N], tl.float64) + tl.load(alpha + i_b)
        o_x = tl.zeros([BLOCK_N], tl.int64) + i_b * D
        least = tl.full([BLOCK_N], inf, tl.float64)
        m = tl.full([BLOCK_N], -inf, tl.float64)
        s = tl.zeros([BLOCK_N], tl.float64)
        s_v, s_bias, s_sq = s, s, s
        best = inv_t * 0.0
        for i in range(0, 2 * tl.cdiv(N, BLOCK_N)):
            second = i >= tl.cdiv(N, BLOCK_N)
            o_n = ((i % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask = o_n < N
            b_b = tl.load(bias + o_n, mask=mask & (has_bias != 0), other=0.0)
            mask = mask & (b_b != -inf)
            r2 = exact_differences(
                x, rows, o_x, o_n * stride_n, alphas, scale, shift, mask, D, BLOCK_N, BLOCK_D
            )
            if second:
                v = (-0.5 * ((r2 - best) / b_sigma) / b_sigma + b_b) * inv_t
                v = tl.where(mask, v, -inf)
                top = tl.maximum(m, v)
                safe = tl.where(top == -inf, 0.0, top)
                gap_m, gap_v = tl.where(m == -inf, 0.0, m - safe), tl.where(mask, v - safe, 0.0)
                f, w = tl.exp(gap_m), tl.where(mask, tl.exp(gap_v), 0.0)
                s_v = f * (s_v + s * gap_m) + w * gap_v
                s = f * s + w
                s_bias = f * s_bias + tl.where(mask, w * b_b, 0.0)
                s_sq = f * f * s_sq + w * w
                m = top
            else:
                least = tl.minimum(least, tl.where(mask, r2, inf))
                best = tl.min(least, 0)
        m_best = tl.max(m, 0)
        gap = tl.where(s > 0.0, m - m_best, 0.0)
        f = tl.where(s > 0.0, tl.exp(gap), 0.0)
        z, z_v = tl.sum(f * s, 0), tl.sum(f * (s_v + s * gap), 0)
        tl.store(far + i_b, best)
        tl.store(far + B + i_b, (m_best + tl.log(z)) / inv_t)
        tl.store(far + 2 * B + i_b, (m_best + z_v / z) / inv_t)
        tl.store(far + 3 * B + i_b, tl.sum(f * s_bias, 0) / z)
        tl.store(far + 4 * B + i_b, tl.sum(f * f * s_sq, 0) / z / z)


def variant(rows: torch.dtype) -> Variant:
    """For rows of a type."""
    wide = (
        "bias", "table", "sigma", "alpha", "temperature", "scale_shift", "stats", "far",
    )  # fmt: skip
    return Variant(
        name=f"far_sums {row_name(rows)}",
        kernel=far_sums_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "rows": POINTERS[rows], "x": "*fp32", "B": "i32",
            "N": "i32", "D": "i32", "stride_n": "i64", "has_bias": "i32",
        },
        constexprs={"BLOCK_N": 64, "BLOCK_D": 32},
        num_warps=8,
        registers=128,
        unaligned_fields={"registers": 255},
        aligned=("bias", "rows", "x", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types."""
    return [variant(t) for t in ROW_TYPES]
