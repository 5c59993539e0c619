"""Between the products of the sweep in chunks: from products to weights, exact where it counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.exactness import (
    HUGE,
    LOG_THETA,
    THETA,
    error_of,
    exact_differences,
    exact_from,
)
from memokern.backends.triton.core.operands import values_of
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
    OO,
)
from memokern.backends.triton.core.state import KEY, S_BIAS, S_SQ, S_V, M, S
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.calls import WEIGHTINGS

# A program takes a query's chunk of rows as so many strips, and evaluates one row of each together.
STRIPS = 16


@triton.jit
def weigh_kernel(
    products,  # [parts, b, n] in: parts of <x, u>; the first one out: weights
    sq_norms,  # [N] |yc|^2
    bias,  # [N], read if has_bias
    table,  # [TABLE, B]
    x,  # [B, D]
    rows,  # [N, D]
    sigma, alpha,  # [B]
    scale_shift,  # [2]
    state,  # [STATE, b] in and out
    factor,  # [b] out: what the accumulators so far must be multiplied by
    pulls,  # [b, D] in and out: sum of w (alpha y - x) of rows that the accumulators lack
    pulls_s,  # [b] in and out: sum of their w; pulls is not set where it is 0
    B, b0, b, n0, n, D, stride_n, parts, has_bias,
    IS_LOG: tl.constexpr, STRIPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a query and the chunk's rows, as STRIPS strips of WIDTH. It merges the chunk
    into the query's state, and writes weights relative to the new m. Rows whose weight the error of
    the products could change are evaluated by direct differences, one of each strip at a time. Of
    these, the near ones get weight 0 in `products`, and their differences are added up in pulls,
    since accumulators would round them away."""
    i_b = tl.program_id(0).to(tl.int64)
    p_t = table + b0 + i_b
    mode = tl.load(p_t + MODE * B).to(tl.int32)
    a1, a2 = tl.load(p_t + A1 * B).to(tl.float32), tl.load(p_t + A2 * B).to(tl.float32)
    inv_t, common = tl.load(p_t + INV_T * B), tl.load(p_t + COMMON * B)
    e0, e1 = tl.load(p_t + E0 * B).to(tl.float32), tl.load(p_t + E1 * B).to(tl.float32)
    e2, e3 = tl.load(p_t + E2 * B).to(tl.float32), tl.load(p_t + E3 * B).to(tl.float32)
    b_sigma, b_alpha = tl.load(sigma + b0 + i_b), tl.load(alpha + b0 + i_b)
    hard = mode == HARD
    inf = float("inf")
    # The state so far, which is empty before the first chunk.
    key0 = tl.load(state + KEY * b + i_b, mask=n0 > 0, other=inf)
    m0 = tl.load(state + M * b + i_b, mask=n0 > 0, other=-inf)
    s0 = tl.load(state + S * b + i_b, mask=n0 > 0, other=0.0)

    # [STRIPS, WIDTH], as all that follows
    o_j = tl.arange(0, STRIPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (o_j < n) & (mode != LOST)
    dot = tl.zeros([STRIPS, WIDTH], tl.float32)
    for i in range(0, parts):
        p_part = products + (tl.cast(i, tl.int64) * b + i_b) * n
        dot += tl.load(p_part + o_j, mask=o_j < n, other=0.0)
    sq = tl.load(sq_norms + n0 + o_j, mask=mask, other=0.0).to(tl.float32)
    bias64 = tl.load(bias + n0 + o_j, mask=mask & (has_bias != 0), other=0.0)
    mask = mask & (bias64 != -inf)
    b_b = tl.where(mask, bias64, 0.0).to(tl.float32)
    b_max = tl.max(tl.max(tl.abs(b_b), 1), 0)
    err = error_of(e0, e1, e2, e3, tl.max(tl.max(sq, 1), 0), b_max)
    t = dot * a1 - sq * a2
    t_all = err == inf

    if IS_LOG:
        half = 0.5 * D
        delta = 2.0 * err.to(tl.float64)
        r2 = 2.0 * (common - t.to(tl.float64))
        near = tl.where(t_all, 0.0, r2 - delta)
        safe = tl.where(near > 0.0, near, 1.0)
        off = tl.where(near > 0.0, half * inv_t * delta / safe, inf)
        high = tl.where(near > 0.0, (bias64 - half * tl.log(safe / D)) * inv_t, inf)
        far = tl.where(t_all | (mask == 0), inf, tl.maximum(r2 + delta, 1e-300))
        lower = (bias64 - half * tl.log(tl.where(far < inf, far, 1.0) / D)) * inv_t
        lower = tl.where(far < inf, lower, -inf)
        # Below log sum e^v of the rows so far, and of the chunk.
        least = tl.max(tl.max(lower, 1), 0)
        safe_b = tl.where(least > -inf, least, 0.0)
        sum_b = tl.where(lower > -inf, tl.exp((lower - safe_b).to(tl.float32)), 0.0)
        least += tl.log(tl.maximum(tl.sum(tl.sum(sum_b, 1), 0) * 0.9999, 1.0))
        low64 = tl.where(s0 > 0.0, m0 + tl.log(tl.where(s0 > 0.0, s0, 1.0)), -inf)
        low64 = tl.maximum(low64, least)
        low64 = tl.where((key0 == 0.0) & (s0 > 0.0), inf, low64)
        margin = LOG_THETA - tl.log(tl.minimum(tl.maximum(off, 1e-30), 1.0))
        exact = mask & (near <= 0.0)
        exact = exact | (mask & (off > THETA) & (high > low64 + margin))
    else:
        t_b = t + tl.where(hard, 0.0, b_b * inv_t.to(tl.float32))
        top = tl.max(tl.max(tl.where(mask & (t_b == t_b), t_b, -inf), 1), 0)
        # Below log sum e^t, of the chunk and of the rows so far: the errors of all t are at most
        # err. Rounded down, because what is known must stay a lower bound.
        live = mask & (t_b == t_b) & (hard == 0) & (top > -inf)
        chunk = tl.where(live, tl.exp(tl.where(live, t_b - top, 0.0)), 0.0)
        chunk = tl.log(tl.maximum(tl.sum(tl.sum(chunk, 1), 0) * 0.9999, 1.0))
        before = (s0 > 0.0) & (mode != HARD)
        known = tl.where(before, m0 + common, -inf)
        gain = tl.log(tl.where(before, s0, 1.0)) - err
        known = (known + tl.maximum(gain, 0.0)).to(tl.float32)
        known = tl.where(known > -inf, known - 1.2e-7 * tl.abs(known), known)
        low = tl.maximum(top + chunk - err, known)
        low -= 1.2e-7 * tl.abs(low)
        lo = exact_from(low, err, hard)
        exact = mask & (t_all | (t_b >= lo))

    r2_exact = tl.zeros([STRIPS, WIDTH], tl.float64)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    o_w = tl.arange(0, WIDTH)[None, :]
    left = exact
    count = tl.max(tl.sum(left.to(tl.int32), 1), 0)
    o_x = tl.zeros([STRIPS], tl.int64) + (b0 + i_b) * D
    alphas = tl.zeros([STRIPS], tl.float64) + b_alpha
    while count > 0:
        first = tl.min(tl.where(left, o_w, WIDTH), 1)
        found = first < WIDTH
        o_n = n0 + tl.arange(0, STRIPS) * WIDTH + first
        b_r2 = exact_differences(
            x, rows, o_x, tl.where(found, o_n, 0).to(tl.int64) * stride_n, alphas, scale, shift,
            found, D, STRIPS, BLOCK_D,
        )  # fmt: skip
        here = left & (o_w == first[:, None])
        r2_exact = tl.where(here, b_r2[:, None], r2_exact)
        left = left & (here == 0)
        count -= 1

    # The exact rows become (key, v) too; then only the smallest key counts.
    if IS_LOG:
        hit = exact & (r2_exact == 0.0)
        r2 = tl.where(exact, r2_exact, r2)
        v_r = -half * tl.log(tl.where(r2 > 0.0, r2, tl.where(exact, D, 1.0)) / D) * inv_t
        key = tl.where(mask, tl.where(hit, 0.0, 1.0), inf)
    else:
        # Multiplied by 1 / sigma twice, because sigma^2 underflows long before sigma does.
        per = 1.0 / tl.where(hard, 1.0, b_sigma)
        v_exact = tl.where(hard, 0.0, -0.5 * (r2_exact * per) * per * inv_t)
        v_r = tl.where(exact, v_exact, t.to(tl.float64) - common)
        key = tl.where(mask, tl.where(hard, tl.where(exact, r2_exact, inf), 0.0), inf)
    v = v_r + bias64 * inv_t
    best = tl.minimum(key0, tl.min(tl.min(key, 1), 0))
    counts = mask & (key == best) & (best < inf)
    stays = (key0 == best) & (s0 > 0.0)
    m = tl.maximum(tl.where(stays, m0, -inf), tl.max(tl.max(tl.where(counts, v, -inf), 1), 0))
    m_safe = tl.where(m == -inf, 0.0, m)
    f = tl.where(stays, tl.exp(tl.where(stays, m0 - m_safe, 0.0)), 0.0)
    gap = tl.where(counts, v - m_safe, 0.0).to(tl.float32)
    p = tl.where(counts, tl.exp(gap), 0.0)
    # With the distances' part of v by itself: that of the bias would round it away where sigma is
    # large.
    s = tl.sum(tl.sum(p.to(tl.float64), 1), 0)
    s_r = tl.sum(tl.sum(tl.where(counts, p.to(tl.float64) * v_r, 0.0), 1), 0)
    s_bias = tl.sum(tl.sum(p * b_b, 1), 0).to(tl.float64)
    s_sq = tl.sum(tl.sum(p * p, 1), 0).to(tl.float64)
    PULL_D: tl.constexpr = BLOCK_D // 4  # few enough registers beside the chunk's weights
    # Not where x is so far off that the mean, which is x plus a difference over alpha, would lose.
    # Read anew: they would take registers from the loop before.
    b_alpha = tl.load(alpha + b0 + i_b)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    # A row as it enters products is at least so large; what accumulators round is a part of that.
    norm = tl.sqrt(sq.to(tl.float64))
    norm = tl.maximum(norm, tl.load(p_t + OO * B) - norm)
    size = 16.0 * b_alpha * b_alpha * norm * norm
    close = exact & counts & (p > 0.0) & (b_alpha != 0.0)
    close = close & ((r2_exact == 0.0) | ((sq < HUGE) & (r2_exact < size)))
    tl.store(products + i_b * n + o_j, tl.where(close, 0.0, p), mask=o_j < n)
    p_close = tl.where(close, p, 0.0)
    s_near = tl.where(n0 > 0, tl.load(pulls_s + i_b, mask=n0 > 0, other=0.0), 0.0) * f
    p_near = pulls + i_b * D
    if (s_near > 0.0) & (f != 1.0):
        for d in range(0, D, PULL_D):
            o_f = d + tl.arange(0, PULL_D)
            b_near = tl.load(p_near + o_f, mask=o_f < D, other=0.0)
            tl.store(p_near + o_f, b_near * f.to(tl.float32), mask=o_f < D)
    left = close
    count = tl.max(tl.sum(left.to(tl.int32), 1), 0)
    known_near = s_near > 0.0
    while count > 0:
        first = tl.min(tl.where(left, o_w, WIDTH), 1)
        found = first < WIDTH
        here = left & (o_w == first[:, None])
        b_w = tl.sum(tl.where(here, p_close, 0.0), 1).to(tl.float64)
        o_n = (n0 + tl.arange(0, STRIPS) * WIDTH + tl.where(found, first, 0)).to(tl.int64)
        for d in range(0, D, PULL_D):
            o_f = d + tl.arange(0, PULL_D)
            m_f = found[:, None] & (o_f < D)[None, :]
            b_y = tl.load(rows + o_n[:, None] * stride_n + o_f[None, :], mask=m_f, other=0)
            b_x = tl.load(x + (b0 + i_b) * D + o_f, mask=o_f < D, other=0.0).to(tl.float64)
            diff = b_alpha * values_of(b_y, scale, shift) - b_x[None, :]
            pull = tl.sum(tl.where(m_f, b_w[:, None] * diff, 0.0), 0).to(tl.float32)
            b_near = tl.load(p_near + o_f, mask=(o_f < D) & known_near, other=0.0)
            tl.store(p_near + o_f, b_near + pull, mask=o_f < D)
        known_near = count > 0
        left = left & (here == 0)
        count -= 1
    # In float64 as s is, so that the two differ by the rows that the accumulators have.
    tl.store(pulls_s + i_b, s_near + tl.sum(tl.sum(p_close.to(tl.float64), 1), 0))
    tl.store(factor + i_b, f.to(tl.float32))
    s_v0 = tl.load(state + S_V * b + i_b, mask=n0 > 0, other=0.0)
    s_bias0 = tl.load(state + S_BIAS * b + i_b, mask=n0 > 0, other=0.0)
    s_sq0 = tl.load(state + S_SQ * b + i_b, mask=n0 > 0, other=0.0)
    drop = tl.where(stays, m0 - m_safe, 0.0)
    s_v = tl.where(f > 0.0, f * (s_v0 + s0 * drop), 0.0) + (s_r + inv_t * s_bias - m_safe * s)
    tl.store(state + KEY * b + i_b, best)
    tl.store(state + M * b + i_b, m)
    tl.store(state + S * b + i_b, s0 * f + s)
    tl.store(state + S_V * b + i_b, s_v)
    tl.store(state + S_BIAS * b + i_b, s_bias0 * f + s_bias)
    tl.store(state + S_SQ * b + i_b, s_sq0 * f * f + s_sq)


def chunk_sizes(weighting: str, products: int = 1) -> tuple[int, ...]:
    """How many rows the kernels take of a chunk. products: how many are kept of each pair; the
    backward sweep keeps two. These, and the logarithms in float64 of the weighting "log", leave the
    registers no room for the largest size."""
    return (256, 1024) if weighting == "log" or products == 2 else (256, 1024, 2048)


def chunk_size(rows: int) -> int:
    """The least of these sizes that holds so many rows."""
    return next(size for size in chunk_sizes("gaussian") if rows <= size)


def warps(size: int) -> int:
    """The warps of a program that owns a chunk of this size."""
    return {256: 4, 1024: 8, 2048: 16}[size]


def registers(size: int) -> int:
    """How many registers its threads may use: they share all of a multiprocessor's."""
    return min(255, 2048 // warps(size))


def variant(rows: torch.dtype, size: int, weighting: str) -> Variant:
    """For chunks of up to `size` rows."""
    return Variant(
        name=f"weigh {row_name(rows)} N{size} {weighting}",
        kernel=weigh_kernel,
        signature={
            "products": "*fp32", "sq_norms": "*fp64", "bias": "*fp64", "table": "*fp64",
            "x": "*fp32", "rows": POINTERS[rows], "sigma": "*fp64", "alpha": "*fp64",
            "scale_shift": "*fp64", "state": "*fp64", "factor": "*fp32",
            "pulls": "*fp32", "pulls_s": "*fp64", "B": "i32", "b0": "i32",
            "b": "i32", "n0": "i64", "n": "i32", "D": "i32", "stride_n": "i64", "parts": "i32",
            "has_bias": "i32",
        },
        constexprs={
            "IS_LOG": weighting == "log", "STRIPS": STRIPS, "WIDTH": size // STRIPS,
            "BLOCK_D": 32 if rows == torch.uint8 and size == 2048 else 64,
        },
        # With four warps the kernels spill: of float32 rows, and with Triton 3.8.0 the others too;
        # with more features that of bytes does.
        num_warps=max(warps(size), 8),
        registers=registers(size),
        aligned=("products", "sq_norms", "bias", "table", "x", "rows", "pulls", "scale_shift",
                 "n", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by weightings by sizes of chunks."""
    return [
        variant(t, size, weighting)
        for t in ROW_TYPES
        for weighting in WEIGHTINGS
        for size in chunk_sizes(weighting)
    ]
