"""The ends of the backward sweep: sums over queries, sums to gradients, and queries at a limit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.kernels.backward import DRIFT, QA, QC, QL, TEMP, WA, W
from memokern.kernels.common import HARD, LOST, MODE, SOFT, exact_differences
from memokern.kernels.variant import POINTERS, ROW_TYPES, Variant, row_name


@triton.jit
def columns_kernel(
    moved,  # [b, n]
    grad_bias,  # [N] in and out
    b, n0, n,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_bias += the sum of moved over the queries. One program owns BLOCK_N rows, so that the
    order of the sums is always the same."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float64)
    for i in range(0, b, BLOCK_B):
        o_b = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (o_b < b)[:, None] & (o_n < n)[None, :]
        part = tl.load(moved + o_b[:, None] * n + o_n[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    old = tl.load(grad_bias + n0 + o_n, mask=o_n < n, other=0.0)
    tl.store(grad_bias + n0 + o_n, old + total, mask=o_n < n)


@triton.jit
def grads_kernel(
    sums,  # [SUMS, b]
    acc,  # [parts, b, D] sum of q c u
    near,  # [b, D]
    table,  # [NUMBERS, B]
    x, mean,  # [B, D]
    sigma, alpha, temperature,  # [B]
    center,  # [D]
    numbers,  # [2] scale, shift
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    grads,  # [4, B] of these
    grad_x,  # [B, D] out
    grad_sigma, grad_alpha, grad_temperature,  # [B] out
    B, b0, b, D, parts, offset,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums to gradients. One program owns a query and streams its features."""
    i_b = tl.program_id(0).to(tl.int64)
    to = b0 + i_b
    mode = tl.load(table + MODE * B + to).to(tl.int32)
    soft = mode == SOFT
    log_z, E, Eb = tl.load(stats + to), tl.load(stats + B + to), tl.load(stats + 2 * B + to)
    lost = mode == LOST
    moves = (lost | (mode == HARD) | (log_z == float("inf"))) == 0
    still = tl.where(lost, float("nan"), 0.0)
    scale, shift = tl.load(numbers), tl.load(numbers + 1) - offset * tl.load(numbers)
    b_sigma, b_alpha = tl.load(sigma + to), tl.load(alpha + to)
    p_z = sums + i_b
    w, qc = tl.load(p_z + W * b), tl.load(p_z + QC * b)
    # Zero but for the rounding of the mean and of the weights.
    drift = tl.where(soft & (w > 0.0), tl.load(p_z + DRIFT * b), 0.0)
    drifts = tl.where(w > 0.0, drift / w, 0.0)
    unit = tl.where(soft, 1.0 / b_sigma / b_sigma, 1.0)
    along = tl.zeros([BLOCK_D], tl.float64)  # <center, sum q c (x - alpha y)>
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = o_d < D
        sum_u = tl.zeros([BLOCK_D], tl.float64)
        for i in range(0, parts):
            at = (tl.cast(i, tl.int64) * b + i_b) * D + o_d
            sum_u += tl.load(acc + at, mask=mask, other=0.0).to(tl.float64)
        c = tl.load(center + o_d, mask=mask, other=0.0)
        b_x = tl.load(x + to * D + o_d, mask=mask, other=0.0).to(tl.float64)
        b_mean = tl.load(mean + to * D + o_d, mask=mask, other=0.0).to(tl.float64)
        g = b_alpha * (scale * sum_u + (shift - c) * qc - drift * (b_mean - c))
        g -= (b_x - b_alpha * c) * (qc - drift)
        g += tl.load(near + i_b * D + o_d, mask=mask, other=0.0).to(tl.float64)
        along -= tl.where(mask, c * g, 0.0)
        tl.store(grad_x + to * D + o_d, tl.where(moves, g * unit, still).to(tl.float32), mask=mask)
    ql = tl.load(p_z + QL * b) - drift * (E - Eb)
    qa = tl.load(p_z + QA * b) - drifts * tl.load(p_z + WA * b) + tl.sum(along, 0)
    T = tl.load(temperature + to)
    by_t = tl.load(grads + to) * (log_z - E) / T - tl.load(p_z + TEMP * b) / T
    tl.store(grad_sigma + to, tl.where(moves, tl.where(soft, -2.0 / b_sigma * ql, 0.0), still))
    tl.store(grad_alpha + to, tl.where(moves, qa * unit, still))
    tl.store(grad_temperature + to, tl.where(moves, by_t, still))


