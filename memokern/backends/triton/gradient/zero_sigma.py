"""Queries at sigma = 0 in the backward sweep, and exact hits with weighting "log".

Only the nearest rows have weight there, and only the bias and the temperature still move it. Both
kernels end at once for all other queries. They are launched where there is a bias, or a gradient
for the rows is wanted: without either there is nothing that moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.exactness import exact_differences
from memokern.backends.triton.core.operands import values_of
from memokern.backends.triton.core.query_table import HARD, LOST, MODE
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.backends.triton.gradient.coefficients import TEMP


@triton.jit
def tie_sums_kernel(
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [TABLE, B]
    x,  # [B, D]
    alpha, temperature,  # [B]
    scale_shift,  # [2]
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    ties,  # [3, B] out
    B, N, D, stride_n, has_bias,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The least |x - alpha y|^2, the largest bias m of the rows that share it, and the sum of their
    e^((b - m) / T). The distance is -1 for a query that these kernels have nothing to do with. One
    program owns a query and streams every row."""
    i_b = tl.program_id(0).to(tl.int64)
    inf = float("inf")
    mode = tl.load(table + MODE * B + i_b).to(tl.int32)
    tl.store(ties + i_b, -1.0)
    if (mode == HARD) | ((mode != LOST) & (tl.load(stats + i_b) == inf)):
        T, scale, shift = tl.load(temperature + i_b), tl.load(scale_shift), tl.load(scale_shift + 1)
        alphas = tl.zeros([BLOCK_N], tl.float64) + tl.load(alpha + i_b)
        o_x = tl.zeros([BLOCK_N], tl.int64) + i_b * D
        least = tl.full([BLOCK_N], inf, tl.float64)
        m = tl.full([BLOCK_N], -inf, tl.float64)
        z = tl.zeros([BLOCK_N], tl.float64)
        # Each lane finds the least distance of its rows, and the sum of e^((b - m) / T) of those
        # that share it.
        for n0 in range(0, N, BLOCK_N):
            o_n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask = o_n < N
            b_b = tl.load(bias + o_n, mask=mask & (has_bias != 0), other=0.0)
            mask = mask & (b_b != -inf)
            r2 = exact_differences(
                x, rows, o_x, o_n * stride_n, alphas, scale, shift, mask, D, BLOCK_N, BLOCK_D
            )
            r2 = tl.where(mask, r2, inf)
            nearer, same = r2 < least, (r2 == least) & mask
            top = tl.maximum(m, b_b)
            sum_same = z * tl.exp((m - top) / T) + tl.exp((b_b - top) / T)
            z = tl.where(nearer, 1.0, tl.where(same, sum_same, z))
            m = tl.where(nearer, b_b, tl.where(same, top, m))
            least = tl.minimum(least, r2)
        best = tl.min(least, 0)
        m_best = tl.max(tl.where(least == best, m, -inf), 0)
        gap = tl.where(least == best, (m - m_best) / T, 0.0)
        tl.store(ties + i_b, best)
        tl.store(ties + B + i_b, m_best)
        tl.store(ties + 2 * B + i_b, tl.sum(tl.where(least == best, z * tl.exp(gap), 0.0), 0))


