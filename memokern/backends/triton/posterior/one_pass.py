"""The sweep in one pass: a kernel for the products, a kernel for the rows that it marked, and one
that joins the parts of both."""

from __future__ import annotations

from typing import Any

import torch

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.core.state import STATE
from memokern.backends.triton.posterior import finish, fused, marked, planner
from memokern.backends.triton.posterior.finish import Parts
from memokern.backends.triton.posterior.queries import KernelQueries
from memokern.calls import State, Sums


def launch(q: KernelQueries, data: KernelRows, plan: planner.OnePass, into: Sums | State) -> None:
    """The sweep as planned, for all queries."""
    total, d = q.x.shape
    device, dtype = q.x.device, data.data.dtype
    tile = fused.tile(dtype, plan.features, plan.few_queries, data.unaligned)
    sweep_v = fused.sweep_variant(
        dtype, plan.features, plan.few_queries, q.precision, data.unaligned
    )
    exact_v = marked.exact_variant(dtype, plan.features)
    swept = -(-data.n // (plan.run * tile.n))
    parts = swept + plan.exact_parts
    words = fused.words(data.n, tile)
    # The sweep writes the first parts, the exact kernel the others.
    acc = torch.empty(parts * plan.queries * d, dtype=torch.float32, device=device)
    pulls = torch.empty(plan.exact_parts * plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(parts * STATE.value * plan.queries, dtype=torch.float64, device=device)
    marks = torch.empty(plan.queries * words, dtype=torch.int32, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        at: dict[str, Any] = {
            "rows": data.data, "bias": data.bias_or_any, "table": q.table, "marks": marks,
            "total": total, "b0": b0, "B": b, "D": d, "stride_n": data.stride, "words": words,
            "has_bias": data.has_bias,
        }  # fmt: skip
        tuning.launch(
            sweep_v, (-(-b // tile.b) * swept,), device, terms=q.terms, sq_norms=data.sq_norms,
            N=data.n, state=state, acc=acc, run=plan.run, **at,
        )  # fmt: skip
        exact_v.launch(
            (b, plan.exact_parts), device, x=q.x, sigma=q.sigma, alpha=q.alpha,
            scale_shift=q.scale_shift, state=state[swept * STATE.value * b :],
            acc=acc[swept * b * d :], pulls=pulls, word_rows=min(tile.n, fused.WORD.value),
            part_words=planner.part_size(words, plan.exact_parts, marked.STRIPS), **at,
        )  # fmt: skip
        finish.launch(q, b0, b, Parts(state, parts, acc, parts, pulls, plan.exact_parts), into)
