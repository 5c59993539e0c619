"""The partial result of a sweep as the kernels hold it, and the monoid that joins two of them.

:class:`memokern.calls.State` defines the numbers. :func:`memokern.calls.merge` is the same monoid
in PyTorch, and the tests hold both to the same laws. Until the last step of a sweep, accumulators
are sums of the rows as they enter products; `finish_kernel` makes sums of y - center of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memokern.backends.triton.core.variant import Variant
from memokern.calls import State

# The rows of an array of states, [STATE, B] float64, in the order of the fields of calls.State.
KEY, M, S, S_V, S_BIAS, S_SQ = (tl.constexpr(i) for i in range(6))
STATE = tl.constexpr(6)


@triton.jit
def merge(
    key, m, s, s_v, s_bias, s_sq, key_b, m_b, s_b, s_v_b, s_bias_b, s_sq_b
):  # fmt: skip
    """The state of the rows of both, and what their accumulators must be multiplied by. The neutral
    element has key inf, m -inf and sums 0. Only the smaller key counts; a sum that is NaN counts as
    one of rows that have weight, so that a query that is not finite stays lost."""
    least = tl.minimum(key, key_b)
    has_a, has_b = (key == least) & (s != 0.0), (key_b == least) & (s_b != 0.0)
    inf = float("inf")
    top = tl.maximum(tl.where(has_a, m, -inf), tl.where(has_b, m_b, -inf))
    gap_a, gap_b = tl.where(has_a, m - top, 0.0), tl.where(has_b, m_b - top, 0.0)
    f_a, f_b = tl.where(has_a, tl.exp(gap_a), 0.0), tl.where(has_b, tl.exp(gap_b), 0.0)
    least = tl.where(has_a | has_b, least, inf)
    return (
        least, top, f_a * s + f_b * s_b,
        f_a * (s_v + s * gap_a) + f_b * (s_v_b + s_b * gap_b),
        f_a * s_bias + f_b * s_bias_b, f_a * f_a * s_sq + f_b * f_b * s_sq_b, f_a, f_b,
    )  # fmt: skip


@triton.jit
def merge_states_kernel(
    state_a, state_b,  # [STATE, B]
    acc_a, acc_b,  # [B, D]
    residual_a, residual_b,  # [B, D]
    center_a, center_b,  # [D]
    state,  # [STATE, B] out
    acc,  # [B, D] out, about center_a
    residual,  # [B, D] out
    B, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a query and BLOCK_D features, and joins its two states and accumulators; the
    program of the first features writes the state."""
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    p_a, p_b = state_a + i_b, state_b + i_b
    s_b = tl.load(p_b + S * B)
    key, m, s, s_v, s_bias, s_sq, f_a, f_b = merge(
        tl.load(p_a + KEY * B), tl.load(p_a + M * B), tl.load(p_a + S * B),
        tl.load(p_a + S_V * B), tl.load(p_a + S_BIAS * B), tl.load(p_a + S_SQ * B),
        tl.load(p_b + KEY * B), tl.load(p_b + M * B), s_b,
        tl.load(p_b + S_V * B), tl.load(p_b + S_BIAS * B), tl.load(p_b + S_SQ * B),
    )  # fmt: skip
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < D
    b_a = tl.load(acc_a + i_b * D + o_d, mask=mask, other=0.0).to(tl.float64)
    b_b = tl.load(acc_b + i_b * D + o_d, mask=mask, other=0.0).to(tl.float64)
    moved = tl.load(center_b + o_d, mask=mask, other=0.0)
    moved -= tl.load(center_a + o_d, mask=mask, other=0.0)
    # A factor of 0 leaves an accumulator out, whatever it holds.
    total = tl.where(f_a == 0.0, 0.0, f_a * b_a)
    total += tl.where(f_b == 0.0, 0.0, f_b * (b_b + s_b * moved))
    tl.store(acc + i_b * D + o_d, total.to(tl.float32), mask=mask)
    r_a = tl.load(residual_a + i_b * D + o_d, mask=mask, other=0.0).to(tl.float64)
    r_b = tl.load(residual_b + i_b * D + o_d, mask=mask, other=0.0).to(tl.float64)
    total = tl.where(f_a == 0.0, 0.0, f_a * r_a) + tl.where(f_b == 0.0, 0.0, f_b * r_b)
    tl.store(residual + i_b * D + o_d, total.to(tl.float32), mask=mask)
    if i_d == 0:
        p_o = state + i_b
        tl.store(p_o + KEY * B, key)
        tl.store(p_o + M * B, m)
        tl.store(p_o + S * B, s)
        tl.store(p_o + S_V * B, s_v)
        tl.store(p_o + S_BIAS * B, s_bias)
        tl.store(p_o + S_SQ * B, s_sq)


def merge_states_variant() -> Variant:
    narrow = ("acc_a", "acc_b", "residual_a", "residual_b", "acc", "residual")
    arrays = ("state_a", "state_b", "center_a", "center_b", "state")
    return Variant(
        name="merge_states",
        kernel=merge_states_kernel,
        signature={
            **dict.fromkeys(arrays, "*fp64"), **dict.fromkeys(narrow, "*fp32"),
            "B": "i32", "D": "i32",
        },
        constexprs={"BLOCK_D": 128},
        aligned=(*narrow, "center_a", "center_b", "D"),
    )  # fmt: skip


def variants() -> list[Variant]:
    return [merge_states_variant()]


def merge_states(a: State, b: State) -> State:
    """The state of the rows of both, about a's center, as :func:`memokern.calls.merge` gives it.
    Accumulators are float32."""
    size, d = a.acc.shape
    device = a.acc.device
    joined = torch.empty(STATE.value, size, dtype=torch.float64, device=device)
    acc, residual = torch.empty(2, size, d, dtype=torch.float32, device=device)
    variant = merge_states_variant()
    variant.launch(
        (size, -(-d // variant.constexprs["BLOCK_D"])), device, state_a=torch.stack(a[:6]),
        state_b=torch.stack(b[:6]), acc_a=a.acc.contiguous(), acc_b=b.acc.contiguous(),
        residual_a=a.residual.contiguous(), residual_b=b.residual.contiguous(), center_a=a.center,
        center_b=b.center, state=joined, acc=acc, residual=residual, B=size, D=d,
    )  # fmt: skip
    return State._make([*joined.unbind(0), acc, residual, a.center])