@triton.jit
def limit_kernel(
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [NUMBERS, B]
    x, mean, grad_mean,  # [B, D]
    alpha, temperature,  # [B]
    numbers,  # [2] scale, shift
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    grads,  # [4, B] of these
    grad_temperature,  # [B] in and out
    grad_bias,  # [N] in and out, if has_bias
    B, N, D, stride_n, has_bias,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A query at its limit (sigma = 0, or an exact hit of the log kernel): only the nearest rows
    have weight, and only the bias and the temperature still move it. One program owns a query, and
    ends at once if it is not at a limit; else it looks at every row, three times. Without a bias
    only a finite log_z moves. Queries with a row in common add to its bias in no fixed order."""
    i_b = tl.program_id(0).to(tl.int64)
    inf = float("inf")
    mode = tl.load(table + MODE * B + i_b).to(tl.int32)
    log_z, Eb = tl.load(stats + i_b), tl.load(stats + 2 * B + i_b)
    S = tl.load(stats + 3 * B + i_b)
    tl.atomic_add(grad_bias, float("nan"), mask=(mode == LOST) & (has_bias != 0))
    limit = (mode == HARD) | ((mode != LOST) & (log_z == inf))
    limit = limit & ((has_bias != 0) | ((log_z > -inf) & (log_z < inf)))
    if limit:
        T, scale, shift = tl.load(temperature + i_b), tl.load(numbers), tl.load(numbers + 1)
        alphas = tl.zeros([BLOCK_N], tl.float64) + tl.load(alpha + i_b)
        o_x = tl.zeros([BLOCK_N], tl.int64) + i_b * D
        least = tl.full([BLOCK_N], inf, tl.float64)
        m = tl.full([BLOCK_N], -inf, tl.float64)
        z = tl.zeros([BLOCK_N], tl.float64)
        # Each lane finds the least distance of its rows, and of these the sum of e^((b - m) / T).
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
        z_best = tl.sum(tl.where(least == best, z * tl.exp(gap), 0.0), 0)
        finite = (mode == HARD) & (best == 0.0)
        g_l = tl.where(finite, tl.load(grads + i_b), 0.0)
        g_e = tl.where(finite, tl.load(grads + B + i_b), 0.0)
        g_b, g_s = tl.load(grads + 2 * B + i_b), tl.load(grads + 3 * B + i_b)
        temp = tl.zeros([BLOCK_N], tl.float64)
        for n0 in range(0, N, BLOCK_N):
            o_n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask = o_n < N
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
                v_g = tl.load(grad_mean + i_b * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
                v_m = tl.load(mean + i_b * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
                v_y = tl.load(rows + o_n[:, None] * stride_n + o_d[None, :], mask=m_d, other=0)
                v_y = v_y.to(tl.float64) * scale + shift
                gy += tl.where(m_d, v_g[None, :] * (v_y - v_m[None, :]), 0.0)
            w = tl.where(tie, tl.exp((tl.where(tie, b_b - m_best, 0.0)) / T) / z_best, 0.0)
            off = tl.where(tie, b_b - Eb, 0.0)
            h = (tl.sum(gy, 1) + (g_e + g_b) * off + 2.0 * g_s * (w - S)) / T
            temp -= w * off * h / T
            moved = w * (g_l + g_e + g_b + h)
            tl.atomic_add(grad_bias + o_n, moved, mask=tie & (has_bias != 0))
        own = tl.where(finite, g_l * (log_z - Eb) / T, 0.0)
        tl.store(grad_temperature + i_b, own + tl.sum(temp, 0))


def columns_variant() -> Variant:
    return Variant(
        name="columns",
        kernel=columns_kernel,
        signature={"moved": "*fp32", "grad_bias": "*fp64", "b": "i32", "n0": "i64", "n": "i32"},
        constexprs={"BLOCK_B": 32, "BLOCK_N": 64},
        aligned=("moved", "grad_bias", "n0", "n"),
    )


def grads_variant() -> Variant:
    wide = ("sums", "table", "sigma", "alpha", "temperature", "center", "numbers", "stats", "grads",
            "grad_sigma", "grad_alpha", "grad_temperature")  # fmt: skip
    return Variant(
        name="grads",
        kernel=grads_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "acc": "*fp32", "near": "*fp32", "x": "*fp32",
            "mean": "*fp32", "grad_x": "*fp32", "B": "i32", "b0": "i32", "b": "i32", "D": "i32",
            "parts": "i32", "offset": "fp32",
        },
        constexprs={"BLOCK_D": 512},
        aligned=("acc", "near", "x", "mean", "grad_x", "center", "D"),
    )  # fmt: skip


def limit_variant(rows: torch.dtype) -> Variant:
    wide = ("bias", "table", "alpha", "temperature", "numbers", "stats", "grads",
            "grad_temperature", "grad_bias")  # fmt: skip
    return Variant(
        name=f"limit {row_name(rows)}",
        kernel=limit_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "rows": POINTERS[rows], "x": "*fp32",
            "mean": "*fp32", "grad_mean": "*fp32", "B": "i32", "N": "i32", "D": "i32",
            "stride_n": "i64", "has_bias": "i32",
        },
        constexprs={"BLOCK_N": 64, "BLOCK_D": 32},
        num_warps=8,
        registers=128,
        aligned=("bias", "rows", "x", "mean", "grad_mean", "grad_bias", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    return [columns_variant(), grads_variant(), *(limit_variant(t) for t in ROW_TYPES)]
