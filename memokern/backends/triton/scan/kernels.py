"""Bounds on every logit from a few coordinates of a row, and the rows that they leave.

The derivation is in ``docs/pruning.md``. With a = |alpha|, the score
s_n = a <xc, yc_n> - a^2 |yc_n|^2 / 2 + sigma^2 b_n, in units of sigma^2, is bounded from above by
the coordinates' part of the product, and a |x_b||y_b| for each band beyond them. A row is dropped
when its bound lies below `least`, which the launcher has lowered by all that rounding can do.

`scan_first_level_kernel` evaluates the first level of the index for all rows and is launched three
times: for a promising row of every block, whose exact logit is then a lower bound on the best one;
to count the rows that are left in every block; and, when each block's place is known from the
counts, to list them, in order and without atomics. So no array of B times N is ever written.
`scan_next_level_kernel` adds a later level to the bounds of the pairs that are left. Products are
those of float32 in CUDA cores, whose errors the bounds include; those of tensor cores are larger.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.variant import POINTERS, Variant, row_name

BLOCK_N = 64  # rows that a program bounds at a time
PROMISE, COUNT, LIST = 0, 1, 2  # the passes over the first level
_PROMISE, _COUNT = tl.constexpr(PROMISE), tl.constexpr(COUNT)
STORED = (torch.float16, torch.float32)  # the types that the later levels' coordinates may have
# How much of what a row's bands could add counts when a promising row is looked for: bounds alone
# prefer rows of large norm, coordinates alone those of small norm.
_BAND_SHARE = tl.constexpr(0.2)


@triton.jit
def scan_first_level_kernel(
    coarse,  # [N, k0 + bands + 1]
    scaled,  # [B, k0 + bands]: alpha z, then a |x_b|
    half,  # [N] -|yc|^2 / 2
    bias,  # [N]; read if HAS_BIAS
    a2, s2,  # [B] alpha^2, sigma^2
    least,  # [B]; not read in PROMISE
    value,  # [B, blocks] out, PROMISE: the largest guess
    place,  # [B, blocks]; PROMISE, out: its row; COUNT, out: rows left; LIST: rows before these
    query, index, bound,  # [M] out, LIST: the pairs that are left, and their bounds
    B, N, k0, K, stride_n,
    PASS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_B queries and BLOCK_N rows, and reads K numbers of each. The programs
    of a block of rows are neighbours, so a row comes from device memory once."""
    n_b, n_n = tl.cdiv(B, BLOCK_B), tl.cdiv(N, BLOCK_N)
    i_b, i_n = tl.program_id(0) % n_b, tl.program_id(0) // n_b
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b, mask_n = o_b < B, o_n < N
    p_x, p_y = scaled + o_b[:, None] * K, coarse + o_n[:, None] * stride_n
    acc = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(0, k0, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k, mask=mask_b[:, None] & (o_k < k0), other=0.0)
        b_y = tl.load(p_y + o_k, mask=mask_n[:, None] & (o_k < k0), other=0.0)
        acc = tl.dot(b_x, tl.trans(b_y), acc, input_precision="ieee")
    bands = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(k0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k, mask=mask_b[:, None] & (o_k < K), other=0.0)
        b_y = tl.load(p_y + o_k, mask=mask_n[:, None] & (o_k < K), other=0.0)
        bands = tl.dot(b_x, tl.trans(b_y), bands, input_precision="ieee")
    b_a2 = tl.load(a2 + o_b, mask=mask_b, other=0.0)
    acc += b_a2[:, None] * tl.load(half + o_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        b_s2 = tl.load(s2 + o_b, mask=mask_b, other=1.0)
        acc += b_s2[:, None] * tl.load(bias + o_n, mask=mask_n, other=0.0)[None, :]
    to = o_b * n_n + i_n
    if PASS == _PROMISE:
        guess = acc + _BAND_SHARE * bands
        guess = tl.where(mask_n[None, :] & (guess == guess), guess, -float("inf"))
        best, at = tl.max(guess, 1, return_indices=True)
        tl.store(value + to, best, mask=mask_b)
        tl.store(place + to, i_n.to(tl.int64) * BLOCK_N + at, mask=mask_b)
    else:
        b_bound = acc + bands
        b_least = tl.load(least + o_b, mask=mask_b, other=float("inf"))[:, None]
        # A query that is given up has least = inf and lists nothing, not even a NaN.
        keep = (mask_n[None, :] & (b_least < float("inf")) & ((b_bound < b_least) == 0)).to(
            tl.int32
        )
        if PASS == _COUNT:
            tl.store(place + to, tl.sum(keep, 1).to(tl.int64), mask=mask_b)
        else:
            before = tl.load(place + to, mask=mask_b, other=0)[:, None]
            slot = before + tl.cumsum(keep, 1) - 1
            listed = keep > 0
            rows = tl.zeros([BLOCK_B, BLOCK_N], tl.int64)
            tl.store(query + slot, rows + o_b[:, None], mask=listed)
            tl.store(index + slot, rows + o_n[None, :], mask=listed)
            tl.store(bound + slot, b_bound, mask=listed)


@triton.jit
def scan_next_level_kernel(
    coarse,  # [N, k0 + bands + 1]
    fine,  # [N, F]
    scaled,  # [B, F] alpha z
    norms,  # [B, bands + 1] a |x_b|, and a |xc|
    query, index,  # [M]
    bound,  # [M] in and out
    M, F, stride_n, k0, bands, k1, k2, b1, b2, pad,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M pairs. It adds the coordinates k1 .. k2 of `fine` to their bounds,
    and takes away the bands b1 .. b2 that these replace. pad is 1 in the first of these levels,
    where the error of the stored coordinates comes in, and 0 later."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = o_m < M
    b_q, b_n = (
        tl.load(query + o_m, mask=mask_m, other=0),
        tl.load(index + o_m, mask=mask_m, other=0),
    )
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in range(k1, k2, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (o_k < k2)
        b_x = tl.load(scaled + b_q[:, None] * F + o_k, mask=mask, other=0.0)
        b_y = tl.load(fine + b_n[:, None] * F + o_k, mask=mask, other=0.0)
        acc += b_x * b_y.to(tl.float32)
    p_x, p_y = norms + b_q * (bands + 1), coarse + b_n * stride_n + k0
    more = pad * tl.load(p_x + bands, mask=mask_m, other=0.0)
    more = more * tl.load(p_y + bands, mask=mask_m, other=0.0)
    for e in range(b1, b2):
        x_e = tl.load(p_x + e, mask=mask_m, other=0.0)
        more -= x_e * tl.load(p_y + e, mask=mask_m, other=0.0)
    b_bound = tl.load(bound + o_m, mask=mask_m, other=0.0)
    tl.store(bound + o_m, b_bound + (tl.sum(acc, 1) + more), mask=mask_m)


def first_level_variant(step: int, biased: bool, few_queries: bool) -> Variant:
    """step: PROMISE, COUNT or LIST. few_queries: up to 16."""
    block_b = 16 if few_queries else 64
    floats = ("coarse", "scaled", "half", "bias", "a2", "s2", "least", "value", "bound")
    return Variant(
        name=f"scan_{('promise', 'count', 'list')[step]} {'bias' if biased else 'plain'}"
        f" B{block_b}",
        kernel=scan_first_level_kernel,
        signature={
            **dict.fromkeys(floats, "*fp32"), "place": "*i64", "query": "*i64",
            "index": "*i64", "B": "i32", "N": "i32", "k0": "i32", "K": "i32", "stride_n": "i32",
        },
        constexprs={
            "PASS": step, "HAS_BIAS": biased, "BLOCK_B": block_b, "BLOCK_N": BLOCK_N,
            "BLOCK_K": 16,
        },
        # Counting needs all bounds of a tile at once.
        num_warps=4 if few_queries else 16 if step == COUNT else 8,
        num_stages=2, aligned=(*floats, "place", "query", "index"),
    )  # fmt: skip


def next_level_variant(dtype: torch.dtype) -> Variant:
    """A later level, of coordinates stored in this type."""
    return Variant(
        name=f"scan_next_level {row_name(dtype)}",
        kernel=scan_next_level_kernel,
        signature={
            "coarse": "*fp32", "fine": POINTERS[dtype], "scaled": "*fp32", "norms": "*fp32",
            "query": "*i64", "index": "*i64", "bound": "*fp32", "M": "i32", "F": "i32",
            **dict.fromkeys(("stride_n", "k0", "bands", "k1", "k2", "b1", "b2"), "i32"),
            "pad": "fp32",
        },
        constexprs={"BLOCK_M": 64, "BLOCK_K": 32},
        num_warps=4, num_stages=2,
        aligned=("coarse", "fine", "scaled", "norms", "query", "index", "bound", "F"),
    )  # fmt: skip


def variants() -> list[Variant]:
    """The passes with and without a bias, of few and of many queries; the stored types."""
    passes = [
        first_level_variant(step, biased, few)
        for step in (PROMISE, COUNT, LIST) for biased in (False, True) for few in (True, False)
    ]  # fmt: skip
    return passes + [next_level_variant(t) for t in STORED]
