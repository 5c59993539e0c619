"""The sweep in chunks of rows, for any number of features: two products for each chunk.

Each chunk is multiplied by all queries (`dot_products_kernel`). From the products come weights
relative to the largest logit so far (`weigh_kernel`). Then the weighted rows, which are in the L2
cache now, are added up (`accumulate_kernel`). The work space is WORKSPACE bytes, the split queries
and the accumulators.
"""

from __future__ import annotations

from typing import Any

import torch

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.core.state import STATE
from memokern.backends.triton.posterior import finish, planner, products, weigh
from memokern.backends.triton.posterior.finish import Parts
from memokern.backends.triton.posterior.queries import KernelQueries
from memokern.calls import State, Sums


def launch(q: KernelQueries, data: KernelRows, plan: planner.Chunked, into: Sums | State) -> None:
    """The sweep as planned, for all queries."""
    total, d = q.x.shape
    device, dtype = q.x.device, data.data.dtype
    at: dict[str, Any] = {"D": d, "stride_n": data.stride}
    how = (dtype, plan.few_queries, q.precision, data.described)
    dot_v, add_v = products.dot_products_variant(*how), products.accumulate_variant(*how)
    dot_rows, add_rows = products.rows_for(dot_v, data), products.rows_for(add_v, data)
    weigh_v = weigh.variant(dtype, weigh.chunk_size(plan.rows), q.weighting)
    chunk = min(plan.rows, data.n)
    part_d = planner.part_size(d, plan.parts_d, dot_v.constexprs["BLOCK_D"])
    part_n = planner.part_size(chunk, plan.parts_n, add_v.constexprs["BLOCK_N"])
    parts_d, parts_n = -(-d // part_d), -(-chunk // part_n)
    # Holds the parts of the products, then weights in the place of the first.
    buffer = torch.empty(parts_d * plan.queries * chunk, dtype=torch.float32, device=device)
    acc = torch.empty(parts_n * plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(STATE.value * plan.queries, dtype=torch.float64, device=device)
    near = torch.empty(plan.queries * d, dtype=torch.float32, device=device)
    near_s = torch.empty(plan.queries, dtype=torch.float64, device=device)
    factor = torch.empty(plan.queries, dtype=torch.float32, device=device)
    unit = torch.ones(plan.queries, dtype=torch.float32, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        tiles_b = -(-b // dot_v.constexprs["BLOCK_B"])
        for n0 in range(0, data.n, chunk):
            n = min(chunk, data.n - n0)
            tiles_n = -(-n // dot_v.constexprs["BLOCK_N"])
            tuning.launch(
                dot_v, (tiles_b * tiles_n, parts_d), device, terms=q.terms, rows=dot_rows,
                products=buffer, B=total, b0=b0, b=b, n0=n0, n=n, part_d=part_d, **at,
            )  # fmt: skip
            weigh_v.launch(
                (b,), device, products=buffer, sq_norms=data.sq_norms, bias=data.bias_or_any,
                table=q.table, x=q.x, sigma=q.sigma, alpha=q.alpha, scale_shift=q.scale_shift,
                state=state, factor=factor, pulls=near, pulls_s=near_s, B=total, b0=b0, b=b, n0=n0,
                n=n, parts=parts_d,
                rows=data.data, has_bias=data.has_bias, **at,
            )  # fmt: skip
            tiles_d = -(-d // add_v.constexprs["BLOCK_D"])
            tuning.launch(
                add_v, (tiles_b * tiles_d, parts_n), device, changes=("acc",), weights=buffer,
                rows=add_rows, factor=factor, unit=unit, acc=acc, b=b, n0=n0, n=n, part_n=part_n,
                **at,
            )  # fmt: skip
        finish.launch(q, b0, b, Parts(state, 1, acc, parts_n, near, near_s=near_s), into)
