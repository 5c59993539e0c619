"""How rows become operands of matrix products, and queries sums of operands.

Rows enter the products as they are stored, so that they go from memory to the tensor cores without
arithmetic: float32, bfloat16 and float16 as they are, uint8 as float16(raw - 128), which is exact.
A query is split into terms of that type whose sum is the query to float32's precision; a power of
two per query scales them, which keeps float16 in its range. Centring costs no arithmetic on the
rows either: with y = scale u + shift', <xc, y - c> = scale <xc, u> + <xc, shift' - c>, and the last
part is one number per query.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

UNIT_ROUNDING = 2.0**-24


class Operand(NamedTuple):
    """How rows of one type are multiplied.

    dtype: the type of a query's terms. terms: how many a query has. rounding: the error of a
    product of two vectors x and y, but for that of its sums, in units of 2^-24 |x||y|. offset: what
    is added to a row as stored before it is multiplied.
    """

    dtype: torch.dtype
    terms: int
    rounding: float
    offset: float


def operand_of(rows: torch.dtype, precision: str) -> Operand:
    """How rows of this type are multiplied; ``precision`` is that of products with float32 rows.

    The roundings, in units of 2^-24 |x||y|: tf32x3 cuts both small parts off after 10 bits (2^-21
    each on average) and leaves their product out (2^-22), which is 20 together; two terms of
    float16 carry 22 bits, three of bfloat16 all 24. The last rounding of t is added to each.
    """
    if rows == torch.float32:
        return Operand(torch.float32, 1, 24.0 if precision == "tf32x3" else 4.0, 0.0)
    if rows == torch.bfloat16:
        return Operand(torch.bfloat16, 3, 4.0, 0.0)
    return Operand(torch.float16, 2, 6.0, -128.0 if rows == torch.uint8 else 0.0)


def product_errors(operand: Operand, features: int) -> tuple[float, float]:
    """The error of t relative to |a1||x||y|: as estimated, and as bounded for any data.

    Tensor cores truncate their sums. A chain of D / 8 additions is short at each of them by at most
    2^-23 of a partial sum, by 2^-24 on average, and partial sums grow along the chain. CUDA cores
    round to nearest, which costs sqrt(D) / 2.
    """
    chain = max(features / 16, 0.5 * math.sqrt(features))
    likely = operand.rounding + chain
    bound = 2 * operand.rounding + 2 * features + 64
    return likely * UNIT_ROUNDING, bound * UNIT_ROUNDING


@triton.jit
def as_operand(raw):
    """Rows as loaded, as they enter products."""
    if raw.dtype == tl.uint8:
        return raw.to(tl.float16) - 128.0
    else:
        return raw


@triton.jit
def values_of(raw, scale, shift):
    """The values that rows as loaded stand for, in float64: those of
    :func:`memokern.calls.values.dequantized`. A multiply-add of 0 is a product that the compiler
    does not fuse with the sum."""
    v = tl.fma(raw.to(tl.float32), scale.to(tl.float32), 0.0)
    return (v + shift.to(tl.float32)).to(tl.float64)


@triton.jit
def power_of_two(v):
    """The largest power of two that is at most v, for a float32 v; 1 where v is 0 or subnormal."""
    bits = v.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)


@triton.jit
def store_terms(v, pointers, stride, mask, TERMS: tl.constexpr):
    """Write v, float32, as TERMS tensors of the pointers' type whose sum is v."""
    for i in tl.static_range(TERMS):
        term = v.to(pointers.dtype.element_ty)
        tl.store(pointers + i * stride, term, mask=mask)
        v -= term.to(tl.float32)


@triton.jit
def dot_terms(pointers, stride, mask, b_u, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + X U', with the terms of X [BLOCK_B, BLOCK_D] read from memory, U [BLOCK_N, BLOCK_D]."""
    for i in tl.static_range(TERMS):
        b_x = tl.load(pointers + i * stride, mask=mask, other=0.0)
        acc = tl.dot(b_x, tl.trans(b_u), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_weights(b_p, b_u, acc, PRECISION: tl.constexpr):
    """acc + P U for |P| <= 1 in float32. Where U's type is shorter, P enters as two terms of it and
    is right to 2^-18 of each weight. float16 must be given 2^15 P, which keeps weights down to
    2^-40."""
    if b_u.dtype == tl.float32:
        acc = tl.dot(b_p, b_u, acc, input_precision=PRECISION)
    else:
        high = b_p.to(b_u.dtype)
        low = (b_p - high.to(tl.float32)).to(b_u.dtype)
        acc = tl.dot(low, b_u, acc)
        acc = tl.dot(high, b_u, acc)
    return acc
