"""What the kernels of the posterior share: how rows become operands, and queries sums of operands.

Rows enter the products as they are stored, so that they go from memory to the tensor cores without
arithmetic: float32, bfloat16 and float16 as they are, uint8 as float16(raw - 128), which is exact.
A query is split into terms of that type whose sum it is to float32's precision, scaled by a power
of two per query that keeps float16 in its range. Centring is algebra: with y = scale u + shift',
<xc, y - c> = scale <xc, u> + <xc, shift' - c>, and the last part is one number per query.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Rows of the table of queries that `queries_kernel` writes, [NUMBERS, B] float64. With <x, u> the
# product of the query's terms and a row as it enters products, t = a1 <x, u> - a2 |yc|^2 (+ b / T)
# is (l / T + common) to an error of e0 + e1 |yc| + e2 |yc|^2 + e3 |b|. At sigma = 0 and in the log
# kernel t lacks the bias, and r^2 = 2 (common - t).
# <xc, yc> is DOT <x, u> + XO.
A1, A2, INV_T, COMMON, E0, E1, E2, E3, MODE, DOT, XO = (tl.constexpr(i) for i in range(11))
NUMBERS = 11
SOFT, HARD, LOG, LOST = (tl.constexpr(i) for i in range(4))
# Rows of a state: only the smallest key counts (the squared distance when sigma = 0; 0 for an exact
# hit of the log kernel, 1 for its other rows); of the rows of that key, m is the largest v = l / T
# (at a limit without the distance; never with what t has beyond it, in which it would drown), and
# s, st, sb, sw2 are the sums of e^(v-m), e^(v-m) (v-m), e^(v-m) b, e^(2(v-m)).
KEY, M, S, ST, SB, SW2 = (tl.constexpr(i) for i in range(6))
STATE = 6
# A row whose weight the error of its logit could change by more than this is evaluated exactly.
THETA = tl.constexpr(1e-6)
LOG_THETA = tl.constexpr(math.log(1e-6))
HUGE = tl.constexpr(1e30)  # an error beyond it means that nothing is known

UNIT_ROUNDING = 2.0**-24


class Operand(NamedTuple):
    """A row type in the products: the type and number of a query's terms, the errors of a product
    of two vectors in units of 2^-24 |x||y|, and what is added to a row as stored."""

    dtype: torch.dtype
    terms: int
    rounding: float
    offset: float


def operand(rows: torch.dtype, precision: str) -> Operand:
    """How rows of this type are multiplied. ``precision`` is that of float32 rows.

    Rounding, in units of 2^-24 relative to |x||y|: tf32x3 cuts both small parts off after 10 bits
    (2^-21 each on average) and leaves their product out (2^-22), which is 20; two terms of float16
    carry 22 bits, three of bfloat16 all 24. To these comes the last rounding of t.
    """
    if rows == torch.float32:
        return Operand(torch.float32, 1, 24.0 if precision == "tf32x3" else 4.0, 0.0)
    if rows == torch.bfloat16:
        return Operand(torch.bfloat16, 3, 4.0, 0.0)
    return Operand(torch.float16, 2, 6.0, -128.0 if rows == torch.uint8 else 0.0)


def product_errors(how: Operand, features: int) -> tuple[float, float]:
    """What |t - t exact| is relative to |a1||x||y|: as estimated, and bounded for any data.

    Tensor cores cut sums off: a chain of D / 8 additions, each short by at most 2^-23 of a partial
    sum, by 2^-24 on average, of sums that grow along the chain. CUDA cores round, sqrt(D) / 2.
    """
    chain = max(features / 16, 0.5 * math.sqrt(features))
    likely = how.rounding + chain
    bound = 2 * how.rounding + 2 * features + 64
    return likely * UNIT_ROUNDING, bound * UNIT_ROUNDING


@triton.jit
def as_operand(raw):
    """Rows as loaded, as they enter products."""
    if raw.dtype == tl.uint8:
        return raw.to(tl.float16) - 128.0
    else:
        return raw


@triton.jit
def power_of_two(v):
    """The largest power of two that is at most v, for a float32 v; 1 where v is 0 or subnormal."""
    bits = v.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)


@triton.jit
def store_terms(v, pointers, stride, mask, TERMS: tl.constexpr):
    """Write v, float32, as TERMS tensors of the pointers' type whose sum it is."""
    for i in tl.static_range(TERMS):
        term = v.to(pointers.dtype.element_ty)
        tl.store(pointers + i * stride, term, mask=mask)
        v -= term.to(tl.float32)


