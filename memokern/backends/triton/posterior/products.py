"""The two matrix products of the chunked sweep, over a chunk of rows that stays in the L2 cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memokern.backends.triton.core.operands import (
    as_operand,
    dot_terms,
    dot_weights,
    operand_of,
)
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.core.variant import DESCRIBED, POINTERS, ROW_TYPES, Variant, row_name


class Tile(NamedTuple):
    """A configuration: the queries, rows and features of a tile, and how the kernel is launched."""

    b: int
    n: int
    d: int
    warps: int
    stages: int


def dot_products_tile(few_queries: bool, rows: torch.dtype, precision: str) -> Tile:
    """The tile of the first product. Up to 16 queries wait for memory, and a tile of 64 would be
    mostly empty. float32 takes half the features, because its three products would fill the
    registers otherwise."""
    if few_queries:
        return Tile(16, 64, 32 if rows == torch.float32 else 64, 4, 4)
    if rows == torch.float32:
        return Tile(64, 64 if precision == "ieee" else 128, 32, 8, 3)
    return Tile(64, 128, 64, 8, 3)


def accumulate_tile(few_queries: bool, rows: torch.dtype, precision: str) -> Tile:
    """The tile of the second product, whose sums are b x d."""
    if few_queries:
        return Tile(16, 32, 64, 4, 4)
    if rows == torch.float32:
        return Tile(64, 32, 64, 8 if precision == "ieee" else 4, 3)
    return Tile(64, 64, 64, 8, 3)


# First products, (rows, few_queries, precision, described), of which the assembler would rather
# spill a few bytes than pass its next step of occupancy: on sm_100, with one version of Triton or
# another.
_TIGHT = {
    (torch.float32, True, "tf32x3", False),
    (torch.float16, False, "tf32x3", True),
}


@triton.jit
def load_rows(
    rows, start, end, d, D, stride_n,
    DESCRIBED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of rows [BLOCK_N, BLOCK_D] as they enter products, with zeros beyond the last row and
    feature. A descriptor knows where the rows end but not where a chunk does, which does no harm:
    all chunks but the last are whole tiles."""
    if DESCRIBED:
        raw = rows.load([start.to(tl.int32), d])
    else:
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        o_d = d + tl.arange(0, BLOCK_D)
        mask = (o_n < end)[:, None] & (o_d < D)[None, :]
        raw = tl.load(rows + o_n[:, None] * stride_n + o_d[None, :], mask=mask, other=0)
    return as_operand(raw)


