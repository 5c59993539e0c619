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
    SW2,
    M,
    S,
    as_operand,
    dot_weights,
    error_of,
    lowest_left,
    merge,
    operand,
)
from memokern.kernels.products import precisions
from memokern.kernels.variant import POINTERS, ROW_TYPES, Variant, row_name

RUN = 32  # tiles of a part, at most: the bits of an int32


@triton.jit
def sweep_kernel(
    terms,  # [TERMS, total, D]
    rows,  # [N, D]
    sq_norms,  # [N] |yc|^2
    bias,  # [N], read if HAS_BIAS
    table,  # [NUMBERS, total]
    state,  # [parts, STATE, B] out
    acc,  # [parts, B, D] out
    bits,  # [B, marked, BLOCK_N] out: as many as there are parts
    total, b0, B, N, D, stride_n, run, marked,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B of the queries b0 .. b0 + B and a part of `run` tiles of rows, at
    most 32, which it streams. After each tile m is the largest logit so far, s the sum of e^(t-m),
    b_acc that of e^(t-m) u, but for the rows that rounding could change: these it marks, each tile
    by a bit of its own, for `exact_kernel`. Writes the part's state, sums and marks. A part is
    short: tensor cores cut sums off at each step, and over a million rows that would add up."""
    # Programs of the same rows are neighbours: the rows stay in the L2 cache between them.
    n_b = tl.cdiv(B, BLOCK_B)
    i_b, i_p = tl.program_id(0) % n_b, tl.program_id(0) // n_b
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
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

    m = tl.full([BLOCK_B], -inf, tl.float32)
    s = tl.zeros([BLOCK_B], tl.float32)
    st, sb, sw2 = s, s, s
    low = tl.full([BLOCK_B], -inf, tl.float32)
    b_acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    b_bits = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
    n0 = i_p * run * BLOCK_N
    for i in range(0, tl.minimum(run, tl.cdiv(N - n0, BLOCK_N))):
        o_n = (n0 + i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < N
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
        b_bits = b_bits | tl.where(exact, 1 << i, 0)
        rest = valid & (exact == 0) & (hard == 0)[:, None]
        m_new = tl.maximum(m, tl.max(tl.where(rest, t, -inf), 1))
        m_safe = tl.where(m_new == -inf, 0.0, m_new)
        drop = tl.where(m == -inf, 0.0, m - m_safe)
        f = tl.where(m == -inf, 0.0, tl.exp(drop))
        gap = tl.where(rest, t - m_safe[:, None], 0.0)
        b_p = tl.where(rest, tl.exp(gap), 0.0)
        st = f * (st + s * drop) + tl.sum(b_p * gap, 1)
        s = f * s + tl.sum(b_p, 1)
        sw2 = f * f * sw2 + tl.sum(b_p * b_p, 1)
        if HAS_BIAS:
            sb = f * sb + tl.sum(b_p * b_b[None, :], 1)
        b_acc = dot_weights(b_p * big, b_u, b_acc * f[:, None], PRECISION)
        m = m_new

    p_acc = acc + (i_p.to(tl.int64) * B + o_b)[:, None] * D + o_d[None, :]
    tl.store(p_acc, b_acc / big, mask=mask_x)
    p_w = bits + (o_b * marked + i_p)[:, None] * BLOCK_N
    tl.store(p_w + tl.arange(0, BLOCK_N)[None, :], b_bits, mask=mask_b[:, None])
    p_s = state + i_p.to(tl.int64) * 6 * B + o_b
    tl.store(p_s + KEY * B, tl.where(s > 0.0, 0.0, inf).to(tl.float64), mask=mask_b)
    common = tl.load(p_t + COMMON * total, mask=mask_b, other=0.0)
    tl.store(p_s + M * B, m.to(tl.float64) - common, mask=mask_b)
    tl.store(p_s + S * B, s.to(tl.float64), mask=mask_b)
    tl.store(p_s + ST * B, st.to(tl.float64), mask=mask_b)
    tl.store(p_s + SB * B, sb.to(tl.float64), mask=mask_b)
    tl.store(p_s + SW2 * B, sw2.to(tl.float64), mask=mask_b)


@triton.jit
def exact_kernel(
    bits,  # [B, marked, WIDTH]
    rows,  # [N, D]
    bias,  # [N], read if has_bias
    table,  # [NUMBERS, total]
    x,  # [total, D]
    sigma, alpha,  # [total]
    numbers,  # [2] scale, shift
    state,  # [parts, STATE, B] out
    acc,  # [parts, B, D] out, where the state has rows
    total, b0, B, D, stride_n, run, marked, share, has_bias,
    WIDTH: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows that `sweep_kernel` marked, by direct differences in float64. One program owns a
    query and the marks of `share` parts of the sweep, streams them STRIPS parts at a time, and
    evaluates a row of each at a time. The state and b_acc are those of the rows so far."""
    i_b, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = b0 + i_b
    inf = float("inf")
    mode = tl.load(table + MODE * total + to).to(tl.int32)
    inv_t = tl.load(table + INV_T * total + to)
    hard = mode == HARD
    b_alpha = tl.load(alpha + to)
    spread = tl.where(hard, 1.0, tl.load(sigma + to))
    scale, shift = tl.load(numbers), tl.load(numbers + 1)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_x = tl.load(x + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    o_c = tl.arange(0, WIDTH)[None, :]
    s = inv_t * 0.0
    key, m = s + inf, s - inf
    st, sb, sw2 = s, s, s
    b_acc = tl.zeros([BLOCK_D], tl.float64)
    for j0 in range(i_p * share, tl.minimum(marked, (i_p + 1) * share), STRIPS):
        # [STRIPS, WIDTH]
        o_j = j0 + tl.arange(0, STRIPS)
        p_w = bits + (i_b * marked + o_j)[:, None] * WIDTH + o_c
        left = tl.load(p_w, mask=(o_j < marked)[:, None], other=0)
        while tl.max(tl.max((left != 0).to(tl.int32), 1), 0) > 0:
            first = tl.min(tl.where(left != 0, o_c, WIDTH), 1)
            found = first < WIDTH
            here = o_c == first[:, None]
            word = tl.sum(tl.where(here, left, 0), 1)
            bit = word & -word
            left = tl.where(here, left & (left - 1), left)
            # The number of the bit: the exponent of it as float32.
            i_t = ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            o_n = (o_j * run + i_t) * WIDTH + first
            o_n = tl.where(found, o_n, 0).to(tl.int64)
            mask = found[:, None] & (o_d < D)
            # [STRIPS, BLOCK_D]
            b_raw = tl.load(rows + o_n[:, None] * stride_n + o_d, mask=mask, other=0)
            diff = b_x - b_alpha * (b_raw.to(tl.float64) * scale + shift)
            r2 = tl.sum(tl.where(mask, diff * diff, 0.0), 1)
            b_bias = tl.load(bias + o_n, mask=found & (has_bias != 0), other=0.0)
            v = tl.where(hard, 0.0, -0.5 * (r2 / spread) / spread * inv_t)
            v += b_bias * inv_t
            k_new = tl.where(found, tl.where(hard, r2, 0.0), inf)
            k_best = tl.min(k_new, 0)
            counts = found & (k_new == k_best)
            v_best = tl.max(tl.where(counts, v, -inf), 0)
            gap = tl.where(counts, v - tl.where(counts, v_best, 0.0), 0.0)
            w = tl.where(counts, tl.exp(gap), 0.0)
            key, m, s, st, sb, sw2, f_a, f_b = merge(
                key, m, s, st, sb, sw2, k_best, v_best, tl.sum(w, 0), tl.sum(w * gap, 0),
                tl.sum(w * b_bias, 0), tl.sum(w * w, 0),
            )  # fmt: skip
            b_u = tl.where(mask, as_operand(b_raw).to(tl.float64), 0.0)
            b_acc = b_acc * f_a + tl.sum(w[:, None] * b_u, 0) * f_b
    p_s = state + i_p.to(tl.int64) * 6 * B + i_b
    tl.store(p_s + KEY * B, key)
    tl.store(p_s + M * B, m)
    tl.store(p_s + S * B, s)
    tl.store(p_s + ST * B, st)
    tl.store(p_s + SB * B, sb)
    tl.store(p_s + SW2 * B, sw2)
    o_f = tl.arange(0, BLOCK_D)
    p_acc = acc + (i_p.to(tl.int64) * B + i_b) * D + o_f
    tl.store(p_acc, b_acc.to(tl.float32), mask=(o_f < D) & (s > 0.0))


class Tile(NamedTuple):
    """A configuration: queries and rows of a tile, and how it is launched."""

    b: int
    n: int
    warps: int
    stages: int


def tile(rows: torch.dtype, features: int, few: bool) -> Tile | None:
    """For rows of a type and so many features, a power of two; few: up to 16 queries. None where
    the sums, the query's terms and a tile of products do not fit the registers of an A100 together,
    as compiling shows: there the sweep is chunked."""
    most = (64 if few else 32) if rows == torch.float32 else (128 if few else 64)
    if features > most:
        return None
    if few:
        low = rows in (torch.float32, torch.uint8) or features == 128
        return Tile(16, 32 if low else 64, 4, 3)
    if rows == torch.uint8:  # converted on the way: there is nothing to load ahead into
        return Tile(64, 32, 4, 1)
    return Tile(64, 16 if rows == torch.float32 and features == 32 else 32, 4, 3)


def sweep_variant(
    rows: torch.dtype, features: int, few: bool, has_bias: bool, precision: str
) -> Variant:
    """For up to `features` features, a power of two from 16."""
    how, size = operand(rows, precision), tile(rows, features, few)
    assert size is not None
    return Variant(
        name=f"sweep {row_name(rows)} D{features} B{size.b} {precision}"
        + (" bias" if has_bias else ""),
        kernel=sweep_kernel,
        signature={
            "terms": POINTERS[how.dtype], "rows": POINTERS[rows], "sq_norms": "*fp64",
            "bias": "*fp64", "table": "*fp64", "state": "*fp64", "acc": "*fp32", "bits": "*i32",
            "total": "i32", "b0": "i32", "B": "i32", "N": "i32", "D": "i32", "stride_n": "i64",
            "run": "i32", "marked": "i32",
        },
        constexprs={
            "TERMS": how.terms, "PRECISION": precision if how.terms == 1 else "ieee",
            "HAS_BIAS": has_bias, "BLOCK_B": size.b, "BLOCK_N": size.n, "BLOCK_D": features,
        },
        num_warps=size.warps, num_stages=size.stages,
        aligned=("terms", "rows", "sq_norms", "bias", "table", "state", "acc", "bits", "D",
                 "stride_n"),
        registers=255,
        matrix=how.terms > 1 or precision != "ieee",
    )  # fmt: skip


def exact_variant(rows: torch.dtype, features: int, width: int) -> Variant:
    """For tiles of `width` rows."""
    return Variant(
        name=f"exact {row_name(rows)} D{features} N{width}",
        kernel=exact_kernel,
        signature={
            "bits": "*i32", "rows": POINTERS[rows], "bias": "*fp64", "table": "*fp64", "x": "*fp32",
            "sigma": "*fp64", "alpha": "*fp64", "numbers": "*fp64", "state": "*fp64",
            "acc": "*fp32", "total": "i32", "b0": "i32", "B": "i32", "D": "i32",
            "stride_n": "i64", "run": "i32", "marked": "i32", "share": "i32",
            "has_bias": "i32",
        },
        constexprs={
            "WIDTH": width, "STRIPS": 16, "BLOCK_D": features,
        },
        num_warps=4,
        aligned=("bits", "rows", "bias", "x", "acc", "D", "stride_n"),
    )  # fmt: skip


FEATURES = (16, 32, 64, 128)


def variants() -> list[Variant]:
    """Row types by features, sizes of the batch, with and without a bias, precisions."""
    fits = [
        (t, d, few, size)
        for t in ROW_TYPES
        for d in FEATURES
        for few in (True, False)
        if (size := tile(t, d, few)) is not None
    ]
    widths = {(t, d, size.n): None for t, d, _, size in fits}  # in order, each once
    return [
        *(exact_variant(t, d, n) for t, d, n in widths),
        *(
            sweep_variant(t, d, few, bias, p)
            for t, d, few, _ in fits
            for bias in (False, True)
            for p in precisions(t)
        ),
    ]
