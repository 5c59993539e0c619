"""The last steps of the backward sweep: the sum over the queries, which is the bias's gradient, and
the gradients of a query from its sums over the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from memokern.backends.triton.core.query_table import HARD, LOST, MODE, SOFT
from memokern.backends.triton.core.variant import Variant
from memokern.backends.triton.gradient.coefficients import DRIFT, QA, QC, QL, TEMP, WA, W


@triton.jit
def bias_gradient_kernel(
    pairs,  # [b, n]
    grad_bias,  # [N] in and out
    b, n0, n,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_bias += the sum over the queries of `pairs`, each pair's part. One program owns BLOCK_N
    rows and streams the queries, so that the order of the sums is always the same."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float64)
    for i in range(0, b, BLOCK_B):
        o_b = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (o_b < b)[:, None] & (o_n < n)[None, :]
        part = tl.load(pairs + o_b[:, None] * n + o_n[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    old = tl.load(grad_bias + n0 + o_n, mask=o_n < n, other=0.0)
    tl.store(grad_bias + n0 + o_n, old + total, mask=o_n < n)


@triton.jit
def query_gradients_kernel(
    sums,  # [SUMS, b]
    acc,  # [parts, b, D] sum of q c u
    near,  # [b, D]
    table,  # [TABLE, B]
    x, mean,  # [B, D]
    sigma, alpha, temperature,  # [B]
    center,  # [D]
    scale_shift,  # [2]
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    far,  # [5, B] from far_sums_kernel
    grads,  # [4, B] of these
    grad_x,  # [B, D] out
    grad_sigma, grad_alpha, grad_temperature,  # [B] out
    B, b0, b, D, parts, offset,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a query from its sums. One program owns a query and streams its features."""
    i_b = tl.program_id(0).to(tl.int64)
    to = b0 + i_b
    mode = tl.load(table + MODE * B + to).to(tl.int32)
    soft = mode == SOFT
    log_z, E, Eb = tl.load(stats + to), tl.load(stats + B + to), tl.load(stats + 2 * B + to)
    lost = mode == LOST
    inf = float("inf")
    moves = (lost | (mode == HARD) | (log_z == inf)) == 0
    still = tl.where(lost, float("nan"), 0.0)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1) - offset * tl.load(scale_shift)
    b_sigma, b_alpha = tl.load(sigma + to), tl.load(alpha + to)
    p_z = sums + i_b
    w, qc = tl.load(p_z + W * b), tl.load(p_z + QC * b)
    # This would be zero without the rounding of the mean and of the weights.
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
    infinite = (log_z == inf) | (log_z == -inf)
    gap = tl.load(far + B + to) - tl.load(far + 2 * B + to)  # log_z - E
    by_t = tl.where(infinite, 0.0, tl.load(grads + to) * gap / T)
    by_t -= tl.load(p_z + TEMP * b) / T
    tl.store(grad_sigma + to, tl.where(moves, tl.where(soft, -2.0 / b_sigma * ql, 0.0), still))
    tl.store(grad_alpha + to, tl.where(moves, qa * unit, still))
    tl.store(grad_temperature + to, tl.where(lost, still, by_t))


def bias_gradient_variant() -> Variant:
    return Variant(
        name="bias_gradient",
        kernel=bias_gradient_kernel,
        signature={"pairs": "*fp32", "grad_bias": "*fp64", "b": "i32", "n0": "i64", "n": "i32"},
        constexprs={"BLOCK_B": 32, "BLOCK_N": 64},
        aligned=("pairs", "grad_bias", "n0", "n"),
    )


def query_gradients_variant() -> Variant:
    wide = ("sums", "table", "sigma", "alpha", "temperature", "center", "scale_shift", "stats",
            "far", "grads", "grad_sigma", "grad_alpha", "grad_temperature")  # fmt: skip
    return Variant(
        name="query_gradients",
        kernel=query_gradients_kernel,
        signature={
            **dict.fromkeys(wide, "*fp64"), "acc": "*fp32", "near": "*fp32", "x": "*fp32",
            "mean": "*fp32", "grad_x": "*fp32", "B": "i32", "b0": "i32", "b": "i32", "D": "i32",
            "parts": "i32", "offset": "fp32",
        },
        constexprs={"BLOCK_D": 512},
        aligned=("acc", "near", "x", "mean", "grad_x", "center", "D"),
    )  # fmt: skip


def variants() -> list[Variant]:
    return [bias_gradient_variant(), query_gradients_variant()]
