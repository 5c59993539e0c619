"""The rows that the sweep in one pass has marked: evaluated by direct differences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.operands import as_operand, values_of
from memokern.backends.triton.core.query_table import HARD, INV_T, MODE
from memokern.backends.triton.core.state import KEY, S_BIAS, S_SQ, S_V, STATE, M, S, merge
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.backends.triton.posterior.fused import FEATURES

STRIPS, WIDTH = 16, 16  # a program looks at STRIPS times WIDTH words of marks together


@triton.jit
def exact_kernel(
    marks,  # [B, words]
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [TABLE, total]
    x,  # [total, D]
    sigma, alpha,  # [total]
    scale_shift,  # [2]
    state,  # [parts, STATE, B] out
    acc,  # [parts, B, D] out, where the state has rows; as pulls, the sum of w (alpha y - x)
    pulls,
    total, b0, B, D, stride_n, words, word_rows, part_words, has_bias,
    STRIPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows that `sweep_kernel` marked, by direct differences in float64. One program owns a
    query and part_words of its words of marks, each of which stands for word_rows rows. It streams
    them, STRIPS times WIDTH words at a time, and evaluates one row of each of the STRIPS at a time.
    The state and b_acc are those of the rows so far."""
    i_b, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = b0 + i_b
    inf = float("inf")
    mode = tl.load(table + MODE * total + to).to(tl.int32)
    inv_t = tl.load(table + INV_T * total + to)
    hard = mode == HARD
    b_alpha = tl.load(alpha + to)
    b_sigma = tl.where(hard, 1.0, tl.load(sigma + to))
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_x = tl.load(x + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    o_c = tl.arange(0, WIDTH)[None, :]
    s = inv_t * 0.0
    key, m = s + inf, s - inf
    s_v, s_bias, s_sq = s, s, s
    b_acc = tl.zeros([BLOCK_D], tl.float64)
    b_pull = tl.zeros([BLOCK_D], tl.float64)
    end = tl.minimum(words, (i_p + 1) * part_words)
    for j in range(i_p * part_words, end, STRIPS * WIDTH):
        # [STRIPS, WIDTH]
        o_j = j + tl.arange(0, STRIPS)
        o_w = o_j[:, None] + o_c * STRIPS
        left = tl.load(marks + i_b * words + o_w, mask=o_w < end, other=0)
        while tl.max(tl.max((left != 0).to(tl.int32), 1), 0) > 0:
            first = tl.min(tl.where(left != 0, o_c, WIDTH), 1)
            found = first < WIDTH
            here = o_c == first[:, None]
            word = tl.sum(tl.where(here, left, 0), 1)
            bit = word & -word
            left = tl.where(here, left & (left - 1), left)
            # The number of the bit is its exponent as float32.
            i_n = ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            o_n = (o_j + first * STRIPS) * word_rows + i_n
            o_n = tl.where(found, o_n, 0).to(tl.int64)
            mask = found[:, None] & (o_d < D)
            # [STRIPS, BLOCK_D]
            b_raw = tl.load(rows + o_n[:, None] * stride_n + o_d, mask=mask, other=0)
            diff = b_x - b_alpha * values_of(b_raw, scale, shift)
            r2 = tl.sum(tl.where(mask, diff * diff, 0.0), 1)
            b_bias = tl.load(bias + o_n, mask=found & (has_bias != 0), other=0.0)
            v = tl.where(hard, 0.0, -0.5 * (r2 / b_sigma) / b_sigma * inv_t)
            v += b_bias * inv_t
            k_new = tl.where(found, tl.where(hard, r2, 0.0), inf)
            k_best = tl.min(k_new, 0)
            counts = found & (k_new == k_best)
            v_best = tl.max(tl.where(counts, v, -inf), 0)
            gap = tl.where(counts, v - tl.where(counts, v_best, 0.0), 0.0)
            w = tl.where(counts, tl.exp(gap), 0.0)
            key, m, s, s_v, s_bias, s_sq, f_a, f_b = merge(
                key, m, s, s_v, s_bias, s_sq, k_best, v_best, tl.sum(w, 0), tl.sum(w * gap, 0),
                tl.sum(w * b_bias, 0), tl.sum(w * w, 0),
            )  # fmt: skip
            b_u = tl.where(mask, as_operand(b_raw).to(tl.float64), 0.0)
            b_acc = b_acc * f_a + tl.sum(w[:, None] * b_u, 0) * f_b
            b_pull = b_pull * f_a - tl.sum(tl.where(mask, w[:, None] * diff, 0.0), 0) * f_b
    p_s = state + i_p.to(tl.int64) * STATE * B + i_b
    tl.store(p_s + KEY * B, key)
    tl.store(p_s + M * B, m)
    tl.store(p_s + S * B, s)
    tl.store(p_s + S_V * B, s_v)
    tl.store(p_s + S_BIAS * B, s_bias)
    tl.store(p_s + S_SQ * B, s_sq)
    o_f = tl.arange(0, BLOCK_D)
    o_a = (i_p.to(tl.int64) * B + i_b) * D + o_f
    tl.store(acc + o_a, b_acc.to(tl.float32), mask=(o_f < D) & (s > 0.0))
    tl.store(pulls + o_a, b_pull.to(tl.float32), mask=(o_f < D) & (s > 0.0))


def exact_variant(rows: torch.dtype, features: int) -> Variant:
    """For up to `features` features."""
    # With fewer warps, or as many rows at a time, the kernel of bytes would spill.
    narrow = rows == torch.uint8
    strips = STRIPS // 2 if narrow and features == 256 else STRIPS
    return Variant(
        name=f"exact {row_name(rows)} D{features}",
        kernel=exact_kernel,
        signature={
            "marks": "*i32", "rows": POINTERS[rows], "bias": "*fp64", "table": "*fp64",
            "x": "*fp32", "sigma": "*fp64", "alpha": "*fp64", "scale_shift": "*fp64",
            "state": "*fp64", "acc": "*fp32", "pulls": "*fp32",
            "total": "i32", "b0": "i32", "B": "i32", "D": "i32",
            "stride_n": "i64", "words": "i32", "word_rows": "i32", "part_words": "i32",
            "has_bias": "i32",
        },
        constexprs={"STRIPS": strips, "WIDTH": STRIPS * WIDTH // strips, "BLOCK_D": features},
        num_warps=8 if features == 256 or (narrow and features == 128) else 4,
        registers=255,
        aligned=("marks", "rows", "bias", "x", "acc", "pulls", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by features."""
    return [exact_variant(t, d) for t in ROW_TYPES for d in FEATURES]
