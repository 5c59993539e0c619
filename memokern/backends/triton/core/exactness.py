"""Which rows the error of a product could matter to, and their direct differences instead."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from memokern.backends.triton.core.operands import values_of

# A row whose weight the error of its logit could change by more than THETA is evaluated exactly.
# Weights are promised to 1e-4, which leaves a factor of a hundred.
THETA = tl.constexpr(1e-6)
LOG_THETA = tl.constexpr(math.log(1e-6))
# float32 overflows at 3e38. A table's numbers beyond HUGE, or an error beyond it, could lead there:
# nothing is then taken to be known from products.
HUGE = tl.constexpr(1e30)


@triton.jit
def error_of(e0, e1, e2, e3, y2, b_max):
    """The error of t for rows with |yc|^2 <= y2 and |bias| <= b_max; inf where a product could
    overflow, and then every row must be evaluated exactly."""
    err = e0 + e1 * tl.sqrt(y2) + e2 * y2 + e3 * b_max
    return tl.where((err < HUGE) & (y2 < HUGE), err, float("inf"))


@triton.jit
def exact_from(low, err, hard):
    """Rows with t at or above the result must be evaluated exactly; low bounds the largest exact t
    from below."""
    margin = tl.where(hard, 0.0, LOG_THETA - tl.log(tl.minimum(tl.maximum(err, THETA), 1.0)))
    lo = low + margin - err
    lo = tl.where(hard, lo - 1.2e-7 * tl.abs(lo), lo)
    return tl.where((err <= THETA) & (hard == 0), float("inf"), lo)


@triton.jit
def exact_differences(
    x, rows, o_x, o_y, alpha, scale, shift, mask, D,
    SHAPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|x - alpha y|^2 [SHAPE] in float64 by direct differences, for pairs of queries and rows that
    are given by their offsets, and alpha [SHAPE]; each operation is that of the reference."""
    acc = tl.zeros([SHAPE, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m = mask[:, None] & (o_d < D)[None, :]
        # [SHAPE, BLOCK_D]
        b_x = tl.load(x + o_x[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float64)
        b_y = tl.load(rows + o_y[:, None] + o_d[None, :], mask=m, other=0)
        diff = b_x - alpha[:, None] * values_of(b_y, scale, shift)
        acc += tl.where(m, diff * diff, 0.0)
    return tl.sum(acc, 1)
