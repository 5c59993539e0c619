"""The posterior: one pass where a tile's sums fit the registers, else chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.common import STATE
from memokern.backends.triton.core.rows import Rows
from memokern.backends.triton.posterior import chunked, finish, onepass, planner
from memokern.backends.triton.posterior.queries import Queries


def posterior(
    q: Queries, data: Rows, machine: planner.Machine, kernel: str, precision: str,
    out: list[Tensor],
) -> None:  # fmt: skip
    """Into out: mean [B, D] float32, log_z, mean_logit, mean_bias and weight_sq [B] float64."""
    b, d = q.x.shape
    size = (b, data.n, d, data.rows.dtype, machine, kernel)
    plan = planner.one_pass(*size, data.unaligned)
    if plan is not None:
        _one_pass(q, data, plan, precision, out)
    else:
        chunked.posterior(q, data, planner.chunked(*size), kernel, precision, out)


def _one_pass(
    q: Queries, data: Rows, plan: planner.OnePass, precision: str, out: list[Tensor]
) -> None:
    total, d = q.x.shape
    device, dtype, has_bias = q.x.device, data.rows.dtype, data.bias is not None
    sweep_v = onepass.sweep_variant(dtype, plan.features, plan.few, precision, data.unaligned)
    exact_v = onepass.exact_variant(dtype, plan.features)
    size = onepass.tile(dtype, plan.features, plan.few, data.unaligned)
    swept = -(-data.n // (plan.run * size.n))
    parts = swept + plan.exact_parts
    words = onepass.words(data.n, size)
    # The parts of both kernels, joined at the end.
    acc = torch.empty(parts * plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(parts * STATE * plan.queries, dtype=torch.float64, device=device)
    marks = torch.empty(plan.queries * words, dtype=torch.int32, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        at: dict[str, Any] = {
            "rows": data.rows, "bias": data.sq_norms if data.bias is None else data.bias,
            "table": q.table, "marks": marks, "total": total, "b0": b0, "B": b, "D": d,
            "stride_n": data.stride, "words": words, "has_bias": int(has_bias),
        }  # fmt: skip
        tuning.launch(
            sweep_v, (-(-b // size.b) * swept,), device, terms=q.terms, sq_norms=data.sq_norms,
            N=data.n, state=state, acc=acc, run=plan.run, **at,
        )  # fmt: skip
        exact_v.launch(
            (b, plan.exact_parts), device, x=q.x, sigma=q.sigma, alpha=q.alpha, numbers=q.numbers,
            state=state[swept * STATE * b :], acc=acc[swept * b * d :],
            width=min(size.n, onepass.WORD.value),
            share=planner.share(words, plan.exact_parts, onepass.STRIPS), **at,
        )  # fmt: skip
        finish.launch(q, b0, b, state, parts, acc, parts, out)
