"""What is known of a query before the rows are read: its terms, and its column of the table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memokern.backends.triton.core.centering import (
    center_of,
    check_types,
    scale_shift,
)
from memokern.backends.triton.core.exactness import HUGE
from memokern.backends.triton.core.operands import (
    operand_of,
    power_of_two,
    product_errors,
    store_terms,
)
from memokern.backends.triton.core.query_table import (
    A1,
    A2,
    COMMON,
    DOT,
    E0,
    E1,
    E2,
    E3,
    HARD,
    INV_T,
    LOG,
    LOST,
    MODE,
    OO,
    SOFT,
    TABLE,
    XO,
)
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.core.variant import POINTERS, ROW_TYPES, Variant, row_name
from memokern.calls import WEIGHTINGS, Query, Rows
from memokern.calls.checks import prepared
from memokern.calls.stored import sharp
from memokern.util import env

_BLOCK_D = 1024
# Up to which 1 / (sigma^2 T) no logit of float32 numbers overflows in float64.
STEEPEST = tl.constexpr(1e150)


@triton.jit
def queries_kernel(
    x,  # [B, D]
    sigma, alpha, temperature,  # [B]
    center,  # [D]
    scale_shift,  # [2]
    terms,  # [TERMS, B, D] out
    table,  # [TABLE, B] out
    B, D, offset, likely, bound,
    TERMS: tl.constexpr, IS_LOG: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a query and streams its features twice: for their sums, and to write its
    terms. offset: what is added to a stored row before it is multiplied. likely, bound: the errors
    of a product, from `product_errors`."""
    u: tl.constexpr = 5.960464477539063e-08  # 2^-24
    i_b = tl.program_id(0).to(tl.int64)
    scale, shift = tl.load(scale_shift), tl.load(scale_shift + 1) - offset * tl.load(scale_shift)
    b_sigma, b_alpha = tl.load(sigma + i_b), tl.load(alpha + i_b)
    inv_t = 1.0 / tl.load(temperature + i_b)
    xx = tl.zeros([BLOCK_D], tl.float64)
    xo = tl.zeros([BLOCK_D], tl.float64)
    oo = tl.zeros([BLOCK_D], tl.float64)
    cc = tl.zeros([BLOCK_D], tl.float64)
    top = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask_d = o_d < D
        b_x = tl.load(x + i_b * D + o_d, mask=mask_d, other=0.0).to(tl.float64)
        b_c = tl.load(center + o_d, mask=mask_d, other=0.0)
        b_xc = b_x - b_alpha * b_c
        b_o = tl.where(mask_d, shift - b_c, 0.0)
        xx += b_xc * b_xc
        xo += b_xc * b_o
        oo += b_o * b_o
        cc += b_c * b_c
        top = tl.maximum(top, tl.abs(b_xc).to(tl.float32))
    sxx, sxo, soo, scc = tl.sum(xx, 0), tl.sum(xo, 0), tl.sum(oo, 0), tl.sum(cc, 0)

    # Comparisons with NaN are false, so whatever is not a number is lost.
    known = (sxx < float("inf")) & (b_sigma >= 0.0) & (inv_t > 0.0) & (inv_t < float("inf"))
    soft_unit = inv_t / b_sigma / b_sigma
    if IS_LOG:
        mode = tl.where(known, LOG, LOST)
    else:
        # HARD at sigma = 0, or so near that the logits would overflow.
        soft = (soft_unit * sxx < HUGE) & (soft_unit < STEEPEST)
        mode = tl.where(known, tl.where(soft, SOFT, HARD), LOST)
    unit = tl.where(mode == SOFT, soft_unit, 1.0)
    # The largest feature becomes 128 to 256, so that two terms of float16 keep 22 bits of it and of
    # all features that are not negligible beside it.
    p2 = tl.where(known, power_of_two(tl.max(top, 0)), 1.0)
    norm, a = tl.sqrt(sxx), tl.abs(b_alpha)
    dot = scale * (p2.to(tl.float64) / 128.0)
    a1 = b_alpha * unit * dot
    a2 = 0.5 * b_alpha * b_alpha * unit
    common = (0.5 * sxx - b_alpha * sxo) * unit
    # What float64 rounds in xc and in shift - c (2^-52 each, doubled), which matters where a row is
    # hit.
    hit = 4.5e-16 * a * (tl.sqrt(soo) + tl.sqrt(scc))
    hard = mode == HARD
    per_row = tl.where(hard, bound, likely) * a * unit
    e1 = per_row * norm
    # A query at the center sees no rounding of the offset in its logits, but in its residual.
    seen = tl.where(mode == SOFT, tl.maximum(norm, b_sigma / tl.sqrt(inv_t)), norm)
    shared = tl.where(mode == SOFT, 0.0, 2 * u * tl.abs(common) + hit * (norm + hit))
    e0 = per_row * seen * tl.sqrt(soo) + shared
    e2 = 4 * u * a2
    e3 = tl.where(mode == SOFT, 2 * u * inv_t, 0.0)
    fits = (tl.abs(a1) < HUGE) & (a2 < HUGE) & (tl.abs(common) < HUGE)
    e0 = tl.where(fits, e0, float("inf"))

    to = table + i_b
    tl.store(to + A1 * B, tl.where(known & fits, a1, 0.0))
    tl.store(to + A2 * B, tl.where(known & fits, a2, 0.0))
    tl.store(to + INV_T * B, tl.where(known, inv_t, 0.0))
    tl.store(to + COMMON * B, tl.where(known, common, 0.0))
    tl.store(to + E0 * B, tl.where(known, e0, 0.0))
    tl.store(to + E1 * B, tl.where(known, e1, 0.0))
    tl.store(to + E2 * B, tl.where(known, e2, 0.0))
    tl.store(to + E3 * B, tl.where(known, e3, 0.0))
    tl.store(to + MODE * B, mode.to(tl.float64))
    tl.store(to + DOT * B, tl.where(known & fits, dot, 0.0))
    tl.store(to + XO * B, tl.where(known, sxo, 0.0))
    tl.store(to + OO * B, tl.where(known, tl.sqrt(soo), 0.0))

    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask_d = o_d < D
        b_x = tl.load(x + i_b * D + o_d, mask=mask_d, other=0.0).to(tl.float64)
        b_c = tl.load(center + o_d, mask=mask_d, other=0.0)
        b_xc = ((b_x - b_alpha * b_c) * (128.0 / p2.to(tl.float64))).to(tl.float32)
        b_xc = tl.where(known, b_xc, 0.0)
        store_terms(b_xc, terms + i_b * D + o_d, tl.cast(B, tl.int64) * D, mask_d, TERMS)


