"""Sums over a list of rows for each query, and their gradient: every logit by direct differences.

The lists lie one after the other, M pairs (query, row) in all. Products of pairs are formed by
`support_pairs_kernel`, with pairs of any queries in one program; `support_weights_kernel` makes
weights of one query's squared distances, `support_coefficients_kernel` the factors of its rows in
the gradient, and `support_sum_kernel` adds up rows times such numbers. All in float64, as the
operation promises: the rows are gathered from device memory, which takes longer.

    forward   pairs (r^2) -> weights -> sum of w y
    backward  pairs (r^2, <g, y>, <x - alpha y, y>) -> weights -> coefficients -> sum of q y
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name

# How a query is summed: the modes of csrc/query-inl.h.
SOFT, HARD, LOST = 0, 1, 3
_SOFT, _HARD = tl.constexpr(SOFT), tl.constexpr(HARD)


@triton.jit
def support_pairs_kernel(
    x,  # [B, D]
    rows,  # [N, D]
    numbers,  # [2] scale, shift
    alpha,  # [B]
    grad_mean,  # [B, D]; read backward only, as gy and xy are written
    query,  # [M]
    index,  # [M]
    r2,  # [M] out: |x - alpha y|^2
    gy,  # [M] out: <g, y>
    xy,  # [M] out: <x - alpha y, y>
    M, D, N, stride_n,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M pairs and streams their rows in blocks of BLOCK_D features. Each row
    is read once for each query that lists it. A row that does not exist has distance NaN."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = o_m < M
    b_q = tl.load(query + o_m, mask=mask_m, other=0).to(tl.int64)
    b_n = tl.load(index + o_m, mask=mask_m, other=0).to(tl.int64)
    exists = (b_n >= 0) & (b_n < N)
    mask_m = mask_m & exists
    b_alpha = tl.load(alpha + b_q)[:, None]
    scale, shift = tl.load(numbers), tl.load(numbers + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    acc_gy = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    acc_xy = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = mask_m[:, None] & (o_d < D)
        b_x = tl.load(x + b_q[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float64)
        b_y = tl.load(rows + b_n[:, None] * stride_n + o_d, mask=mask, other=0).to(tl.float64)
        b_y = tl.where(mask, b_y * scale + shift, 0.0)
        diff = b_x - b_alpha * b_y
        acc += diff * diff
        if BACKWARD:
            b_g = tl.load(grad_mean + b_q[:, None] * D + o_d, mask=mask, other=0.0)
            acc_gy += b_g * b_y
            acc_xy += diff * b_y
    inside = o_m < M
    tl.store(r2 + o_m, tl.where(exists, tl.sum(acc, 1), float("nan")), mask=inside)
    if BACKWARD:
        tl.store(gy + o_m, tl.sum(acc_gy, 1), mask=inside)
        tl.store(xy + o_m, tl.sum(acc_xy, 1), mask=inside)


@triton.jit
def _bias_of(bias, index, o_i, mask, HAS_BIAS: tl.constexpr):
    """The bias of listed rows [BLOCK]; -inf where there is no row."""
    b = tl.where(mask, 0.0, -float("inf")).to(tl.float64)
    if HAS_BIAS:
        b_n = tl.load(index + o_i, mask=mask, other=0).to(tl.int64)
        b = tl.load(bias + b_n, mask=mask, other=-float("inf"))
    return b


@triton.jit
def support_weights_kernel(
    r2,  # [M]
    index,  # [M]
    bias,  # [N]
    start,  # [B + 1]
    mode, sigma, temperature,  # [B]
    w,  # [M] out: weights
    stats,  # [6, B] out: log_z, mean_logit, mean_bias, weight_sq; E and L - E, backward's
    B,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns a query and goes over its list three times: for the nearest row and the
    largest logit, for the sums, and to divide. E, L: mean_logit and log_z, at sigma = 0 without the
    distance, which is infinite there."""
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    hard = tl.load(mode + i_b) == _HARD
    s, T = tl.load(sigma + i_b), tl.load(temperature + i_b)
    s = tl.where(hard, 1.0, s)
    b_key = tl.full([BLOCK], float("inf"), tl.float64)
    b_top = tl.full([BLOCK], -float("inf"), tl.float64)
    # Sums of what is bad: a maximum would pass over it.
    b_bad = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        mask = o_i < last
        b_r2 = tl.load(r2 + o_i, mask=mask, other=0.0)
        b_bad += b_r2 - b_r2
        b_b = _bias_of(bias, index, o_i, mask, HAS_BIAS)
        b_key = tl.minimum(b_key, tl.where(b_b > -float("inf"), b_r2, float("inf")))
        b_top = tl.maximum(b_top, (b_b - 0.5 * (b_r2 / s) / s) / T)
    key = tl.min(b_key, 0)
    m = tl.max(b_top, 0)
    if hard:  # of the nearest rows only the biases count
        b_top = tl.full([BLOCK], -float("inf"), tl.float64)
        for i in range(first, last, BLOCK):
            o_i = i + tl.arange(0, BLOCK)
            mask = o_i < last
            b_r2 = tl.load(r2 + o_i, mask=mask, other=0.0)
            b_b = _bias_of(bias, index, o_i, mask, HAS_BIAS)
            b_top = tl.maximum(b_top, tl.where(b_r2 == key, b_b / T, -float("inf")))
        m = tl.max(b_top, 0)
    some = m > -float("inf")
    m = tl.where(some, m, 0.0)
    b_s = tl.zeros([BLOCK], tl.float64)
    b_st = tl.zeros([BLOCK], tl.float64)
    b_sb = tl.zeros([BLOCK], tl.float64)
    b_sw = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        mask = o_i < last
        b_r2 = tl.load(r2 + o_i, mask=mask, other=0.0)
        b_b = _bias_of(bias, index, o_i, mask, HAS_BIAS)
        far = tl.where(hard, tl.where(b_r2 == key, 0.0, float("inf")), 0.5 * (b_r2 / s) / s)
        b_t = (b_b - far) / T - m
        b_w = tl.exp(b_t)
        b_s += b_w
        b_st += tl.where(b_w > 0, b_w * b_t, 0.0)
        b_sb += tl.where(b_w > 0, b_w * b_b, 0.0)
        b_sw += b_w * b_w
        tl.store(w + o_i, b_w, mask=mask)
    total = tl.sum(b_s, 0) + tl.sum(b_bad, 0)
    for i in range(first, last, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        mask = o_i < last
        b_w = tl.load(w + o_i, mask=mask, other=0.0)
        tl.store(w + o_i, tl.where(some, b_w / total, 0.0), mask=mask)
    mean = tl.sum(b_st, 0) / total
    E, more = T * (m + mean), T * (tl.log(total) - mean)
    away = tl.where(
        hard & (key > 0), 0.5 * (key / tl.load(sigma + i_b)) / tl.load(sigma + i_b), 0.0
    )
    to = stats + i_b
    tl.store(to, tl.where(some, E + more - away, -float("inf")))
    tl.store(to + B, tl.where(some, E - away, float("nan")))
    tl.store(to + 2 * B, tl.where(some, tl.sum(b_sb, 0) / total, float("nan")))
    tl.store(to + 3 * B, tl.where(some, tl.sum(b_sw, 0) / total / total, float("nan")))
    tl.store(to + 4 * B, tl.where(some, E, 0.0))
    tl.store(to + 5 * B, tl.where(some, more, 0.0))


@triton.jit
def support_coefficients_kernel(
    w, r2, gy, xy,  # [M]; gy is overwritten
    index,  # [M]
    bias,  # [N]
    start,  # [B + 1]
    mode, sigma, temperature,  # [B]
    stats,  # [6, B]
    grads,  # [4, B]: of log_z, mean_logit, mean_bias, weight_sq
    q,  # [M] out: the rows' factors in grad_x
    grad_b,  # [M] out: what each pair adds to its row's bias
    out,  # [4, B] out: grad_sigma, grad_alpha, grad_temperature, sum of q
    B,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns a query, not a lost one. With h = <g, y> + gE l + gb b + 2 gS w:
    q = w (gL + gE + (h - sum w h) / T), grad_sigma = sum q r^2 / sigma^3,
    grad_alpha = sum q <x - alpha y, y> / sigma^2, grad_T = gL (L - E) / T - sum w (l - E) h / T^2,
    grad_b = q + gb w. At sigma = 0 only bias and temperature still move the weights."""
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    hard = tl.load(mode + i_b) == _HARD
    s, T = tl.where(hard, 1.0, tl.load(sigma + i_b)), tl.load(temperature + i_b)
    E, more = tl.load(stats + 4 * B + i_b), tl.load(stats + 5 * B + i_b)
    # At sigma = 0 log_z and mean_logit are infinite, but for exact hits.
    finite = (hard == 0) | (tl.load(stats + i_b) > -float("inf"))
    g_l = tl.where(finite, tl.load(grads + i_b), 0.0)
    g_e = tl.where(finite, tl.load(grads + B + i_b), 0.0)
    g_b, g_s = tl.load(grads + 2 * B + i_b), tl.load(grads + 3 * B + i_b)
    b_h = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        mask = o_i < last
        b_w = tl.load(w + o_i, mask=mask, other=0.0)
        b_b = _bias_of(bias, index, o_i, mask, HAS_BIAS)
        far = tl.where(hard, 0.0, 0.5 * (tl.load(r2 + o_i, mask=mask, other=0.0) / s) / s)
        h = tl.load(gy + o_i, mask=mask, other=0.0)
        h += g_e * (b_b - far - E) + g_b * b_b + 2 * g_s * b_w  # but for a constant
        h = tl.where(b_w == 0, 0.0, h)
        b_h += b_w * h
        tl.store(gy + o_i, h, mask=mask)
    mean_h = tl.sum(b_h, 0)
    b_sigma = tl.zeros([BLOCK], tl.float64)
    b_alpha = tl.zeros([BLOCK], tl.float64)
    b_temp = tl.zeros([BLOCK], tl.float64)
    b_total = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        mask = o_i < last
        b_w = tl.load(w + o_i, mask=mask, other=0.0)
        b_b = _bias_of(bias, index, o_i, mask, HAS_BIAS)
        b_r2 = tl.where(hard, 0.0, tl.load(r2 + o_i, mask=mask, other=0.0))
        h = tl.load(gy + o_i, mask=mask, other=0.0) - mean_h
        c = b_w * (g_l + g_e + h / T)
        none = b_w == 0
        b_temp += tl.where(none, 0.0, b_w * (b_b - 0.5 * (b_r2 / s) / s - E) * h)
        c = tl.where(none, 0.0, c)
        moved = tl.where(hard, 0.0, c)
        b_sigma += tl.where(none, 0.0, moved * ((b_r2 / s) / s))
        b_alpha += tl.where(none, 0.0, moved * tl.load(xy + o_i, mask=mask, other=0.0))
        b_total += moved
        tl.store(q + o_i, moved, mask=mask)
        tl.store(grad_b + o_i, c + g_b * b_w, mask=mask)
    tl.store(out + i_b, tl.sum(b_sigma, 0) / s)
    tl.store(out + B + i_b, tl.sum(b_alpha, 0) / s / s)
    tl.store(out + 2 * B + i_b, g_l * more / T - tl.sum(b_temp, 0) / T / T)
    tl.store(out + 3 * B + i_b, tl.sum(b_total, 0))


@triton.jit
def support_sum_kernel(
    w,  # [M]
    index,  # [M]
    rows,  # [N, D]
    numbers,  # [2] scale, shift
    start,  # [B + 1]
    out,  # [parts, B, D] out
    B, D, stride_n, parts,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D features of a query's sum and a part of its list: writes the part's
    sum of w y. Rows without weight are not read; the others once."""
    n_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    i_d, i_b, i_p = pid % n_d, pid // n_d % B, pid // n_d // B
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    count = last - first
    last = first + (i_p + 1) * count // parts
    first = first + i_p * count // parts
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    scale, shift = tl.load(numbers), tl.load(numbers + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    for i in range(first, last, BLOCK_M):
        o_i = i + tl.arange(0, BLOCK_M)
        b_w = tl.load(w + o_i, mask=o_i < last, other=0.0)
        b_n = tl.load(index + o_i, mask=(o_i < last) & (b_w == b_w), other=0).to(tl.int64)
        mask = (b_w != 0)[:, None] & (o_d < D)
        # [BLOCK_M, BLOCK_D]
        b_y = tl.load(rows + b_n[:, None] * stride_n + o_d, mask=mask, other=0).to(tl.float64)
        acc += tl.where(mask, b_w[:, None] * (b_y * scale + shift), 0.0)
    tl.store(out + (i_p * B + i_b) * D + o_d, tl.sum(acc, 0), mask=o_d < D)


def pairs_variant(dtype: torch.dtype, backward: bool) -> Variant:
    """The products of pairs."""
    names = ("x", "rows", "numbers", "alpha", "grad_mean", "query", "index", "r2", "gy", "xy")
    return Variant(
        name=f"support_pairs {row_name(dtype)} {'backward' if backward else 'forward'}",
        kernel=support_pairs_kernel,
        signature={
            "x": "*fp32", "rows": POINTERS[dtype], "numbers": "*fp64", "alpha": "*fp64",
            "grad_mean": "*fp64", "query": "*i64", "index": "*i64", "r2": "*fp64", "gy": "*fp64",
            "xy": "*fp64", "M": "i32", "D": "i32", "N": "i32", "stride_n": "i64",
        },
        constexprs={"BACKWARD": backward, "BLOCK_M": 16, "BLOCK_D": 64 if backward else 128},
        num_warps=4, num_stages=2, aligned=(*names, "D", "stride_n"),
    )  # fmt: skip


def _of_lists(what: str, kernel: Any, floats: tuple[str, ...], biased: bool) -> Variant:
    """One program for each list, whose arguments are float64 but for the list itself."""
    return Variant(
        name=f"support_{what} {'bias' if biased else 'plain'}",
        kernel=kernel,
        signature={
            **dict.fromkeys(floats, "*fp64"), "index": "*i64", "start": "*i64",
            "mode": "*i32", "B": "i32",
        },
        constexprs={"HAS_BIAS": biased, "BLOCK": 512},
        num_warps=4, num_stages=1, aligned=(*floats, "index", "start", "mode"), registers=168,
    )  # fmt: skip


def weights_variant(biased: bool) -> Variant:
    """The weights of a list."""
    floats = ("r2", "bias", "sigma", "temperature", "w", "stats")
    return _of_lists("weights", support_weights_kernel, floats, biased)


def coefficients_variant(biased: bool) -> Variant:
    """The rows' factors in the gradient."""
    floats = (
        "w", "r2", "gy", "xy", "bias", "sigma", "temperature", "stats", "grads", "q", "grad_b",
        "out",
    )  # fmt: skip
    return _of_lists("coefficients", support_coefficients_kernel, floats, biased)


def sum_variant(dtype: torch.dtype) -> Variant:
    """Sums of rows."""
    return Variant(
        name=f"support_sum {row_name(dtype)}",
        kernel=support_sum_kernel,
        signature={
            "w": "*fp64", "index": "*i64", "rows": POINTERS[dtype], "numbers": "*fp64",
            "start": "*i64", "out": "*fp64", "B": "i32", "D": "i32", "stride_n": "i64",
            "parts": "i32",
        },
        constexprs={"BLOCK_M": 16, "BLOCK_D": 128},
        num_warps=4, num_stages=2, registers=128,
        aligned=("w", "index", "rows", "numbers", "start", "out", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by directions; with and without a bias."""
    pairs = [pairs_variant(t, backward) for t in ROW_TYPES for backward in (False, True)]
    lists = [make(b) for make in (weights_variant, coefficients_variant) for b in (False, True)]
    return pairs + lists + [sum_variant(t) for t in ROW_TYPES]
