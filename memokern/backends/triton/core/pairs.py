"""Direct differences in float64 of pairs of a query and a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.operands import values_of
from memokern.backends.triton.core.rows import stride_of
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.calls import Query, Rows

# Kernels count pairs with 32 bits, and round the count up to a block of theirs.
MOST_PAIRS = (1 << 31) - (1 << 10)


@triton.jit
def pairs_kernel(
    x,  # [B, D]
    rows,  # [N, D]
    scale_shift,  # [2]
    alpha,  # [B]
    grad_mean,  # [B, D]; read BACKWARD only, as gy and xy are written
    query,  # [M]
    index,  # [M]
    r2,  # [M] out: |x - alpha y|^2
    gy,  # [M] out: <g, y>
    xy,  # [M] out: <x - alpha y, y>
    M, D, N, stride_n,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M pairs, of any queries, and streams their rows in blocks of BLOCK_D
    features. Each row is read once for each query that it is paired with. A row that does not exist
    has distance NaN."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = o_m < M
    b_q = tl.load(query + o_m, mask=mask_m, other=0).to(tl.int64)
    b_n = tl.load(index + o_m, mask=mask_m, other=0).to(tl.int64)
    exists = (b_n >= 0) & (b_n < N)
    mask_m = mask_m & exists
    b_alpha = tl.load(alpha + b_q)[:, None]
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    acc_gy = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    acc_xy = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = mask_m[:, None] & (o_d < D)
        b_x = tl.load(x + b_q[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float64)
        b_y = tl.load(rows + b_n[:, None] * stride_n + o_d, mask=mask, other=0)
        b_y = tl.where(mask, values_of(b_y, scale, shift), 0.0)
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


def pairs_variant(dtype: torch.dtype, backward: bool) -> Variant:
    """For rows of a type. backward: whether <g, y> and <x - alpha y, y> are wanted too."""
    names = ("x", "rows", "scale_shift", "alpha", "grad_mean", "query", "index", "r2", "gy", "xy")
    return Variant(
        name=f"pairs {row_name(dtype)} {'backward' if backward else 'forward'}",
        kernel=pairs_kernel,
        signature={
            "x": "*fp32", "rows": POINTERS[dtype], "scale_shift": "*fp64", "alpha": "*fp64",
            "grad_mean": "*fp64", "query": "*i64", "index": "*i64", "r2": "*fp64", "gy": "*fp64",
            "xy": "*fp64", "M": "i32", "D": "i32", "N": "i32", "stride_n": "i64",
        },
        constexprs={"BACKWARD": backward, "BLOCK_M": 16, "BLOCK_D": 64 if backward else 128},
        num_warps=4, num_stages=2, unaligned_fields={"registers": 255},
        aligned=(*names, "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by directions."""
    return [pairs_variant(t, backward) for t in ROW_TYPES for backward in (False, True)]


class Pairs:
    """Queries and rows, of which pairs are evaluated. scale_shift: the rows', on the device."""

    def __init__(self, query: Query, rows: Rows, scale_shift: Tensor) -> None:
        self.x, self.alpha, self.rows, self.scale_shift = query.x, query.alpha, rows, scale_shift

    def evaluate(
        self, query: Tensor, index: Tensor, grad_mean: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """r^2, <g, y> and <x - alpha y, y> of the pairs (query[i], index[i]), [M] float64 each; the
        last two are empty without the incoming gradients g, grad_mean [B, D] float64."""
        m, data = len(index), self.rows.data
        r2, gy, xy = (torch.empty(m, dtype=torch.float64, device=self.x.device) for _ in range(3))
        variant = pairs_variant(data.dtype, grad_mean is not None)
        variant.launch(
            (-(-m // variant.constexprs["BLOCK_M"]),), self.x.device, x=self.x, rows=data,
            scale_shift=self.scale_shift, alpha=self.alpha,
            grad_mean=self.scale_shift if grad_mean is None else grad_mean, query=query,
            index=index, r2=r2, gy=gy, xy=xy, M=m, D=self.rows.dim, N=self.rows.n,
            stride_n=stride_of(data),
        )  # fmt: skip
        return r2, gy, xy
