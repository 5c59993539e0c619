"""The sweep in one pass, for few features: products, weights and sums of a tile in one program."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from memokern.kernels.common import (
    A1,
    A2,
    COMMON,
    E0,
    E1,
    E2,
    E3,
    HARD,
    INV_T,
    KEY,
    LOST,
    MODE,
    SB,
    ST,
    STATE,
    SW2,
    M,
    S,
    as_operand,
    dot_weights,
    error_of,
    exact_differences,
    lowest_left,
    merge,
    operand,
)
from memokern.kernels.products import precisions
from memokern.kernels.variant import POINTERS, ROW_TYPES, Variant, row_name

RUN = 32  # tiles between two looks at the rows to evaluate exactly: the bits of an int32


@triton.jit
def sweep_kernel(
    terms,  # [TERMS, total, D]
    rows,  # [N, D]
    sq_norms,  # [N] |yc|^2
    bias,  # [N], read if HAS_BIAS
    table,  # [NUMBERS, total]
    x,  # [total, D]
    sigma, alpha,  # [total]
    numbers,  # [2] scale, shift
    state,  # [parts, 6, B] out
    acc,  # [parts, B, D] out
    total, b0, B, N, D, stride_n, part_n,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXACT_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B of the queries b0 .. b0 + B and part_n rows, and streams these in
    runs of RUN tiles. After each tile m is the largest logit so far, s the sum of e^(t-m), b_acc
    that of e^(t-m) u, but for the rows that rounding could change, which it remembers as bits;
    after each run it evaluates these exactly, one of each query at a time, and adds the run to the
    state and to acc in memory. So the loop over tiles has no branch and is pipelined, and b_acc is
    a sum of few tiles: tensor cores cut off, and over a million rows that would add up."""
    i_p = tl.program_id(1)
    o_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    mask_b = o_b < B
    o_d = tl.arange(0, BLOCK_D)
    mask_d = (o_d < D)[None, :]
    p_t = table + b0 + o_b
    mode = tl.load(p_t + MODE * total, mask=mask_b, other=3.0).to(tl.int32)
    a1 = tl.load(p_t + A1 * total, mask=mask_b, other=0.0).to(tl.float32)
    a2 = tl.load(p_t + A2 * total, mask=mask_b, other=0.0).to(tl.float32)
    e0 = tl.load(p_t + E0 * total, mask=mask_b, other=0.0).to(tl.float32)
    e1 = tl.load(p_t + E1 * total, mask=mask_b, other=0.0).to(tl.float32)
    e2 = tl.load(p_t + E2 * total, mask=mask_b, other=0.0).to(tl.float32)
    e3 = tl.load(p_t + E3 * total, mask=mask_b, other=0.0).to(tl.float32)
    inv_t = tl.load(p_t + INV_T * total, mask=mask_b, other=0.0).to(tl.float32)
    hard = mode == HARD
    seen = mode != LOST
    inf = float("inf")

    # [BLOCK_B, BLOCK_D]
    mask_x = mask_b[:, None] & mask_d
    p_x = terms + (b0 + o_b)[:, None] * D + o_d[None, :]
    step = tl.cast(total, tl.int64) * D
    b_x0 = tl.load(p_x, mask=mask_x, other=0.0)
    b_x1 = b_x0
    b_x2 = b_x0
    if TERMS > 1:
        b_x1 = tl.load(p_x + step, mask=mask_x, other=0.0)
    if TERMS > 2:
        b_x2 = tl.load(p_x + 2 * step, mask=mask_x, other=0.0)
    short: tl.constexpr = rows.dtype.element_ty != tl.float32
    big: tl.constexpr = 32768.0 if short and rows.dtype.element_ty != tl.bfloat16 else 1.0

    key = tl.full([BLOCK_B], inf, tl.float64)
    m = tl.full([BLOCK_B], -inf, tl.float64)
    s = tl.zeros([BLOCK_B], tl.float64)
    st, sb, sw2 = s, s, s
    low = tl.full([BLOCK_B], -inf, tl.float32)
    p_acc = acc + (i_p.to(tl.int64) * B + o_b)[:, None] * D
    end = tl.minimum(N, (i_p + 1) * part_n)
    for n0 in range(i_p * part_n, end, RUN * BLOCK_N):
        b_acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        bits = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
        r_m = tl.full([BLOCK_B], -inf, tl.float32)
        r_s = tl.zeros([BLOCK_B], tl.float32)
        r_st = tl.zeros([BLOCK_B], tl.float32)
        r_sb = tl.zeros([BLOCK_B], tl.float32)
        r_sw = tl.zeros([BLOCK_B], tl.float32)
        for i in range(0, tl.minimum(RUN, tl.cdiv(end - n0, BLOCK_N))):
            o_n = (n0 + i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = o_n < end
            # [BLOCK_N, BLOCK_D]
            p_y = rows + o_n[:, None] * stride_n + o_d[None, :]
            b_u = as_operand(tl.load(p_y, mask=mask_n[:, None] & mask_d, other=0))
            # [BLOCK_B, BLOCK_N]
            t = tl.dot(b_x0, tl.trans(b_u), input_precision=PRECISION)
            if TERMS > 1:
                t = tl.dot(b_x1, tl.trans(b_u), t, input_precision=PRECISION)
            if TERMS > 2:
                t = tl.dot(b_x2, tl.trans(b_u), t, input_precision=PRECISION)
            sq = tl.load(sq_norms + o_n, mask=mask_n, other=0.0).to(tl.float32)
            t = t * a1[:, None] - sq[None, :] * a2[:, None]
            b_max = 0.0
            if HAS_BIAS:
                b_b = tl.load(bias + o_n, mask=mask_n, other=-inf).to(tl.float32)
                mask_n = mask_n & (b_b != -inf)
                b_b = tl.where(mask_n, b_b, 0.0)
                b_max = tl.max(tl.abs(b_b), 0)
                t += b_b[None, :] * tl.where(hard, 0.0, inv_t)[:, None]
            err = error_of(e0, e1, e2, e3, tl.max(sq, 0), b_max)
            valid = mask_n[None, :] & seen[:, None]
            low = tl.maximum(low, tl.max(tl.where(valid & (t == t), t, -inf), 1) - err)
            lo = lowest_left(low, err, hard)
            exact = valid & ((t >= lo[:, None]) | (err == inf)[:, None])
            bits = bits | tl.where(exact, 1 << i, 0)
            rest = valid & (exact == 0) & (hard == 0)[:, None]
            m_new = tl.maximum(r_m, tl.max(tl.where(rest, t, -inf), 1))
            m_safe = tl.where(m_new == -inf, 0.0, m_new)
            drop = tl.where(r_m == -inf, 0.0, r_m - m_safe)
            f = tl.where(r_m == -inf, 0.0, tl.exp(drop))
            gap = tl.where(rest, t - m_safe[:, None], 0.0)
            b_p = tl.where(rest, tl.exp(gap), 0.0)
            r_st = f * (r_st + r_s * drop) + tl.sum(b_p * gap, 1)
            r_s = f * r_s + tl.sum(b_p, 1)
            r_sw = f * f * r_sw + tl.sum(b_p * b_p, 1)
            if HAS_BIAS:
                r_sb = f * r_sb + tl.sum(b_p * b_b[None, :], 1)
            b_acc = dot_weights(b_p * big, b_u, b_acc * f[:, None], PRECISION)
            r_m = m_new

        r_key = tl.where(r_s > 0.0, 0.0, inf).to(tl.float64)
        key, m, s, st, sb, sw2, f_a, f_b = merge(
            key, m, s, st, sb, sw2, r_key, r_m.to(tl.float64), r_s.to(tl.float64),
            r_st.to(tl.float64), r_sb.to(tl.float64), r_sw.to(tl.float64),
        )  # fmt: skip
        f_a, f_b = f_a.to(tl.float32)[:, None], f_b.to(tl.float32)[:, None] / big
        old = tl.load(p_acc + o_d[None, :], mask=mask_x & (f_a > 0.0), other=0.0)
        tl.store(p_acc + o_d[None, :], old * f_a + b_acc * f_b, mask=mask_x)

        if tl.max(tl.max((bits != 0).to(tl.int32), 1), 0) > 0:
            scale, shift = tl.load(numbers), tl.load(numbers + 1)
            b_alpha = tl.load(alpha + b0 + o_b, mask=mask_b, other=0.0)
            spread = tl.where(hard, 1.0, tl.load(sigma + b0 + o_b, mask=mask_b, other=1.0))
            inv_t64 = tl.load(p_t + INV_T * total, mask=mask_b, other=0.0)
            common = tl.load(p_t + COMMON * total, mask=mask_b, other=0.0)
            for i in range(0, RUN):
                left = ((bits >> i) & 1) != 0
                count = tl.max(tl.sum(left.to(tl.int32), 1), 0)
                while count > 0:
                    o_j = tl.arange(0, BLOCK_N)[None, :]
                    first = tl.min(tl.where(left, o_j, BLOCK_N), 1)
                    found = first < BLOCK_N
                    left = left & (o_j != first[:, None])
                    count -= 1
                    at = (n0 + i * BLOCK_N + tl.where(found, first, 0)).to(tl.int64)
                    r2 = exact_differences(
                        x, rows, (b0 + o_b) * D, at * stride_n, b_alpha, scale, shift, found, D,
                        BLOCK_B, EXACT_D,
                    )  # fmt: skip
                    b_bias = tl.zeros([BLOCK_B], tl.float64)
                    if HAS_BIAS:
                        b_bias = tl.load(bias + at, mask=found, other=0.0)
                    v = tl.where(hard, 0.0, -0.5 * (r2 / spread) / spread * inv_t64 + common)
                    one = tl.where(found, 1.0, 0.0).to(tl.float64)
                    key, m, s, st, sb, sw2, g_a, g_b = merge(
                        key, m, s, st, sb, sw2, tl.where(found, tl.where(hard, r2, 0.0), inf),
                        v + b_bias * inv_t64, one, one * 0.0, b_bias, one,
                    )  # fmt: skip
                    g_a, g_b = g_a.to(tl.float32)[:, None], g_b.to(tl.float32)[:, None]
                    tl.debug_barrier()  # another thread may have written what this one reads
                    for d in range(0, D, EXACT_D):
                        o_e = (d + tl.arange(0, EXACT_D))[None, :]
                        mask = found[:, None] & (o_e < D)
                        b_y = tl.load(rows + at[:, None] * stride_n + o_e, mask=mask, other=0)
                        b_y = as_operand(b_y).to(tl.float32)
                        old = tl.load(p_acc + o_e, mask=mask & (g_a > 0.0), other=0.0)
                        tl.store(p_acc + o_e, old * g_a + b_y * g_b, mask=mask)
            known = tl.where((s > 0.0) & (hard == 0), m, -inf).to(tl.float32)
            low = tl.maximum(low, known - 1.2e-7 * tl.where(known > -inf, tl.abs(known), 0.0))
        tl.debug_barrier()

    p_s = state + i_p.to(tl.int64) * 6 * B + o_b
    tl.store(p_s + KEY * B, key, mask=mask_b)
    tl.store(p_s + M * B, m, mask=mask_b)
    tl.store(p_s + S * B, s, mask=mask_b)
    tl.store(p_s + ST * B, st, mask=mask_b)
    tl.store(p_s + SB * B, sb, mask=mask_b)
    tl.store(p_s + SW2 * B, sw2, mask=mask_b)


class Tile(NamedTuple):
    """A configuration: queries and rows of a tile, and how it is launched."""

    b: int
    n: int
    warps: int
    stages: int


def tile(features: int, few: bool) -> Tile:
    """For so many features, a power of two. few: up to 16 queries."""
    if few:
        return Tile(16, 64, 4, 2)
    return Tile(64, 64 if features < 128 else 32, 4, 2)


def variant(rows: torch.dtype, features: int, few: bool, has_bias: bool, precision: str) -> Variant:
    """For up to `features` features, a power of two from 16."""
    how, size = operand(rows, precision), tile(features, few)
    return Variant(
        name=f"sweep {row_name(rows)} D{features} B{size.b} {precision}"
        + (" bias" if has_bias else ""),
        kernel=sweep_kernel,
        signature={
            "terms": POINTERS[how.dtype], "rows": POINTERS[rows], "sq_norms": "*fp64",
            "bias": "*fp64", "table": "*fp64", "x": "*fp32", "sigma": "*fp64", "alpha": "*fp64",
            "numbers": "*fp64", "state": "*fp64", "acc": "*fp32", "total": "i32", "b0": "i32",
            "B": "i32", "N": "i32", "D": "i32", "stride_n": "i64", "part_n": "i32",
        },
        constexprs={
            "TERMS": how.terms, "PRECISION": precision if how.terms == 1 else "ieee",
            "HAS_BIAS": has_bias, "RUN": RUN, "BLOCK_B": size.b, "BLOCK_N": size.n,
            "BLOCK_D": features, "EXACT_D": min(features, 32),
        },
        num_warps=size.warps, num_stages=size.stages,
        aligned=("terms", "rows", "sq_norms", "bias", "table", "x", "sigma", "alpha", "numbers",
                 "state", "acc", "D", "stride_n", "part_n"),
        matrix=how.terms > 1 or precision != "ieee",
    )  # fmt: skip


FEATURES = (16, 32, 64, 128)


def variants() -> list[Variant]:
    """Row types by features, sizes of the batch, with and without a bias, precisions."""
    return [
        variant(t, d, few, has_bias, p)
        for t in ROW_TYPES
        for d in FEATURES
        for few in (True, False)
        for has_bias in (False, True)
        for p in precisions(t)
    ]
