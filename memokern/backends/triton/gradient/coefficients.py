"""Between the products of the backward sweep: from two products to the coefficients of the pairs.

The gradient is a sum over the rows of q times the derivative of the row's logit. q, the coefficient
of a pair, follows from the pair's weight, the incoming gradients g of the mean, and those of the
other sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.exactness import LOG_THETA, THETA, error_of, exact_from
from memokern.backends.triton.core.operands import (
    operand_of,
    power_of_two,
    store_terms,
    values_of,
)
from memokern.backends.triton.core.query_table import (
    A1,
    A2,
    COMMON,
    DOT,
    E0,
    E1,
    E2,
    E3,
    HARD,
    INV_T,
    LOST,
    MODE,
    SOFT,
    XO,
)
from memokern.backends.triton.core.variant import FLOAT_ROWS, POINTERS, ROW_TYPES, Variant, row_name
from memokern.backends.triton.posterior.weigh import STRIPS, chunk_sizes, registers, warps
from memokern.calls import WEIGHTINGS

# The rows of a query's sums over the data, [SUMS, b] float64. w are the weights; h is what
# multiplies d w; q = w (...) multiplies d l; and d l / d x = c (alpha y - x) / sigma^2. The sums:
#   W: of w. Q: of q. QC: of q c, without the rows that are evaluated exactly. QL: of q (l - b).
#   QA: of q c <x - alpha y, yc>. WA: of w <x - alpha y, yc>. TEMP: of w (l - E) h.
#   DRIFT: of w <g, y - mean> / T, which is zero but for rounding, and is subtracted at the end.
W, DRIFT, Q, QC, QL, QA, WA, TEMP = (tl.constexpr(i) for i in range(8))
SUMS = 8


@triton.jit
def split_gradients_kernel(
    grad_mean, mean,  # [B, D]
    scale_shift,  # [2]
    terms,  # [TERMS, B, D] out
    grad_table,  # [3, B] out
    B, D, offset,
    TERMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The incoming gradients g of the mean, split into terms as queries are. With <g, u> their
    product with a stored row, <g, y - mean> is grad_table[0] <g, u> + grad_table[1]; grad_table[2]
    is for what the mean's rounding does to it, which is not known yet. One program owns a query."""
    i_b = tl.program_id(0).to(tl.int64)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1) - offset * tl.load(scale_shift)
    top = tl.zeros([BLOCK_D], tl.float32)
    rest = tl.zeros([BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_g = tl.load(grad_mean + i_b * D + o_d, mask=o_d < D, other=0.0)
        b_mean = tl.load(mean + i_b * D + o_d, mask=o_d < D, other=0.0)
        top = tl.maximum(top, tl.abs(b_g))
        rest += b_g.to(tl.float64) * (shift - b_mean.to(tl.float64))
    p2 = power_of_two(tl.max(top, 0))
    tl.store(grad_table + i_b, scale * (p2.to(tl.float64) / 128.0))
    tl.store(grad_table + B + i_b, tl.sum(rest, 0))
    tl.store(grad_table + 2 * B + i_b, 0.0)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_g = tl.load(grad_mean + i_b * D + o_d, mask=o_d < D, other=0.0) * (128.0 / p2)
        store_terms(b_g, terms + i_b * D + o_d, tl.cast(B, tl.int64) * D, o_d < D, TERMS)


@triton.jit
def coefficients_kernel(
    products,  # [parts, b, n] in: parts of <x, u>; the first one out: q c / unit, 0 for rows that
               # are evaluated exactly; FOR_ROWS: q c of all rows
    products_g,  # [parts, b, n] in: parts of <g, u>; the first one out: the pair's part of the
                 # bias's gradient; FOR_ROWS: w
    sq_norms,  # [N]
    bias,  # [N], read if has_bias
    table,  # [TABLE, B]
    grad_table,  # [3, B]; the last is read FOR_ROWS
    x, mean, grad_mean,  # [B, D]
    rows,  # [N, D]
    sigma, alpha, temperature,  # [B]
    center,  # [D]
    scale_shift,  # [2]
    stats,  # [4, B] log_z, mean_logit, mean_bias, weight_sq
    far,  # [5, B] from far_sums_kernel: a part of r^2, and stats without what it makes of logits
    grads,  # [4, B] of these
    sums,  # [SUMS, b] in and out
    near,  # [b, D] in and out: sum of q c (alpha y - x) of the rows that are evaluated exactly
    factor, unit,  # [b] out
    B, b0, b, n0, n, D, stride_n, parts, has_bias,
    FOR_ROWS: tl.constexpr, IS_LOG: tl.constexpr, STRIPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a query and the chunk's rows, as STRIPS strips of WIDTH. It adds the chunk
    to the query's sums, and writes coefficients. Rows whose weight the error of the products could
    change are taken by direct differences in float64, one of each strip at a time; so is their part
    of grad_x, which would cancel in a sum of products where the row is near. FOR_ROWS: sums and
    near are left alone, and coefficients and weights are written for `row_gradient_kernel`."""
    i_b = tl.program_id(0).to(tl.int64)
    to = b0 + i_b
    p_t = table + to
    mode = tl.load(p_t + MODE * B).to(tl.int32)
    a1, a2 = tl.load(p_t + A1 * B).to(tl.float32), tl.load(p_t + A2 * B).to(tl.float32)
    inv_t, common = tl.load(p_t + INV_T * B), tl.load(p_t + COMMON * B)
    e0, e1 = tl.load(p_t + E0 * B).to(tl.float32), tl.load(p_t + E1 * B).to(tl.float32)
    e2, e3 = tl.load(p_t + E2 * B).to(tl.float32), tl.load(p_t + E3 * B).to(tl.float32)
    b_sigma, b_alpha = tl.load(sigma + to), tl.load(alpha + to)
    T = tl.load(temperature + to)
    log_z, E = tl.load(stats + to), tl.load(stats + B + to)
    Eb, S = tl.load(stats + 2 * B + to), tl.load(stats + 3 * B + to)
    g_l, g_e = tl.load(grads + to), tl.load(grads + B + to)
    g_b, g_s = tl.load(grads + 2 * B + to), tl.load(grads + 3 * B + to)
    inf = float("inf")
    # At sigma = 0, or where the row is hit, nothing moves x; `tie_gradients_kernel` does the rest.
    moves = (mode != LOST) & (mode != HARD) & (log_z < inf)
    shared = tl.where(mode == SOFT, common, 0.0)  # t is l / T + shared
    tz, te = log_z * inv_t + shared, E * inv_t + shared
    # Where one row has nearly all weight, the gradient is made of the others, and their weights
    # must be right to a share of what these have together.
    spread = tl.log(tl.minimum(tl.maximum(1.0 - S, 1e-7), 1.0)).to(tl.float32)

    # [STRIPS, WIDTH], as all that follows
    o_j = tl.arange(0, STRIPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (o_j < n) & moves
    dot = tl.zeros([STRIPS, WIDTH], tl.float32)
    dot_g = tl.zeros([STRIPS, WIDTH], tl.float32)
    for i in range(0, parts):
        at = (tl.cast(i, tl.int64) * b + i_b) * n + o_j
        dot += tl.load(products + at, mask=mask, other=0.0)
        dot_g += tl.load(products_g + at, mask=mask, other=0.0)
    sq = tl.load(sq_norms + n0 + o_j, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(bias + n0 + o_j, mask=mask & (has_bias != 0), other=0.0).to(tl.float32)
    mask = mask & (b_b != -inf)
    b_b = tl.where(mask, b_b, 0.0)
    b_max = tl.max(tl.max(tl.abs(b_b), 1), 0)
    err = error_of(e0, e1, e2, e3, tl.max(tl.max(sq, 1), 0), b_max)
    t = dot * a1 - sq * a2
    unknown = err == inf
    c = tl.full([STRIPS, WIDTH], 1.0, tl.float32)
    if IS_LOG:
        half = 0.5 * D
        delta = 2.0 * err.to(tl.float64)
        r2 = 2.0 * (common - t.to(tl.float64))
        close = tl.where(unknown, 0.0, r2 - delta)
        safe = tl.where(close > 0.0, close, 1.0)
        off = tl.where(close > 0.0, half * inv_t * delta / safe, inf)
        high = (b_b - half * tl.log(safe / D)) * inv_t
        margin = LOG_THETA + spread - tl.log(tl.minimum(tl.maximum(off, 1e-30), 1.0))
        exact = mask & ((close <= 0.0) | ((off > THETA) & (high > tz + margin)))
        r2 = tl.where(mask & (exact == 0), r2, 1.0)
        t64 = (b_b - half * tl.log(r2 / D)) * inv_t
        c = (D / r2).to(tl.float32)
        gap_z, gap_e = (t64 - tz).to(tl.float32), (t64 - te).to(tl.float32)
        l_b = (t64 * T - b_b).to(tl.float32)
    else:
        lo = exact_from(tz.to(tl.float32), err, mode == HARD) + spread
        t_b = t + b_b * inv_t.to(tl.float32)
        exact = mask & (unknown | (t_b >= lo))
        t64 = t_b.to(tl.float64)
        gap_z, gap_e = (t64 - tz).to(tl.float32), (t64 - te).to(tl.float32)
        l_b = ((t.to(tl.float64) - common) * T).to(tl.float32)
    rest = mask & (exact == 0)
    w = tl.where(rest, tl.exp(tl.where(rest, tl.minimum(gap_z, 80.0), 0.0)), 0.0)
    it32 = inv_t.to(tl.float32)
    g_scale, g_rest = (
        tl.load(grad_table + to).to(tl.float32),
        tl.load(grad_table + B + to).to(tl.float32),
    )
    drift = tl.load(grad_table + 2 * B + to) if FOR_ROWS else tl.cast(0.0, tl.float64)
    hg = (dot_g * g_scale + (g_rest - drift.to(tl.float32))) * it32
    ho = g_e.to(tl.float32) * gap_e + (g_b * inv_t).to(tl.float32) * (b_b - Eb.to(tl.float32))
    ho += (2.0 * g_s * inv_t).to(tl.float32) * (w - S.to(tl.float32))
    q = tl.where(rest, w * ((g_l + g_e).to(tl.float32) + hg + ho), 0.0)
    qc = q * c
    p_near = near + i_b * D
    if FOR_ROWS:
        # The rows' gradient is NaN where a query is lost.
        none = tl.where(mode == LOST, float("nan"), 0.0)
        tl.store(products + i_b * n + o_j, qc, mask=(o_j < n) & (exact == 0))
        tl.store(products_g + i_b * n + o_j, w + none, mask=(o_j < n) & (exact == 0))
    else:
        xy = dot * tl.load(p_t + DOT * B).to(tl.float32) + tl.load(p_t + XO * B).to(tl.float32)
        xy = tl.where(rest, xy - b_alpha.to(tl.float32) * sq, 0.0)
        z_w = tl.sum(tl.sum(w, 1), 0).to(tl.float64)
        z_drift = tl.sum(tl.sum(tl.where(rest, w * hg, 0.0), 1), 0).to(tl.float64)
        z_q = tl.sum(tl.sum(q, 1), 0).to(tl.float64)
        z_qc = tl.sum(tl.sum(qc, 1), 0).to(tl.float64)
        z_ql = tl.sum(tl.sum(tl.where(rest, q * l_b, 0.0), 1), 0).to(tl.float64)
        z_qa = tl.sum(tl.sum(qc * xy, 1), 0).to(tl.float64)
        z_wa = tl.sum(tl.sum(w * xy, 1), 0).to(tl.float64)
        z_t = tl.sum(tl.sum(tl.where(rest, w * gap_e * (hg + ho), 0.0), 1), 0).to(tl.float64) * T
        size = tl.max(tl.max(tl.abs(qc), 1), 0)
        one = tl.where(size > 0.0, power_of_two(size) * 2.0, 1.0)
        tl.store(unit + i_b, one)
        tl.store(factor + i_b, tl.where(n0 > 0, 1.0, 0.0))
        tl.store(products + i_b * n + o_j, qc / one, mask=o_j < n)
        moved = tl.where(rest, q + g_b.to(tl.float32) * w, 0.0)
        tl.store(products_g + i_b * n + o_j, moved, mask=(o_j < n) & (exact == 0) & (has_bias != 0))
        if n0 == 0:
            for d in range(0, D, BLOCK_D):
                o_f = d + tl.arange(0, BLOCK_D)
                tl.store(p_near + o_f, tl.zeros([BLOCK_D], tl.float32), mask=o_f < D)
            tl.debug_barrier()

    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    o_w = tl.arange(0, WIDTH)[None, :]
    left = exact
    count = tl.max(tl.sum(left.to(tl.int32), 1), 0)
    base, far_z, far_e = tl.load(far + to), tl.load(far + B + to), tl.load(far + 2 * B + to)
    far_b, far_s = tl.load(far + 3 * B + to), tl.load(far + 4 * B + to)
    while count > 0:
        first = tl.min(tl.where(left, o_w, WIDTH), 1)
        found = first < WIDTH
        left = left & (o_w != first[:, None])
        count -= 1
        o_n = tl.arange(0, STRIPS) * WIDTH + tl.where(found, first, 0)
        p_y = rows + (n0 + o_n).to(tl.int64)[:, None] * stride_n
        s_r = tl.zeros([STRIPS, BLOCK_D], tl.float64)
        s_a = tl.zeros([STRIPS, BLOCK_D], tl.float64)
        s_g = tl.zeros([STRIPS, BLOCK_D], tl.float64)
        for d in range(0, D, BLOCK_D):
            o_d = (d + tl.arange(0, BLOCK_D))[None, :]
            m_d = found[:, None] & (o_d < D)
            v_x = tl.load(x + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
            v_g = tl.load(grad_mean + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
            v_m = tl.load(mean + to * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
            v_c = tl.load(center + o_d, mask=o_d < D, other=0.0)
            v_y = values_of(tl.load(p_y + o_d, mask=m_d, other=0), scale, shift)
            diff = tl.where(m_d, v_x - b_alpha * v_y, 0.0)
            s_r += diff * diff
            s_a += diff * (v_y - v_c)
            s_g += tl.where(m_d, v_g * (v_y - v_m), 0.0)
        x_r2, x_xy, x_hg = tl.sum(s_r, 1), tl.sum(s_a, 1), (tl.sum(s_g, 1) - drift) * inv_t
        x_b = tl.load(bias + n0 + o_n, mask=found & (has_bias != 0), other=0.0)
        if IS_LOG:
            x_r2 = tl.where(found, x_r2, 1.0)
            x_lb = -0.5 * D * tl.log(x_r2 / D)
            x_c = D / x_r2
            x_l = x_lb + x_b
        else:
            x_lb = -0.5 * (x_r2 / b_sigma) / b_sigma
            x_c = x_r2 * 0.0 + 1.0
            x_l = -0.5 * ((x_r2 - base) / b_sigma) / b_sigma + x_b
        x_w = tl.where(found, tl.exp((x_l - far_z) * inv_t), 0.0)
        x_le = x_l - far_e
        x_ho = (g_e * x_le + g_b * (x_b - far_b) + 2.0 * g_s * (x_w - far_s)) * inv_t
        x_q = x_w * (g_l + g_e + x_hg + x_ho)
        if FOR_ROWS:
            tl.store(products + i_b * n + o_n, (x_q * x_c).to(tl.float32), mask=found)
            tl.store(products_g + i_b * n + o_n, x_w.to(tl.float32), mask=found)
        else:
            z_w += tl.sum(x_w, 0)
            z_drift += tl.sum(x_w * x_hg, 0)
            z_q += tl.sum(x_q, 0)
            z_ql += tl.sum(x_q * x_lb, 0)
            z_qa += tl.sum(x_q * x_c * x_xy, 0)
            z_wa += tl.sum(x_w * x_xy, 0)
            z_t += tl.sum(x_w * x_le * (x_hg + x_ho), 0)
            x_moved = (x_q + g_b * x_w).to(tl.float32)
            tl.store(products_g + i_b * n + o_n, x_moved, mask=found & (has_bias != 0))
            for d in range(0, D, BLOCK_D):
                o_f = d + tl.arange(0, BLOCK_D)
                m_f = found[:, None] & (o_f < D)[None, :]
                u_x = tl.load(x + to * D + o_f, mask=o_f < D, other=0.0).to(tl.float64)
                u_y = values_of(tl.load(p_y + o_f[None, :], mask=m_f, other=0), scale, shift)
                pulls_x = (x_q * x_c)[:, None] * (b_alpha * u_y - u_x[None, :])
                old = tl.load(p_near + o_f, mask=o_f < D, other=0.0)
                new = old + tl.sum(tl.where(m_f, pulls_x, 0.0), 0).to(tl.float32)
                tl.store(p_near + o_f, new, mask=o_f < D)

    if not FOR_ROWS:
        p_z = sums + i_b
        later = n0 > 0
        tl.store(p_z + W * b, tl.load(p_z + W * b, mask=later, other=0.0) + z_w)
        tl.store(p_z + DRIFT * b, tl.load(p_z + DRIFT * b, mask=later, other=0.0) + z_drift)
        tl.store(p_z + Q * b, tl.load(p_z + Q * b, mask=later, other=0.0) + z_q)
        tl.store(p_z + QC * b, tl.load(p_z + QC * b, mask=later, other=0.0) + z_qc)
        tl.store(p_z + QL * b, tl.load(p_z + QL * b, mask=later, other=0.0) + z_ql)
        tl.store(p_z + QA * b, tl.load(p_z + QA * b, mask=later, other=0.0) + z_qa)
        tl.store(p_z + WA * b, tl.load(p_z + WA * b, mask=later, other=0.0) + z_wa)
        tl.store(p_z + TEMP * b, tl.load(p_z + TEMP * b, mask=later, other=0.0) + z_t)


def split_gradients_variant(rows: torch.dtype) -> Variant:
    """For products with rows of a type."""
    operand = operand_of(rows, "tf32x3")
    return Variant(
        name=f"split_gradients {row_name(rows)}",
        kernel=split_gradients_kernel,
        signature={
            "grad_mean": "*fp32", "mean": "*fp32", "scale_shift": "*fp64",
            "terms": POINTERS[operand.dtype], "grad_table": "*fp64", "B": "i32", "D": "i32",
            "offset": "fp32",
        },
        constexprs={"TERMS": operand.terms, "BLOCK_D": 1024},
        aligned=("grad_mean", "mean", "scale_shift", "terms", "grad_table", "D"),
    )  # fmt: skip


def coefficients_variant(
    rows: torch.dtype, size: int, weighting: str, for_rows: bool = False
) -> Variant:
    """For chunks of up to `size` rows."""
    wide = ("sq_norms", "bias", "table", "grad_table", "sigma", "alpha", "temperature", "center",
            "scale_shift", "stats", "far", "grads", "sums")  # fmt: skip
    return Variant(
        name=f"coefficients {row_name(rows)} N{size} {weighting}" + " for rows" * for_rows,
        kernel=coefficients_kernel,
        signature={
            "products": "*fp32", "products_g": "*fp32", **dict.fromkeys(wide, "*fp64"),
            "x": "*fp32", "mean": "*fp32", "grad_mean": "*fp32", "rows": POINTERS[rows],
            "near": "*fp32", "factor": "*fp32", "unit": "*fp32", "B": "i32", "b0": "i32",
            "b": "i32", "n0": "i64", "n": "i32", "D": "i32", "stride_n": "i64", "parts": "i32",
            "has_bias": "i32",
        },
        constexprs={
            "FOR_ROWS": for_rows, "IS_LOG": weighting == "log", "STRIPS": STRIPS,
            "WIDTH": size // STRIPS, "BLOCK_D": 32,
        },
        num_warps=warps(size),
        registers=registers(size),
        aligned=("products", "products_g", "sq_norms", "bias", "x", "mean", "grad_mean", "rows",
                 "center", "near", "n", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types; and these by weightings, by sizes of chunks, and by what has a gradient."""
    return [split_gradients_variant(t) for t in ROW_TYPES] + [
        coefficients_variant(t, size, weighting, for_rows)
        for t in ROW_TYPES
        for weighting in WEIGHTINGS
        for size in chunk_sizes(weighting, products=2)
        for for_rows in (False, True)
        if not for_rows or t in FLOAT_ROWS
    ]