@triton.jit
def dot_products_kernel(
    terms,  # [TERMS, B, D]
    rows,  # [N, D], or its descriptor
    products,  # [parts, b, n] out
    B, b0, b, n0, n, D, stride_n, part_d,
    DESCRIBED: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B of the queries b0 .. b0 + b, BLOCK_N of the rows n0 .. n0 + n and
    part_d of the features, which it streams; acc is the product of those so far. It writes a tile
    of products. Programs of the same rows are neighbours, so a chunk is read from device memory
    once."""
    n_b = tl.cdiv(b, BLOCK_B)
    i_b, i_n, i_p = tl.program_id(0) % n_b, tl.program_id(0) // n_b, tl.program_id(1)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_b, mask_n = o_b < b, o_n < n
    p_x = terms + (b0 + o_b)[:, None] * D
    acc = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for d in range(i_p * part_d, tl.minimum(D, (i_p + 1) * part_d), BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask_d = (o_d < D)[None, :]
        # [BLOCK_N, BLOCK_D]
        b_u = load_rows(
            rows, n0 + i_n * BLOCK_N, n0 + n, d, D, stride_n, DESCRIBED, BLOCK_N, BLOCK_D
        )
        mask_x = mask_b[:, None] & mask_d
        stride = tl.cast(B, tl.int64) * D
        acc = dot_terms(p_x + o_d[None, :], stride, mask_x, b_u, acc, TERMS, PRECISION)
    p_out = products + (i_p.to(tl.int64) * b + o_b)[:, None] * n + o_n[None, :]
    tl.store(p_out, acc, mask=mask_b[:, None] & mask_n[None, :])


@triton.jit
def accumulate_kernel(
    weights,  # [b, n], |.| <= 1
    rows,  # [N, D], or its descriptor
    factor,  # [b]
    unit,  # [b]
    acc,  # [parts, b, D] in and out
    b, n0, n, D, stride_n, part_n,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc = factor acc + unit weights U. One program owns BLOCK_B queries, BLOCK_D features and
    part_n of the chunk's rows, which it streams from the L2 cache."""
    n_d = tl.cdiv(D, BLOCK_D)
    i_d, i_b, i_p = tl.program_id(0) % n_d, tl.program_id(0) // n_d, tl.program_id(1)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_b, mask_d = o_b < b, o_d < D
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    one = tl.full([BLOCK_B, BLOCK_D], 1.0, tl.float32)
    stored: tl.constexpr = rows.dtype if DESCRIBED else rows.dtype.element_ty
    big: tl.constexpr = 1.0 if stored == tl.float32 or stored == tl.bfloat16 else 32768.0
    for j in range(i_p * part_n, tl.minimum(n, (i_p + 1) * part_n), BLOCK_N):
        o_n = (j + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = o_n < n
        # [BLOCK_B, BLOCK_N]
        mask = mask_b[:, None] & mask_n[None, :]
        b_p = tl.load(weights + o_b[:, None] * n + o_n[None, :], mask=mask, other=0.0) * big
        # [BLOCK_N, BLOCK_D]
        b_u = load_rows(
            rows, n0 + j, n0 + n, i_d * BLOCK_D, D, stride_n, DESCRIBED, BLOCK_N, BLOCK_D
        )
        part = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        part = dot_weights(b_p, b_u, part, PRECISION)
        # Tensor cores truncate their sums at each step, which adds up over a million rows. So the
        # total is kept outside of the product's accumulator, by a multiply-add: a plain sum the
        # compiler would move inside.
        total = tl.fma(total, one, part)
    p_acc = acc + (i_p.to(tl.int64) * b + o_b)[:, None] * D + o_d[None, :]
    mask = mask_b[:, None] & mask_d[None, :]
    f = tl.load(factor + o_b, mask=mask_b, other=0.0)
    f_new = tl.load(unit + o_b, mask=mask_b, other=0.0) / big
    old = tl.load(
        p_acc, mask=mask & (f != 0.0)[:, None], other=0.0
    )  # factor 0: nothing is there yet
    tl.store(p_acc, old * f[:, None] + total * f_new[:, None], mask=mask)


def dot_products_variant(
    rows: torch.dtype, few_queries: bool, precision: str, described: bool = False
) -> Variant:
    """The first product."""
    operand, tile = operand_of(rows, precision), dot_products_tile(few_queries, rows, precision)
    tight = (rows, few_queries, precision, described) in _TIGHT
    constexprs = {
        "DESCRIBED": False,
        "TERMS": operand.terms, "PRECISION": precision if operand.terms == 1 else "ieee",
        "BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_D": tile.d,
    }  # fmt: skip
    unaligned: dict[str, Any] = {}
    if few_queries or rows != torch.float32:
        unaligned["constexprs"] = {**constexprs, "BLOCK_D": tile.d // 2}
    if few_queries and precision == "ieee":
        unaligned["num_stages"] = 2
    variant = Variant(
        name=f"dot_products {row_name(rows)} B{tile.b} {precision}",
        kernel=dot_products_kernel,
        signature={
            "terms": POINTERS[operand.dtype], "rows": POINTERS[rows], "products": "*fp32",
            "B": "i32", "b0": "i32", "b": "i32", "n0": "i64", "n": "i32", "D": "i32",
            "stride_n": "i64", "part_d": "i32",
        },
        constexprs=constexprs,
        unaligned_fields=unaligned,
        num_warps=tile.warps, num_stages=tile.stages,
        aligned=("terms", "rows", "products", "n", "D", "stride_n", "part_d"),
        matrix=operand.terms > 1 or precision != "ieee",
        registers=128 if tight else None,
    )  # fmt: skip
    return _described(variant) if described and variant.matrix else variant


def accumulate_variant(
    rows: torch.dtype, few_queries: bool, precision: str, described: bool = False
) -> Variant:
    """The second product."""
    operand, tile = operand_of(rows, precision), accumulate_tile(few_queries, rows, precision)
    constexprs = {
        "DESCRIBED": False, "PRECISION": precision if operand.terms == 1 else "ieee",
        "BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_D": tile.d,
    }  # fmt: skip
    low = {"constexprs": {**constexprs, "BLOCK_N": tile.n // 2}, "registers": 255}
    variant = Variant(
        name=f"accumulate {row_name(rows)} B{tile.b} {precision}",
        kernel=accumulate_kernel,
        signature={
            "weights": "*fp32", "rows": POINTERS[rows], "factor": "*fp32", "unit": "*fp32",
            "acc": "*fp32", "b": "i32", "n0": "i64", "n": "i32", "D": "i32", "stride_n": "i64",
            "part_n": "i32",
        },
        constexprs=constexprs,
        unaligned_fields=None if few_queries or rows == torch.float32 else low,
        num_warps=tile.warps, num_stages=tile.stages,
        aligned=("weights", "rows", "factor", "unit", "acc", "n", "D", "stride_n", "part_n"),
        matrix=operand.terms > 1 or precision != "ieee",
    )  # fmt: skip
    return _described(variant) if described and variant.matrix else variant


def _described(v: Variant) -> Variant:
    """The same, with rows that come through a tensor descriptor. It is for tensor cores only: where
    CUDA cores multiply, as they do float32 in full precision, tiles that are copied so take up to
    three times the registers."""
    tile = f"{v.constexprs['BLOCK_N']},{v.constexprs['BLOCK_D']}"
    return v._replace(
        name=v.name + " described",
        signature={**v.signature, "rows": f"tensordesc<{v.signature['rows'][1:]}[{tile}]>"},
        constexprs={**v.constexprs, "DESCRIBED": True},
        aligned=tuple(name for name in v.aligned if name not in ("rows", "stride_n")),
        targets=DESCRIBED,
        unaligned_fields={"registers": 255},
    )


def rows_for(v: Variant, data: KernelRows) -> Tensor | TensorDescriptor:
    """The rows as the variant of a product takes them."""
    if not v.constexprs["DESCRIBED"]:
        return data.data
    tile = [v.constexprs["BLOCK_N"], v.constexprs["BLOCK_D"]]
    return TensorDescriptor(data.data, [data.n, data.d], [data.stride, 1], tile)


def precisions(rows: torch.dtype) -> tuple[str, ...]:
    """The precisions that products with these rows are compiled for."""
    return ("tf32x3", "ieee") if rows == torch.float32 else ("tf32x3",)


def variants() -> list[Variant]:
    """Both products: row types by sizes of the batch by precisions, by pointers and described."""
    return [
        make(t, few_queries, p, described)
        for make in (dot_products_variant, accumulate_variant)
        for t in ROW_TYPES
        for few_queries in (True, False)
        for p in precisions(t)
        for described in (False, True)
        if not described or p != "ieee"
    ]
