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
    device, dtype, has_bias = q.x.device, data.rows.dtype, data.bias is not None
    sweep_v = onepass.sweep_variant(dtype, plan.features, plan.few, has_bias, precision)
    block_b, block_n = sweep_v.constexprs["BLOCK_B"], sweep_v.constexprs["BLOCK_N"]
    exact_v = onepass.exact_variant(dtype, plan.features, block_n, has_bias)
    part_n = planner.share(data.n, plan.parts, block_n)
    parts, runs = -(-data.n // part_n), -(-part_n // (onepass.RUN * block_n))
    # The parts of both kernels, joined at the end.
    acc = torch.empty(2 * parts, plan.queries * d, dtype=torch.float32, device=device)
    state = torch.empty(2 * parts, STATE * plan.queries, dtype=torch.float64, device=device)
    bits = torch.empty(plan.queries * parts * runs * block_n, dtype=torch.int32, device=device)
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        # Views of as many numbers as this block has.
        acc_b, state_b = acc.view(-1)[: 2 * parts * b * d], state.view(-1)[: 2 * parts * STATE * b]
        at = {
            "rows": data.rows, "bias": data.sq_norms if data.bias is None else data.bias,
            "table": q.table, "bits": bits, "total": total, "b0": b0, "B": b, "N": data.n,
            "D": d, "stride_n": data.stride, "part_n": part_n, "runs": runs,
        }  # fmt: skip
        sweep_v.launch(
            (-(-b // block_b), parts), device, terms=q.terms, sq_norms=data.sq_norms,
            state=state_b, acc=acc_b, **at,
        )  # fmt: skip
        exact_v.launch(
            (b, parts), device, x=q.x, sigma=q.sigma, alpha=q.alpha, numbers=q.numbers,
            state=state_b[parts * STATE * b :], acc=acc_b[parts * b * d :], **at,
        )  # fmt: skip
        finish.launch(q, b0, b, state, 2 * parts, acc, 2 * parts, out)
