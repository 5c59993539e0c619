"""The k nearest rows: a product that rules nearly all groups of rows out, then direct differences.

With xc = x - c and yc_n = y_n - c, key_n = |yc_n|^2 / 2 - <xc, yc_n> = (|x - y_n|^2 - |xc|^2) / 2
orders the rows by distance. `nearest_groups_kernel` writes the least key of every group of GROUP
rows, up to an error that the launcher bounds by `e`. The k-th smallest of these is within e of the
key of a row, and at least k rows are as near, so only groups whose least key is within 2 e of it
can hold one of the k nearest. `nearest_exact_kernel` looks at these only, in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.operands import values_of
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name

GROUP = 64  # rows of a group
SLOTS = (1, 8, 64)  # how many neighbours a compiled kernel can hold
PRECISION = "tf32x3"  # how the first product is formed; it decides how many groups are left
_GROUPS_AT_ONCE = 256  # how many least keys a program reads at a time


@triton.jit
def nearest_groups_kernel(
    xc,  # [B, D] centred queries
    rows,  # [N, D]
    offset,  # [D] (shift - center) / scale
    half_sq,  # [N] |yc|^2 / 2
    least,  # [B, G] out
    B, N, D, stride_n, scale,
    BLOCK_B: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B queries and a group of rows, and streams their features in blocks
    of BLOCK_D. After each block acc is the product of the features so far. It writes the group's
    least key for each query. Neighbouring programs share the group, which stays in L2: each row is
    read from device memory once, the queries once per group."""
    n_b = tl.cdiv(B, BLOCK_B)
    i_b, i_g = tl.program_id(0) % n_b, tl.program_id(0) // n_b
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_n = i_g.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask_b, mask_n = o_b < B, o_n < N
    acc = tl.zeros([BLOCK_B, GROUP], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask_d = o_d < D
        # [BLOCK_B, BLOCK_D]
        b_x = tl.load(xc + o_b[:, None] * D + o_d, mask=mask_b[:, None] & mask_d, other=0.0)
        # [GROUP, BLOCK_D]
        b_y = tl.load(rows + o_n[:, None] * stride_n + o_d, mask=mask_n[:, None] & mask_d, other=0)
        b_y = b_y.to(tl.float32) + tl.load(offset + o_d, mask=mask_d, other=0.0)
        acc = tl.dot(b_x, tl.trans(b_y), acc, input_precision=PRECISION)
    key = tl.load(half_sq + o_n, mask=mask_n, other=float("inf")) - scale * acc
    # A product that overflowed rules nothing out; a minimum would pass over its NaN.
    key = tl.where(key == key, key, -float("inf"))
    b_least = tl.min(tl.where(mask_n, key, float("inf")), 1)
    tl.store(least + o_b * tl.cdiv(N, GROUP) + i_g, b_least, mask=mask_b)


@triton.jit
def nearest_exact_kernel(
    x,  # [B, D]
    rows,  # [N, D]
    scale_shift,  # [2]
    least,  # [B, G]
    most,  # [B]: groups whose least key is larger are ruled out
    dist,  # [B, parts, SLOTS] out
    index,  # [B, parts, SLOTS] out
    N, D, stride_n, parts, k,
    GROUP: tl.constexpr, GROUPS_AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program owns a query and a part of the groups, and visits those that are not ruled out,
    in order. After each of them the first k slots hold the k nearest rows so far, by (distance,
    index). It writes the slots, unsorted; free ones have distance inf."""
    i_b, i_p = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    n_g = tl.cdiv(N, GROUP)
    # 64 bits: the product passes 2^31 when many parts share many groups.
    first = (i_p.to(tl.int64) * n_g // parts).to(tl.int32)
    last = ((i_p.to(tl.int64) + 1) * n_g // parts).to(tl.int32)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    b_most = tl.load(most + i_b)
    o_s = tl.arange(0, SLOTS)
    # A slot beyond k is never the worst.
    b_dist = tl.where(o_s < k, float("inf"), -float("inf")).to(tl.float64)
    b_index = tl.zeros([SLOTS], tl.int64)
    for start in range(first, last, GROUPS_AT_ONCE):
        o_g = start + tl.arange(0, GROUPS_AT_ONCE)
        b_least = tl.load(least + i_b * n_g + o_g, mask=o_g < last, other=float("inf"))
        hit = (b_least <= b_most) & (o_g < last)
        left = tl.sum(hit.to(tl.int32), 0)
        while left > 0:
            group = tl.min(tl.where(hit, o_g, 2147483647), 0)
            hit = hit & (o_g != group)
            left -= 1
            o_n = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
            mask_n = o_n < N
            acc = tl.zeros([GROUP, BLOCK_D], tl.float64)
            for d in range(0, D, BLOCK_D):
                o_d = d + tl.arange(0, BLOCK_D)
                mask_d = o_d < D
                b_x = tl.load(x + i_b * D + o_d, mask=mask_d, other=0.0).to(tl.float64)
                mask = mask_n[:, None] & mask_d
                b_y = tl.load(rows + o_n[:, None] * stride_n + o_d, mask=mask, other=0)
                diff = b_x[None, :] - values_of(b_y, scale, shift)
                acc += tl.where(mask, diff * diff, 0.0)
            r2 = tl.where(mask_n, tl.sum(acc, 1), float("inf"))
            nearest, worst = tl.min(r2, 0), tl.max(b_dist, 0)
            # Groups ascend and so do the rows of one, so the first of equals stays.
            while nearest < worst:
                row = tl.min(tl.where(r2 == nearest, o_n, 9223372036854775807), 0)
                r2 = tl.where(o_n == row, float("inf"), r2)
                # The last of the worst rows gives its slot up, or any free slot is taken.
                latest = tl.max(tl.where(b_dist == worst, b_index, -1), 0)
                slot = tl.min(tl.where((b_dist == worst) & (b_index == latest), o_s, SLOTS), 0)
                b_dist = tl.where(o_s == slot, nearest, b_dist)
                b_index = tl.where(o_s == slot, row, b_index)
                nearest, worst = tl.min(r2, 0), tl.max(b_dist, 0)
    to = (i_b * parts + i_p) * SLOTS + o_s
    tl.store(dist + to, tl.where(o_s < k, b_dist, float("inf")))
    tl.store(index + to, b_index)


def groups_variant(dtype: torch.dtype, few_queries: bool, precision: str = PRECISION) -> Variant:
    """The first kernel. few_queries: up to 16, for which a tile of 64 would be mostly empty."""
    block_b = 16 if few_queries else 64
    constexprs = {"BLOCK_B": block_b, "GROUP": GROUP, "BLOCK_D": 32, "PRECISION": precision}
    return Variant(
        name=f"nearest_groups {row_name(dtype)} B{block_b} {precision}",
        kernel=nearest_groups_kernel,
        signature={
            "xc": "*fp32", "rows": POINTERS[dtype], "offset": "*fp32", "half_sq": "*fp32",
            "least": "*fp32", "B": "i32", "N": "i32", "D": "i32", "stride_n": "i64",
            "scale": "fp32",
        },
        constexprs=constexprs,
        unaligned_fields={"constexprs": {**constexprs, "BLOCK_D": 16}},
        # With four warps Triton 3.8 spills a few bytes of the three products of float32.
        num_warps=8 if dtype == torch.float32 and not few_queries and precision != "ieee" else 4,
        num_stages=3,
        aligned=("xc", "rows", "offset", "half_sq", "least", "D", "stride_n"),
        matrix=precision != "ieee",
    )  # fmt: skip


def exact_variant(dtype: torch.dtype, k: int) -> Variant:
    """The second kernel, with slots for k neighbours."""
    slots = next(size for size in SLOTS if size >= k)
    return Variant(
        name=f"nearest_exact {row_name(dtype)} k{slots}",
        kernel=nearest_exact_kernel,
        signature={
            "x": "*fp32", "rows": POINTERS[dtype], "scale_shift": "*fp64", "least": "*fp32",
            "most": "*fp32", "dist": "*fp64", "index": "*i64", "N": "i32", "D": "i32",
            "stride_n": "i64", "parts": "i32", "k": "i32",
        },
        constexprs={
            "GROUP": GROUP, "GROUPS_AT_ONCE": _GROUPS_AT_ONCE, "BLOCK_D": 32, "SLOTS": slots,
        },
        num_warps=8, num_stages=1, registers=96, unaligned_fields={"registers": 128},
        aligned=("x", "rows", "scale_shift", "least", "most", "dist", "index", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by sizes of the batch; row types by slots."""
    groups = [groups_variant(t, few) for t in ROW_TYPES for few in (True, False)]
    return groups + [exact_variant(t, k) for t in ROW_TYPES for k in SLOTS]
