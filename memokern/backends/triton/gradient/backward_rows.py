"""The gradient for the rows: a sum of direct differences, because near rows have the largest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.query_table import MODE, SOFT
from memokern.backends.triton.core.variant import FLOAT_ROWS, POINTERS, Variant, row_name
from memokern.backends.triton.posterior.queries import KernelQueries
from memokern.calls import Rows

# The rows of what `factors` makes for each query, [4, B] float32: alpha scale as two terms, alpha
# shift, and alpha / sigma^2 (alpha with weighting "log", whose coefficients have the rest).
_HIGH, _LOW, _SHIFT, _UNIT = (tl.constexpr(i) for i in range(4))


@triton.jit
def row_gradient_kernel(
    coefficients,  # [b, n] q c
    weights,  # [b, n]
    factors,  # [4, B]
    x, grad_mean,  # [B, D]
    rows,  # [N, D]
    acc,  # [n, D] in and out: the sum over the blocks of queries so far
    grad_rows,  # [N, D] out, with the last block
    B, b0, b, n0, n, D, stride_n, is_last, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_rows = scale sum_b (w g + q c alpha / sigma^2 (x - alpha y)). One program owns BLOCK_N
    rows and BLOCK_D features, and streams the queries in order. Each difference is rounded once, as
    a multiply-add. Tensor cores are of no use: a sum of q c x, less y times the sum of q c alpha,
    would cancel where a row is near."""
    n_d = tl.cdiv(D, BLOCK_D)
    i_d, i_n = tl.program_id(0) % n_d, tl.program_id(0) // n_d
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n, mask_d = o_n < n, o_d < D
    mask = mask_n[:, None] & mask_d[None, :]
    # [BLOCK_N, BLOCK_D], as b_y
    total = tl.load(acc + o_n[:, None] * D + o_d[None, :], mask=mask & (b0 > 0), other=0.0)
    p_y = rows + (n0 + o_n)[:, None] * stride_n + o_d[None, :]
    b_y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
    for i in range(0, b):
        to = (b0 + i).to(tl.int64)
        at = tl.cast(i, tl.int64) * n + o_n
        unit = tl.load(factors + _UNIT * B + to)
        # [BLOCK_N]
        b_q = tl.load(coefficients + at, mask=mask_n, other=0.0) * unit
        b_w = tl.load(weights + at, mask=mask_n, other=0.0)
        # [BLOCK_D]
        b_x = tl.load(x + to * D + o_d, mask=mask_d, other=0.0)
        b_x -= tl.load(factors + _SHIFT * B + to)
        b_g = tl.load(grad_mean + to * D + o_d, mask=mask_d, other=0.0)
        diff = tl.fma(b_y, -tl.load(factors + _HIGH * B + to), b_x[None, :])
        diff = tl.fma(b_y, -tl.load(factors + _LOW * B + to), diff)
        total = tl.fma(diff, b_q[:, None], total)
        total = tl.fma(b_w[:, None], b_g[None, :], total)
    if is_last != 0:
        p_out = grad_rows + (n0 + o_n)[:, None] * D + o_d[None, :]
        tl.store(p_out, (total * scale).to(grad_rows.dtype.element_ty), mask=mask)
    else:
        tl.store(acc + o_n[:, None] * D + o_d[None, :], total, mask=mask)


def factors(q: KernelQueries, rows: Rows) -> Tensor:
    """What `row_gradient_kernel` needs of each query, [4, B]; two terms lose nothing of alpha."""
    soft = q.table[MODE.value] == SOFT.value
    unit = torch.where(soft, q.alpha / q.sigma / q.sigma, q.alpha)
    scaled = q.alpha * rows.scale
    high = scaled.to(torch.float32)
    low = (scaled - high).to(torch.float32)
    return torch.stack(
        [high, low, (q.alpha * rows.shift).to(torch.float32), unit.to(torch.float32)]
    )


def variant(rows: torch.dtype) -> Variant:
    """For rows of a type."""
    return Variant(
        name=f"row_gradient {row_name(rows)}",
        kernel=row_gradient_kernel,
        signature={
            "coefficients": "*fp32", "weights": "*fp32", "factors": "*fp32", "x": "*fp32",
            "grad_mean": "*fp32", "rows": POINTERS[rows], "acc": "*fp32",
            "grad_rows": POINTERS[rows], "B": "i32", "b0": "i32", "b": "i32", "n0": "i64",
            "n": "i32", "D": "i32", "stride_n": "i64", "is_last": "i32", "scale": "fp32",
        },
        constexprs={"BLOCK_N": 32, "BLOCK_D": 128},
        num_warps=4, unaligned_fields={"num_warps": 8},
        aligned=("coefficients", "weights", "x", "grad_mean", "rows", "acc", "grad_rows", "n", "D",
                 "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """The row types that can have a gradient."""
    return [variant(t) for t in FLOAT_ROWS]