@triton.jit
def tie_gradients_kernel(
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [TABLE, B]
    x, mean, grad_mean,  # [B, D]
    alpha, temperature,  # [B]
    scale_shift,  # [2]
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    grads,  # [4, B] of these
    ties,  # [3, B], from tie_sums_kernel
    sums,  # [SUMS, b] in and out, unless for_rows
    pairs,  # [b, n] out: the pair's part of the bias's gradient; for_rows: its weight
    B, b0, b, n0, n, D, stride_n, has_bias, for_rows,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The nearest rows of such a query, where `coefficients_kernel` has written zeros. A query that
    is lost makes the first number of the bias's gradient NaN. One program owns a query and streams
    the rows of the chunk."""
    i_b = tl.program_id(0).to(tl.int64)
    to = b0 + i_b
    inf = float("inf")
    mode = tl.load(table + MODE * B + to).to(tl.int32)
    tl.store(pairs + i_b * n, float("nan"), mask=(mode == LOST) & (n0 == 0) & (for_rows == 0))
    best = tl.load(ties + to)
    if best >= 0.0:
        m, z = tl.load(ties + B + to), tl.load(ties + 2 * B + to)
        Eb, S = tl.load(stats + 2 * B + to), tl.load(stats + 3 * B + to)
        T, scale, shift = tl.load(temperature + to), tl.load(scale_shift), tl.load(scale_shift + 1)
        alphas = tl.zeros([BLOCK_N], tl.float64) + tl.load(alpha + to)
        o_x = tl.zeros([BLOCK_N], tl.int64) + to * D
        # At sigma = 0 where the query hits a row; at a sigma that is taken for 0 everywhere.
        finite = (mode == HARD) & (tl.abs(tl.load(stats + to)) < inf)
        g_l = tl.where(finite, tl.load(grads + to), 0.0)
        g_e = tl.where(finite, tl.load(grads + B + to), 0.0)
        g_b, g_s = tl.load(grads + 2 * B + to), tl.load(grads + 3 * B + to)
        temp = tl.zeros([BLOCK_N], tl.float64)
        for j in range(0, n, BLOCK_N):
            o_j = (j + tl.arange(0, BLOCK_N)).to(tl.int64)
            o_n, mask = n0 + o_j, o_j < n
            b_b = tl.load(bias + o_n, mask=mask & (has_bias != 0), other=0.0)
            mask = mask & (b_b != -inf)
            r2 = exact_differences(
                x, rows, o_x, o_n * stride_n, alphas, scale, shift, mask, D, BLOCK_N, BLOCK_D
            )
            tie = mask & (r2 == best)
            gy = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
            for d in range(0, D, BLOCK_D):
                o_d = d + tl.arange(0, BLOCK_D)
                m_d = tie[:, None] & (o_d < D)[None, :]
                v_g = tl.load(grad_mean + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
                v_m = tl.load(mean + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
                v_y = tl.load(rows + o_n[:, None] * stride_n + o_d[None, :], mask=m_d, other=0)
                v_y = values_of(v_y, scale, shift) - v_m[None, :]
                gy += tl.where(m_d, v_g[None, :] * v_y, 0.0)
            w = tl.where(tie, tl.exp(tl.where(tie, b_b - m, 0.0) / T) / z, 0.0)
            off = tl.where(tie, b_b - Eb, 0.0)
            h = (tl.sum(gy, 1) + (g_e + g_b) * off + 2.0 * g_s * (w - S)) / T
            temp += w * off * h
            out = tl.where(for_rows != 0, w, w * (g_l + g_e + g_b + h))
            tl.store(pairs + i_b * n + o_j, out.to(tl.float32), mask=tie)
        p_z = sums + TEMP * b + i_b
        tl.store(p_z, tl.load(p_z) + tl.sum(temp, 0), mask=for_rows == 0)


def tie_sums_variant(rows: torch.dtype) -> Variant:
    wide = ("bias", "table", "alpha", "temperature", "scale_shift", "stats", "ties")
    return Variant(
        name=f"tie_sums {row_name(rows)}",
        kernel=tie_sums_kernel,
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


def tie_gradients_variant(rows: torch.dtype) -> Variant:
    wide = (
        "bias",
        "table",
        "alpha",
        "temperature",
        "scale_shift",
        "stats",
        "grads",
        "ties",
        "sums",
    )
    return Variant(
        name=f"tie_gradients {row_name(rows)}",
        kernel=tie_gradients_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "rows": POINTERS[rows], "x": "*fp32",
            "mean": "*fp32", "grad_mean": "*fp32", "pairs": "*fp32", "B": "i32", "b0": "i32",
            "b": "i32", "n0": "i64", "n": "i32", "D": "i32", "stride_n": "i64",
            "has_bias": "i32", "for_rows": "i32",
        },
        constexprs={"BLOCK_N": 64, "BLOCK_D": 32},
        num_warps=8,
        registers=128,
        aligned=("bias", "rows", "x", "mean", "grad_mean", "pairs", "n", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types."""
    return [make(t) for make in (tie_sums_variant, tie_gradients_variant) for t in ROW_TYPES]
