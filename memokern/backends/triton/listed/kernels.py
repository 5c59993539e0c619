"""Sums over a list of rows for each query, and their gradient: every logit by direct differences.

The lists lie one after the other and are M pairs (query, row) in all. The distances of pairs, and
their products, come from `pairs_kernel` (:mod:`memokern.backends.triton.core.pairs`). From one
query's squared distances `listed_weights_kernel` makes weights, `listed_coefficients_kernel` the
factors of its rows in the gradient, and `listed_sum_kernel` adds up rows times such numbers. All is
in float64, as the operation promises; gathering the rows from device memory takes longer.

    forward   pairs (r^2) -> weights -> sum of w y
    backward  pairs (r^2, <g, y>, <x - alpha y, y>) -> weights -> coefficients -> sum of q y
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.operands import values_of
from memokern.backends.triton.core.query_table import HARD
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name


@triton.jit
def _bias_of(bias, index, o_i, mask, HAS_BIAS: tl.constexpr):
    """The bias of listed rows [BLOCK]; -inf where there is no row."""
    b = tl.where(mask, 0.0, -float("inf")).to(tl.float64)
    if HAS_BIAS:
        b_n = tl.load(index + o_i, mask=mask, other=0).to(tl.int64)
        b = tl.load(bias + b_n, mask=mask, other=-float("inf"))
    return b


@triton.jit
def listed_weights_kernel(
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
    largest logit, for the sums, and to divide. E and L are mean_logit and log_z; at sigma = 0 they
    lack the distance, which is infinite there."""
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    hard = tl.load(mode + i_b) == HARD
    s, T = tl.load(sigma + i_b), tl.load(temperature + i_b)
    s = tl.where(hard, 1.0, s)
    b_key = tl.full([BLOCK], float("inf"), tl.float64)
    b_top = tl.full([BLOCK], -float("inf"), tl.float64)
    # NaN where a distance is not finite; a maximum would pass over it.
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
    if hard:  # only the nearest rows count, and only their biases
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
def listed_coefficients_kernel(
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
    """One program owns a query; what it writes of a lost one is not used. With
    h = <g, y> + gE l + gb b + 2 gS w it is q = w (gL + gE + (h - sum w h) / T),
    grad_sigma = sum q r^2 / sigma^3, grad_alpha = sum q <x - alpha y, y> / sigma^2,
    grad_T = gL (L - E) / T - sum w (l - E) h / T^2, and grad_b = q + gb w. At sigma = 0 only bias
    and temperature still move the weights."""
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    hard = tl.load(mode + i_b) == HARD
    s, T = tl.where(hard, 1.0, tl.load(sigma + i_b)), tl.load(temperature + i_b)
    E, more = tl.load(stats + 4 * B + i_b), tl.load(stats + 5 * B + i_b)
    # At sigma = 0 log_z and mean_logit are infinite, unless a row is hit exactly.
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
        h += g_e * (b_b - far - E) + g_b * b_b + 2 * g_s * b_w  # up to a constant
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
def listed_sum_kernel(
    w,  # [M]
    index,  # [M]
    rows,  # [N, D]
    scale_shift,  # [2]
    start,  # [B + 1]
    out,  # [parts, B, D] out
    B, D, stride_n, parts,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D features of a query's sum and a part of its list, and writes the
    part's sum of w y. Rows without weight are not read, and the others once."""
    n_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    i_d, i_b, i_p = pid % n_d, pid // n_d % B, pid // n_d // B
    first, last = tl.load(start + i_b), tl.load(start + i_b + 1)
    count = last - first
    last = first + (i_p + 1) * count // parts
    first = first + i_p * count // parts
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    for i in range(first, last, BLOCK_M):
        o_i = i + tl.arange(0, BLOCK_M)
        b_w = tl.load(w + o_i, mask=o_i < last, other=0.0)
        b_n = tl.load(index + o_i, mask=(o_i < last) & (b_w == b_w), other=0).to(tl.int64)
        mask = (b_w != 0)[:, None] & (o_d < D)
        # [BLOCK_M, BLOCK_D]
        b_y = tl.load(rows + b_n[:, None] * stride_n + o_d, mask=mask, other=0)
        acc += tl.where(mask, b_w[:, None] * values_of(b_y, scale, shift), 0.0)
    tl.store(out + (i_p * B + i_b) * D + o_d, tl.sum(acc, 0), mask=o_d < D)


def _of_lists(what: str, kernel: Any, floats: tuple[str, ...], biased: bool) -> Variant:
    """A kernel of one program for each list. Its arguments are float64, but for the list itself."""
    return Variant(
        name=f"listed_{what} {'bias' if biased else 'plain'}",
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
    return _of_lists("weights", listed_weights_kernel, floats, biased)


def coefficients_variant(biased: bool) -> Variant:
    """The rows' factors in the gradient."""
    floats = (
        "w", "r2", "gy", "xy", "bias", "sigma", "temperature", "stats", "grads", "q", "grad_b",
        "out",
    )  # fmt: skip
    return _of_lists("coefficients", listed_coefficients_kernel, floats, biased)


def sum_variant(dtype: torch.dtype) -> Variant:
    """Sums of rows."""
    return Variant(
        name=f"listed_sum {row_name(dtype)}",
        kernel=listed_sum_kernel,
        signature={
            "w": "*fp64", "index": "*i64", "rows": POINTERS[dtype], "scale_shift": "*fp64",
            "start": "*i64", "out": "*fp64", "B": "i32", "D": "i32", "stride_n": "i64",
            "parts": "i32",
        },
        constexprs={"BLOCK_M": 16, "BLOCK_D": 128},
        num_warps=4, num_stages=2, registers=128,
        aligned=("w", "index", "rows", "scale_shift", "start", "out", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """With and without a bias; row types."""
    lists = [make(b) for make in (weights_variant, coefficients_variant) for b in (False, True)]
    return lists + [sum_variant(t) for t in ROW_TYPES]
