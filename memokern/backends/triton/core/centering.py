"""The rows about their center: computed on the device where their owner keeps no center.

Nothing here waits for the device, so that what calls it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.operands import values_of
from memokern.backends.triton.core.rows import stride_of
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.calls import Rows
from memokern.calls.checks import check_rows, contiguous64, name_of
from memokern.calls.stored import lost_with_a_row, sample_center

_F32, _F64 = torch.float32, torch.float64


def check_types(x: Tensor, rows: Rows) -> None:
    """TypeError for what there are no kernels for; callers ask ``Triton.refuses`` first."""
    check_rows(rows)
    if x.dtype != _F32 or rows.data.dtype not in ROW_TYPES:
        known = ", ".join(name_of(t) for t in ROW_TYPES)
        raise TypeError(
            f"the Triton kernels take float32 queries and rows of {known}, not"
            f" {name_of(x.dtype)} and {name_of(rows.data.dtype)}"
        )


def scale_shift(rows: Rows) -> Tensor:
    """The rows' scale and shift, [2] float64 on the device, since the numbers that a kernel takes
    are float32. They are filled in there, because a copy would wait for the device, and anew each
    time: what is kept between calls would belong to the memory of the CUDA graph that was captured
    first."""
    out = torch.empty(2, dtype=_F64, device=rows.data.device)
    out[0].fill_(rows.scale)
    out[1].fill_(rows.shift)
    return out


@triton.jit
def sq_norms_kernel(
    rows,  # [N, D]
    center,  # [D]
    scale_shift,  # [2]
    sq_norms,  # [N] out
    N, D, stride_n,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|y - center|^2 in float64. One program owns BLOCK_N rows and streams their features."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = o_n < N
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (o_d < D)[None, :]
        b_y = tl.load(rows + o_n[:, None] * stride_n + o_d[None, :], mask=mask, other=0)
        b_c = tl.load(center + o_d, mask=o_d < D, other=0.0)
        b_y = values_of(b_y, scale, shift) - b_c[None, :]
        acc += tl.where(mask, b_y * b_y, 0.0)
    tl.store(sq_norms + o_n, tl.sum(acc, 1), mask=mask_n)


def sq_norms_variant(rows: torch.dtype) -> Variant:
    return Variant(
        name=f"sq_norms {row_name(rows)}",
        kernel=sq_norms_kernel,
        signature={
            "rows": POINTERS[rows], "center": "*fp64", "scale_shift": "*fp64", "sq_norms": "*fp64",
            "N": "i32", "D": "i32", "stride_n": "i64",
        },
        constexprs={"BLOCK_N": 32, "BLOCK_D": 64},
        unaligned_fields={"registers": 255},
        aligned=("rows", "center", "scale_shift", "sq_norms", "D", "stride_n"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types."""
    return [sq_norms_variant(t) for t in ROW_TYPES]


def _sq_norms(rows: Rows, center: Tensor) -> Tensor:
    """|y_n - center|^2 [N] float64."""
    out = torch.empty(rows.n, dtype=_F64, device=rows.data.device)
    variant = sq_norms_variant(rows.data.dtype)
    variant.launch(
        (-(-rows.n // variant.constexprs["BLOCK_N"]),), rows.data.device, rows=rows.data,
        center=center, scale_shift=scale_shift(rows), sq_norms=out, N=rows.n, D=rows.dim,
        stride_n=stride_of(rows.data),
    )  # fmt: skip
    return out


def center_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """center [D] and |y - center|^2 [N] float64: what the rows' owner keeps, else from a pass over
    the rows."""
    if rows.center is not None and rows.sq_norms is not None:
        return contiguous64(rows.center), contiguous64(rows.sq_norms)
    center = sample_center(rows)
    sq_norms = _sq_norms(rows, center)
    return lost_with_a_row(center, sq_norms), sq_norms


class Centred(NamedTuple):
    """The rows about their center, as the first kernel of nearest computes them:
    scale (raw + offset).

    center [D], sq_norms [N] float64; offset [D], half_sq [N] float32; largest_norm, offset_norm:
    the largest |yc|, and the length of what is added to every raw row, float64 scalars on the
    device.
    """

    center: Tensor
    sq_norms: Tensor
    offset: Tensor
    half_sq: Tensor
    largest_norm: Tensor
    offset_norm: Tensor


def centred(rows: Rows) -> Centred:
    """From what :func:`center_of` gives."""
    center, sq_norms = center_of(rows)
    moved = rows.shift - center
    return Centred(
        center, sq_norms, (moved / rows.scale).to(_F32), (0.5 * sq_norms).to(_F32),
        sq_norms.max().sqrt(), moved.square().sum().sqrt(),
    )  # fmt: skip
