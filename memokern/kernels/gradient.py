"""The backward sweep, in chunks of rows: three products for each, to the forward's two.

Per chunk: the products of all queries, and of all incoming gradients of the mean, with all rows;
the coefficient of every pair (`coefficients_kernel`); their product with the rows, and their sum
over the queries, which is the bias's. Work space: WORKSPACE bytes for the two products, the split
queries and gradients, two arrays of sums [B, D] at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.kernels import backward, backward_ends, planner, products
from memokern.kernels.queries import Queries
from memokern.kernels.rows import Rows


def posterior_backward(
    q: Queries, data: Rows, mean: Tensor, stats: Tensor, grad_mean: Tensor, grads: Tensor,
    machine: planner.Machine, kernel: str, precision: str, out: list[Tensor],
) -> None:  # fmt: skip
    """stats, grads [4, B] float64: log_z, mean_logit, mean_bias, weight_sq, and their gradients.
    Into out: grad_x [B, D] float32, grad_sigma, grad_alpha, grad_temperature [B] and grad_bias
    float64, the last [N] of zeros, or empty."""
    total, d = q.x.shape
    device, dtype, has_bias = q.x.device, data.rows.dtype, data.bias is not None
    plan = planner.chunked(total, data.n, d, dtype, machine, kernel, products=2)
    dots_v = products.dots_variant(dtype, plan.few, precision)
    add_v = products.accumulate_variant(dtype, plan.few, precision)
    weigh_v = backward.coefficients_variant(dtype, plan.rows, kernel)
    grads_v, columns_v = backward_ends.grads_variant(), backward_ends.columns_variant()
    chunk = min(plan.rows, data.n)
    part_d = planner.share(d, plan.parts_d, dots_v.constexprs["BLOCK_D"])
    part_n = planner.share(chunk, plan.parts_n, add_v.constexprs["BLOCK_N"])
    parts_d, parts_n = -(-d // part_d), -(-chunk // part_n)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    dots, dots_g = (floats(parts_d * plan.queries * chunk) for _ in range(2))
    acc, near = floats(parts_n * plan.queries * d), floats(plan.queries * d)
    factor, unit = floats(plan.queries), floats(plan.queries)
    sums = torch.empty(backward.SUMS * plan.queries, dtype=torch.float64, device=device)
    terms_g = torch.empty_like(q.terms)
    pulls = torch.empty(2, total, dtype=torch.float64, device=device)
    backward.gradients_variant(dtype).launch(
        (total,), device, grad_mean=grad_mean, mean=mean, numbers=q.numbers, terms=terms_g,
        pulls=pulls, B=total, D=d, offset=q.how.offset,
    )  # fmt: skip
    read = {"rows": data.rows, "stride_n": data.stride, "D": d}
    of_q = {
        "table": q.table, "x": q.x, "mean": mean, "alpha": q.alpha, "temperature": q.temperature,
        "numbers": q.numbers, "stats": stats, "grads": grads, "B": total,
    }  # fmt: skip
    biases = data.sq_norms if data.bias is None else data.bias
    for b0 in range(0, total, plan.queries):
        b = min(plan.queries, total - b0)
        tiles_b = -(-b // dots_v.constexprs["BLOCK_B"])
        for n0 in range(0, data.n, chunk):
            n = min(chunk, data.n - n0)
            tiles_n = -(-n // dots_v.constexprs["BLOCK_N"])
            for terms, into in ((q.terms, dots), (terms_g, dots_g)):
                dots_v.launch(
                    (tiles_b * tiles_n, parts_d), device, terms=terms, dots=into, B=total, b0=b0,
                    b=b, n0=n0, n=n, part_d=part_d, **read,
                )  # fmt: skip
            weigh_v.launch(
                (b,), device, dots=dots, dots_g=dots_g, sq_norms=data.sq_norms, bias=biases,
                pulls=pulls, grad_mean=grad_mean, sigma=q.sigma, center=q.center, sums=sums,
                near=near, factor=factor, unit=unit, b0=b0, b=b, n0=n0, n=n, parts=parts_d,
                has_bias=int(has_bias), **read, **of_q,
            )  # fmt: skip
            tiles_d = -(-d // add_v.constexprs["BLOCK_D"])
            add_v.launch(
                (tiles_b * tiles_d, parts_n), device, weights=dots, factor=factor, unit=unit,
                acc=acc, b=b, n0=n0, n=n, part_n=part_n, **read,
            )  # fmt: skip
            if has_bias:
                columns_v.launch(
                    (-(-n // columns_v.constexprs["BLOCK_N"]),), device, moved=dots_g,
                    grad_bias=out[4], b=b, n0=n0, n=n,
                )  # fmt: skip
        grads_v.launch(
            (b,), device, sums=sums, acc=acc, near=near, sigma=q.sigma, center=q.center,
            grad_x=out[0], grad_sigma=out[1], grad_alpha=out[2], grad_temperature=out[3], b0=b0,
            b=b, D=d, parts=parts_n, offset=q.how.offset, **of_q,
        )  # fmt: skip
    backward_ends.limit_variant(dtype).launch(
        (total,), device, bias=biases, grad_mean=grad_mean, grad_temperature=out[3],
        grad_bias=out[4] if has_bias else biases, N=data.n,
        has_bias=int(has_bias), **read, **of_q,
    )  # fmt: skip
