"""The sweep in chunks of rows, for any number of features: two products for each chunk.

Per chunk: the products of all queries and rows (`dots_kernel`); weights, relative to the largest
logit so far (`weigh_kernel`); their product with the rows, which are in the L2 cache now
(`accumulate_kernel`). Work space: WORKSPACE bytes, the split queries, the accumulators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.common import STATE
from memokern.backends.triton.core.rows import Rows
from memokern.backends.triton.posterior import finish, planner, products, weigh
from memokern.backends.triton.posterior.queries import Queries


def posterior(
    q: Queries, data: Rows, plan: planner.Chunked, kernel: str, precision: str, out: list[Tensor]
) -> None:
    """Into out: mean [B, D] float32, log_z, mean_logit, mean_bias and weight_sq [B] float64."""
    total, d = q.x.shape
    device = q.x.device
    at: dict[str, Any] = {"D": d, "stride_n": data.stride}
    dtype = data.rows.dtype
    dots_v = products.dots_variant(dtype, plan.few, precision, data.described)
    add_v = products.accumulate_variant(dtype, plan.few, precision, data.described)
    dots_rows, add_rows = products.rows_for(dots_v, data), products.rows_for(add_v, data)
    weigh_v = weigh.variant(dtype, weigh.room(plan.rows), kernel)
    chunk = min(plan.rows, data.n)
    part_d = planner.share(d, plan.parts_d, dots_v.constexprs["BLOCK_D"])
    part_n = planner.share(chunk, plan.parts_n, add_v.constexprs["BLOCK_N"])
    parts_d, parts_n = -(-d // part_d), -(-chunk // part_n)
    dots = torch.empty(parts_d * plan.queries * chunk, dtype=torch.float32, device=device)
    acc = torch.empty(parts_n * plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(STATE * plan.queries, dtype=torch.float64, device=device)
    factor = torch.empty(plan.queries, dtype=torch.float32, device=device)
    unit = torch.ones(plan.queries, dtype=torch.float32, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        tiles_b = -(-b // dots_v.constexprs["BLOCK_B"])
        for n0 in range(0, data.n, chunk):
            n = min(chunk, data.n - n0)
            tiles_n = -(-n // dots_v.constexprs["BLOCK_N"])
            tuning.launch(
                dots_v, (tiles_b * tiles_n, parts_d), device, terms=q.terms, rows=dots_rows,
                dots=dots, B=total, b0=b0, b=b, n0=n0, n=n, part_d=part_d, **at,
            )  # fmt: skip
            weigh_v.launch(
                (b,), device, dots=dots, sq_norms=data.sq_norms,
                bias=data.sq_norms if data.bias is None else data.bias, table=q.table, x=q.x,
                sigma=q.sigma, alpha=q.alpha, numbers=q.numbers, state=state, factor=factor,
                B=total, b0=b0, b=b, n0=n0, n=n, parts=parts_d,
                rows=data.rows, has_bias=int(data.bias is not None), **at,
            )  # fmt: skip
            tiles_d = -(-d // add_v.constexprs["BLOCK_D"])
            tuning.launch(
                add_v, (tiles_b * tiles_d, parts_n), device, changes=("acc",), weights=dots,
                rows=add_rows, factor=factor, unit=unit, acc=acc, b=b, n0=n0, n=n, part_n=part_n,
                **at,
            )  # fmt: skip
        finish.launch(q, b0, b, state, 1, acc, parts_n, out)