@triton.jit
def dot_terms(pointers, stride, mask, b_u, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + X U', the terms of X [BLOCK_B, BLOCK_D] read from memory, U [BLOCK_N, BLOCK_D]."""
    for i in tl.static_range(TERMS):
        b_x = tl.load(pointers + i * stride, mask=mask, other=0.0)
        acc = tl.dot(b_x, tl.trans(b_u), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_weights(b_p, b_u, acc, PRECISION: tl.constexpr):
    """acc + P U for |P| <= 1 in float32, P as two terms of U's type where that is shorter: right to
    2^-18 of each weight. float16 must be given 2^15 P, which keeps weights down to 2^-40."""
    if b_u.dtype == tl.float32:
        acc = tl.dot(b_p, b_u, acc, input_precision=PRECISION)
    else:
        high = b_p.to(b_u.dtype)
        low = (b_p - high.to(tl.float32)).to(b_u.dtype)
        acc = tl.dot(low, b_u, acc)
        acc = tl.dot(high, b_u, acc)
    return acc


@triton.jit
def error_of(e0, e1, e2, e3, y2, b_max):
    """The error of t for rows with |yc|^2 <= y2 and |b| <= b_max; inf where a product could
    overflow, and then every row must be evaluated exactly."""
    err = e0 + e1 * tl.sqrt(y2) + e2 * y2 + e3 * b_max
    return tl.where((err < HUGE) & (y2 < HUGE), err, float("inf"))


@triton.jit
def lowest_left(low, err, hard):
    """Rows with t above it must be evaluated exactly; low bounds the largest exact t from below."""
    margin = tl.where(hard, 0.0, LOG_THETA - tl.log(tl.minimum(tl.maximum(err, THETA), 1.0)))
    lo = low + margin - err
    lo = tl.where(hard, lo - 1.2e-7 * tl.abs(lo), lo)
    return tl.where((err <= THETA) & (hard == 0), float("inf"), lo)


@triton.jit
def exact_differences(
    x, rows, o_x, o_y, alpha, scale, shift, mask, D,
    SHAPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|x - alpha y|^2 [SHAPE] in float64 by direct differences, of pairs of queries and rows given
    by their offsets, alpha [SHAPE]; each operation is that of the reference."""
    acc = tl.zeros([SHAPE, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m = mask[:, None] & (o_d < D)[None, :]
        # [SHAPE, BLOCK_D]
        b_x = tl.load(x + o_x[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float64)
        b_y = tl.load(rows + o_y[:, None] + o_d[None, :], mask=m, other=0).to(tl.float64)
        diff = b_x - alpha[:, None] * (b_y * scale + shift)
        acc += tl.where(m, diff * diff, 0.0)
    return tl.sum(acc, 1)


@triton.jit
def merge(
    key, m, s, st, sb, sw2, key_b, m_b, s_b, st_b, sb_b, sw2_b
):  # fmt: skip
    """The state of both, and what their accumulators must be multiplied by: a monoid, whose neutral
    element has key inf, m -inf and sums 0. Only the smaller key counts."""
    least = tl.minimum(key, key_b)
    has_a, has_b = (key == least) & (s > 0.0), (key_b == least) & (s_b > 0.0)
    inf = float("inf")
    top = tl.maximum(tl.where(has_a, m, -inf), tl.where(has_b, m_b, -inf))
    gap_a, gap_b = tl.where(has_a, m - top, 0.0), tl.where(has_b, m_b - top, 0.0)
    f_a, f_b = tl.where(has_a, tl.exp(gap_a), 0.0), tl.where(has_b, tl.exp(gap_b), 0.0)
    least = tl.where(has_a | has_b, least, inf)
    return (
        least, top, f_a * s + f_b * s_b,
        f_a * (st + s * gap_a) + f_b * (st_b + s_b * gap_b),
        f_a * sb + f_b * sb_b, f_a * f_a * sw2 + f_b * f_b * sw2_b, f_a, f_b,
    )  # fmt: skip
