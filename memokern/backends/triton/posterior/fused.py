"""The sweep in one pass, for up to 256 features: a tile's products, weights and sums together.

`sweep_kernel` leaves out the rows whose weight the rounding of the products could change, and marks
them for `exact_kernel` (:mod:`memokern.backends.triton.posterior.marked`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.exactness import error_of, exact_from
from memokern.backends.triton.core.operands import (
    as_operand,
    dot_terms,
    dot_weights,
    operand_of,
)
from memokern.backends.triton.core.query_table import (
    A1,
    A2,
    COMMON,
    E0,
    E1,
    E2,
    E3,
    HARD,
    INV_T,
    LOST,
    MODE,
)
from memokern.backends.triton.core.state import KEY, S_BIAS, S_SQ, S_V, STATE, M, S
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.backends.triton.posterior.products import precisions

FEATURES = (16, 32, 64, 128, 256)  # of a tile; rows have at most that many
PART = 2048  # rows of a part, at most
WORD = tl.constexpr(32)  # rows whose marks are one number


@triton.jit
def sweep_kernel(
    terms,  # [TERMS, total, D]
    rows,  # [N, D]
    sq_norms,  # [N] |yc|^2
    bias,  # [N], read if has_bias
    table,  # [TABLE, total]
    state,  # [parts, STATE, B] out
    acc,  # [parts, B, D] out
    marks,  # [B, words] out
    total, b0, B, N, D, stride_n, run, words, has_bias,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B of the queries b0 .. b0 + B and a part of `run` tiles of rows, which
    it streams. After each tile top is the largest t so far, top_r the largest t_r, which is t less
    the bias, every the sum of e^(t-top), s the same, s_r that of e^(t-top) (t_r-top_r) and b_acc
    that of e^(t-top) u. All but `every` are without the rows whose weight, beside `every`, the
    rounding could change: these it marks for `exact_kernel`, a bit for each row. It writes the
    part's state, accumulator and marks. A part is short, because tensor cores truncate their sums
    at each step, and over a million rows that would add up.

    Where BLOCK_K = BLOCK_D, the queries' terms are held in registers and a tile of rows is loaded
    once. Where BLOCK_K < BLOCK_D, the terms would not fit the registers beside the sums: the first
    product streams BLOCK_K features at a time, and the second loads the rows again, from the
    cache."""
    # Programs of the same rows are neighbours, so the rows stay in the L2 cache between them.
    n_b = tl.cdiv(B, BLOCK_B)
    i_b, i_p = tl.program_id(0) % n_b, tl.program_id(0) // n_b
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    mask_b = o_b < B
    inf = float("inf")
    n0 = i_p * run * BLOCK_N
    n1 = tl.minimum(N, n0 + run * BLOCK_N)

    # One error of t holds for all rows of the part.
    sq_most = tl.zeros([512], tl.float64)
    b_most = tl.zeros([512], tl.float64)
    for n in range(n0, n1, 512):
        o_n = n + tl.arange(0, 512)
        sq_most = tl.maximum(sq_most, tl.load(sq_norms + o_n, mask=o_n < n1, other=0.0))
        b_b = tl.load(bias + o_n, mask=(o_n < n1) & (has_bias != 0), other=0.0)
        b_most = tl.maximum(b_most, tl.where(b_b == -inf, 0.0, tl.abs(b_b)))
    p_t = table + b0 + o_b
    mode = tl.load(p_t + MODE * total, mask=mask_b, other=3.0).to(tl.int32)
    a1 = tl.load(p_t + A1 * total, mask=mask_b, other=0.0).to(tl.float32)
    a2 = tl.load(p_t + A2 * total, mask=mask_b, other=0.0).to(tl.float32)
    e0 = tl.load(p_t + E0 * total, mask=mask_b, other=0.0).to(tl.float32)
    e1 = tl.load(p_t + E1 * total, mask=mask_b, other=0.0).to(tl.float32)
    e2 = tl.load(p_t + E2 * total, mask=mask_b, other=0.0).to(tl.float32)
    e3 = tl.load(p_t + E3 * total, mask=mask_b, other=0.0).to(tl.float32)
    inv_t = tl.load(p_t + INV_T * total, mask=mask_b, other=0.0).to(tl.float32)
    y2, b_max = tl.max(sq_most, 0).to(tl.float32), tl.max(b_most, 0).to(tl.float32)
    err = error_of(e0, e1, e2, e3, y2, b_max)
    hard = mode == HARD
    below = exact_from(-err, err, hard)  # relative to log every + top, or at sigma = 0 to top
    seen = mode != LOST
    known = seen & (err < inf)
    soft = known & (hard == 0)
    inv_t = tl.where(hard, 0.0, inv_t)

    o_d = tl.arange(0, BLOCK_D)
    mask_d = (o_d < D)[None, :]
    mask_x = mask_b[:, None] & mask_d
    # [BLOCK_B, BLOCK_D]
    p_x = terms + (b0 + o_b)[:, None] * D
    step = tl.cast(total, tl.int64) * D
    held: tl.constexpr = BLOCK_K == BLOCK_D
    if held:
        b_x0 = tl.load(p_x + o_d[None, :], mask=mask_x, other=0.0)
        b_x1 = b_x0
        b_x2 = b_x0
        if TERMS > 1:
            b_x1 = tl.load(p_x + step + o_d[None, :], mask=mask_x, other=0.0)
        if TERMS > 2:
            b_x2 = tl.load(p_x + 2 * step + o_d[None, :], mask=mask_x, other=0.0)
    short: tl.constexpr = rows.dtype.element_ty != tl.float32
    big: tl.constexpr = 32768.0 if short and rows.dtype.element_ty != tl.bfloat16 else 1.0
    WORDS: tl.constexpr = (BLOCK_N + WORD - 1) // WORD
    o_c = tl.arange(0, BLOCK_N)
    bit = 1 << (o_c % WORD)
    p_w = marks + o_b * words + i_p * run * WORDS

    top = tl.full([BLOCK_B], -inf, tl.float32)
    s = tl.zeros([BLOCK_B], tl.float32)
    s_r, s_bias, s_sq, every = s, s, s, s
    top_r = top
    b_acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(n1 - n0, BLOCK_N)):
        o_n = (n0 + i * BLOCK_N + o_c).to(tl.int64)
        mask_n = o_n < N
        mask_y = mask_n[:, None]
        p_y = rows + o_n[:, None] * stride_n
        t = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        if not held:
            # The compiler does not know how many steps these are: else it would load all terms
            # before the sweep.
            for k in range(0, D, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                mask_k = (o_k < D)[None, :]
                # [BLOCK_N, BLOCK_K]
                b_u = as_operand(tl.load(p_y + o_k[None, :], mask=mask_y & mask_k, other=0))
                mask_k = mask_b[:, None] & mask_k
                t = dot_terms(p_x + o_k[None, :], step, mask_k, b_u, t, TERMS, PRECISION)
        # [BLOCK_N, BLOCK_D]
        b_u = as_operand(tl.load(p_y + o_d[None, :], mask=mask_y & mask_d, other=0))
        if held:
            t = tl.dot(b_x0, tl.trans(b_u), t, input_precision=PRECISION)
            if TERMS > 1:
                t = tl.dot(b_x1, tl.trans(b_u), t, input_precision=PRECISION)
            if TERMS > 2:
                t = tl.dot(b_x2, tl.trans(b_u), t, input_precision=PRECISION)
        sq = tl.load(sq_norms + o_n, mask=mask_n, other=0.0).to(tl.float32)
        b_b = tl.load(bias + o_n, mask=mask_n & (has_bias != 0), other=0.0).to(tl.float32)
        mask_n = mask_n & (b_b != -inf)
        b_b = tl.where(mask_n, b_b, 0.0)
        # The distances' part by itself: the bias would round it away where sigma is large.
        t_r = t * a1[:, None] - sq[None, :] * a2[:, None]
        t_r = tl.where(mask_n[None, :] & known[:, None], t_r, -inf)
        new_r = tl.maximum(top_r, tl.max(t_r, 1))
        t = t_r + b_b[None, :] * inv_t[:, None]
        new = tl.maximum(top, tl.max(t, 1))
        drop = tl.where(top == -inf, 0.0, top - new)
        f = tl.where(top == -inf, 0.0, tl.exp(drop))
        live = mask_n[None, :] & soft[:, None]
        b_p = tl.where(live, tl.exp(tl.where(live, t - new[:, None], 0.0)), 0.0)
        # The errors of all t are at most err, so e^-err times this sum is below that of the exact.
        every = f * every + tl.sum(b_p, 1)
        lo = new + (below + tl.log(tl.maximum(every * 0.9999, 1.0)))
        lo -= 1.2e-7 * tl.abs(lo)
        exact = mask_n[None, :] & seen[:, None] & (t >= lo[:, None])
        for j in tl.static_range(WORDS):
            word = tl.where(exact & (o_c // WORD == j)[None, :], bit[None, :], 0)
            tl.store(p_w + i * WORDS + j, tl.sum(word, 1), mask=mask_b)
        b_p = tl.where(exact, 0.0, b_p)
        drop = tl.where(top_r == -inf, 0.0, top_r - new_r)
        gap = tl.where(live, t_r - new_r[:, None], 0.0)
        s_r = f * (s_r + s * drop) + tl.sum(b_p * gap, 1)
        s = f * s + tl.sum(b_p, 1)
        s_sq = f * f * s_sq + tl.sum(b_p * b_p, 1)
        s_bias = f * s_bias + tl.sum(b_p * b_b[None, :], 1)
        b_acc = dot_weights(b_p * big, b_u, b_acc * f[:, None], PRECISION)
        top = new
        top_r = new_r

    p_acc = acc + (i_p.to(tl.int64) * B + o_b)[:, None] * D + o_d[None, :]
    tl.store(p_acc, b_acc / big, mask=mask_x)
    p_s = state + i_p.to(tl.int64) * STATE * B + o_b
    tl.store(p_s + KEY * B, tl.where(s > 0.0, 0.0, inf).to(tl.float64), mask=mask_b)
    common = tl.load(p_t + COMMON * total, mask=mask_b, other=0.0)
    tl.store(p_s + M * B, top.to(tl.float64) - common, mask=mask_b)
    s64 = s.to(tl.float64)
    tl.store(p_s + S * B, s64, mask=mask_b)
    b_inv_t = tl.load(p_t + INV_T * total, mask=mask_b, other=0.0)
    apart = tl.where(s > 0.0, top_r.to(tl.float64) - top.to(tl.float64), 0.0)
    s_v = s_r.to(tl.float64) + s_bias.to(tl.float64) * b_inv_t + apart * s64
    tl.store(p_s + S_V * B, s_v, mask=mask_b)
    tl.store(p_s + S_BIAS * B, s_bias.to(tl.float64), mask=mask_b)
    tl.store(p_s + S_SQ * B, s_sq.to(tl.float64), mask=mask_b)


class Tile(NamedTuple):
    """A configuration: the queries and rows of a tile, the features of a step of the first product,
    and how the kernel is launched."""

    b: int
    n: int
    k: int
    warps: int
    stages: int


def tile(rows: torch.dtype, features: int, few_queries: bool, unaligned: bool = False) -> Tile:
    """For rows of a type and so many features, a power of two; few_queries: up to 16.

    These are the largest tiles that compile for every target without a spill. float32 takes most
    registers, because its three products need sums of their own. Where a step is as wide as the
    tile, the queries' terms are held. Unaligned rows shorter than float32 pass through registers,
    number by number, so their tiles are smaller."""
    wide, single = features >= 128, rows == torch.float32
    by_number = unaligned and not single
    single = single or (by_number and wide)
    if few_queries and wide:
        rows_of_tile = 16 if by_number and features == 256 else 32 if single else 64
        return Tile(16, rows_of_tile, 32, 8, 3)
    if few_queries:
        low = single or rows == torch.uint8
        return Tile(16, 32 if low else 64, features, 8 if single and features == 64 else 4, 3)
    if wide and single:
        return Tile(32, 16, 32, 8, 3)
    if features == 256:
        return Tile(32, 32, 32, 8, 3)
    if wide:
        return Tile(64, 16, 32, 4, 3)
    if single and features >= 32:
        return Tile(64, 16, 32, 8 if features == 64 else 4, 3)
    # uint8 is converted on its way, so there is nothing that tiles could be loaded ahead into.
    stages = 1 if rows == torch.uint8 or by_number else 3
    # Here the three terms of bfloat16 leave four warps no room.
    full = by_number and features == 64 and rows == torch.bfloat16
    rows_of_tile = 16 if rows == torch.uint8 and features == 64 else 32
    return Tile(64, rows_of_tile, features, 8 if full else 4, stages)


def words(n: int, size: Tile) -> int:
    """How many words hold a query's marks of n rows: a bit for each row, whole words for each
    tile."""
    return -(-n // size.n) * -(-size.n // WORD.value)


def sweep_variant(
    rows: torch.dtype, features: int, few_queries: bool, precision: str, unaligned: bool = False
) -> Variant:
    """For up to `features` features, a power of two from 16."""
    operand, size = operand_of(rows, precision), tile(rows, features, few_queries, unaligned)
    variant = Variant(
        name=f"sweep {row_name(rows)} D{features} B{size.b} {precision}",
        kernel=sweep_kernel,
        signature={
            "terms": POINTERS[operand.dtype], "rows": POINTERS[rows], "sq_norms": "*fp64",
            "bias": "*fp64", "table": "*fp64", "state": "*fp64", "acc": "*fp32", "marks": "*i32",
            "total": "i32", "b0": "i32", "B": "i32", "N": "i32", "D": "i32", "stride_n": "i64",
            "run": "i32", "words": "i32", "has_bias": "i32",
        },
        constexprs={
            "TERMS": operand.terms, "PRECISION": precision if operand.terms == 1 else "ieee",
            "BLOCK_B": size.b, "BLOCK_N": size.n, "BLOCK_D": features, "BLOCK_K": size.k,
        },
        num_warps=size.warps, num_stages=size.stages,
        aligned=("terms", "rows", "sq_norms", "bias", "table", "state", "acc", "marks",
                 "D", "stride_n"),
        registers=255,
        matrix=operand.terms > 1 or precision != "ieee",
    )  # fmt: skip
    if not (few_queries or variant.matrix):
        # CUDA cores wait for arithmetic, not for memory, and what is loaded ahead takes registers.
        variant = variant._replace(num_stages=1)
    return variant.unaligned() if unaligned else variant


def variants() -> list[Variant]:
    """Row types by features, sizes of the batch, precisions and alignments, whose tiles differ."""
    return [
        sweep_variant(t, d, few_queries, p, unaligned)
        for unaligned in (False, True)
        for t in ROW_TYPES
        for d in FEATURES
        for few_queries in (True, False)
        for p in precisions(t)
    ]
