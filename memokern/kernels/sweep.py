"""The posterior: one pass where a tile's sums fit the registers, else chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.kernels import chunked, finish, onepass, planner
from memokern.kernels.common import STATE
from memokern.kernels.queries import Queries
from memokern.kernels.rows import Rows


def posterior(
    q: Queries, data: Rows, machine: planner.Machine, kernel: str, precision: str,
    out: list[Tensor],
) -> None:  # fmt: skip
    """Into out: mean [B, D] float32, log_z, mean_logit, mean_bias and weight_sq [B] float64."""
    b, d = q.x.shape
    if planner.in_one_pass(d, kernel):
        _one_pass(q, data, planner.one_pass(b, data.n, d, machine), precision, out)
        return
    plan = planner.chunked(b, data.n, d, data.rows.dtype, machine)
    chunked.posterior(q, data, plan, kernel, precision, out)


def _one_pass(
    q: Queries, data: Rows, plan: planner.OnePass, precision: str, out: list[Tensor]
) -> None:
    total, d = q.x.shape
    device, has_bias = q.x.device, data.bias is not None
    sweep_v = onepass.variant(data.rows.dtype, plan.features, plan.few, has_bias, precision)
    part_n = planner.share(data.n, plan.parts, sweep_v.constexprs["BLOCK_N"])
    parts = -(-data.n // part_n)
    acc = torch.empty(parts * plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(parts * STATE * plan.queries, dtype=torch.float64, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        sweep_v.launch(
            (-(-b // sweep_v.constexprs["BLOCK_B"]), parts), device, terms=q.terms, rows=data.rows,
            sq_norms=data.sq_norms, bias=data.sq_norms if data.bias is None else data.bias,
            table=q.table, x=q.x, sigma=q.sigma, alpha=q.alpha, numbers=q.numbers, state=state,
            acc=acc, total=total, b0=b0, B=b, N=data.n, D=d, stride_n=data.stride, part_n=part_n,
        )  # fmt: skip
        finish.launch(q, b0, b, state, parts, acc, parts, out)