def variant(rows: torch.dtype, weighting: str) -> Variant:
    """The kernel for rows of a type and a weighting."""
    operand = operand_of(rows, "tf32x3")
    return Variant(
        name=f"queries {row_name(rows)} {weighting}",
        kernel=queries_kernel,
        signature={
            "x": "*fp32", "sigma": "*fp64", "alpha": "*fp64", "temperature": "*fp64",
            "center": "*fp64", "scale_shift": "*fp64", "terms": POINTERS[operand.dtype],
            "table": "*fp64", "B": "i32", "D": "i32", "offset": "fp32", "likely": "fp32",
            "bound": "fp32",
        },
        constexprs={"TERMS": operand.terms, "IS_LOG": weighting == "log", "BLOCK_D": _BLOCK_D},
        num_warps=4,
        aligned=("x", "sigma", "alpha", "temperature", "center", "scale_shift", "terms", "table",
                 "D"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Row types by weightings."""
    return [variant(t, w) for t in ROW_TYPES for w in WEIGHTINGS]


def precision_of(asked: str) -> str:
    """How products with float32 rows are formed: ``"tf32x3"`` or ``"ieee"``. AMD's matrix cores
    multiply float32, so there is nothing to choose there."""
    if asked not in ("auto", *env.PRECISIONS):
        raise ValueError(f"precision must be auto, {' or '.join(env.PRECISIONS)}, not {asked!r}")
    if torch.version.hip is not None:
        return "ieee"
    return env.precision() if asked == "auto" else asked


class KernelQueries:
    """The queries of a call as the kernels take them.

    terms: [TERMS, B, D] in the operand's type. table: [TABLE, B] float64. scale_shift: [2] and
    center: [D] float64, of the rows. The rest is the query's own.
    """

    def __init__(self, query: Query, rows: Rows, center: Tensor) -> None:
        """Of a query that is :func:`prepared <memokern.calls.checks.prepared>`."""
        self.x, self.sigma, self.alpha, self.temperature = query[:4]
        self.weighting, self.precision = query.weighting, precision_of(query.precision)
        self.operand, self.center = operand_of(rows.data.dtype, self.precision), center
        self.scale_shift = scale_shift(rows)
        (b, d), device = self.x.shape, self.x.device
        self.terms = torch.empty(self.operand.terms, b, d, dtype=self.operand.dtype, device=device)
        self.table = torch.empty(TABLE, b, dtype=torch.float64, device=device)
        likely, bound = product_errors(self.operand, d)
        variant(rows.data.dtype, self.weighting).launch(
            (b,), device, x=self.x, sigma=self.sigma, alpha=self.alpha,
            temperature=self.temperature, center=center, scale_shift=self.scale_shift,
            terms=self.terms, table=self.table, B=b, D=d, offset=self.operand.offset,
            likely=likely, bound=bound,
        )  # fmt: skip


def prepare(query: Query, rows: Rows) -> tuple[KernelQueries, KernelRows]:
    """A call's queries and rows as the kernels take them; what their owner does not keep of the
    rows is computed. Errors name what does not fit."""
    query = prepared(query, rows)
    check_types(query.x, rows)
    rows = sharp(rows)
    center, sq_norms = center_of(rows)
    return KernelQueries(query, rows, center), KernelRows(rows.data, sq_norms, query.bias)
