"""The backward sweep, in chunks of rows: three products for each, to the forward's two.

Per chunk: the products of all queries, and of all incoming gradients of the mean, with all rows;
the coefficient of every pair (`coefficients_kernel`); their product with the rows, and their sum
over the queries, which is the bias's. Work space: WORKSPACE bytes for the two products, the split
queries and gradients, two arrays of sums [B, D] at least.

The gradient for the rows is a sweep of its own, whose coefficients go to `rows_kernel`. Before it
goes one for the sums alone: sum w <g, y - mean>, which is zero but for the rounding of the mean,
must be known to be taken off every coefficient. Work space: as above, and a chunk of rows in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.rows import Rows
from memokern.backends.triton.gradient import backward, backward_rows
from memokern.backends.triton.gradient import backward_reduce as backward_ends
from memokern.backends.triton.gradient import zero_sigma as backward_limit
from memokern.backends.triton.posterior import planner, products, weigh
from memokern.backends.triton.posterior.queries import Queries


class _Sweep:
    """What a chunk of rows and a block of queries need on their way to coefficients.

    stats, grads [4, B] float64: log_z, mean_logit, mean_bias, weight_sq, and their gradients.
    """

    def __init__(
        self, q: Queries, data: Rows, mean: Tensor, stats: Tensor, grad_mean: Tensor, grads: Tensor,
        machine: planner.Machine, kernel: str, precision: str,
    ) -> None:  # fmt: skip
        self.q, self.data, self.kernel, self.precision = q, data, kernel, precision
        self.total, self.d = q.x.shape
        self.dtype, self.device = data.rows.dtype, q.x.device
        self.grad_mean, self.has_bias = grad_mean, data.bias is not None
        self.plan = planner.chunked(
            self.total, data.n, self.d, self.dtype, machine, kernel, products=2
        )
        self.dots_v = products.dots_variant(self.dtype, self.plan.few, precision, data.described)
        self.dots_rows = products.rows_for(self.dots_v, data)
        self.chunk = min(self.plan.rows, data.n)
        self.part_d = planner.share(self.d, self.plan.parts_d, self.dots_v.constexprs["BLOCK_D"])
        self.parts_d = -(-self.d // self.part_d)
        size = self.parts_d * self.plan.queries * self.chunk
        self.dots, self.dots_g = self.floats(size), self.floats(size)
        self.near = self.floats(self.plan.queries * self.d)
        self.factor, self.unit = self.floats(self.plan.queries), self.floats(self.plan.queries)
        self.sums = self.doubles(backward.SUMS * self.plan.queries)
        self.limits = self.doubles(3, self.total)
        self.terms_g, self.pulls = torch.empty_like(q.terms), self.doubles(3, self.total)
        backward.gradients_variant(self.dtype).launch(
            (self.total,), self.device, grad_mean=grad_mean, mean=mean, numbers=q.numbers,
            terms=self.terms_g, pulls=self.pulls, B=self.total, D=self.d, offset=q.how.offset,
        )  # fmt: skip
        self.biases = data.sq_norms if data.bias is None else data.bias
        self.sizes: dict[str, Any] = {"stride_n": data.stride, "D": self.d}
        self.read = {"rows": data.rows, **self.sizes}
        self.of_q = {
            "table": q.table, "x": q.x, "alpha": q.alpha, "temperature": q.temperature,
            "numbers": q.numbers, "stats": stats, "B": self.total,
        }  # fmt: skip
        self.of_g = {"mean": mean, "grads": grads}

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def doubles(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first query of each block, and how many there are."""
        step = self.plan.queries
        return ((b0, min(step, self.total - b0)) for b0 in range(0, self.total, step))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The same of the rows."""
        n = self.data.n
        return ((n0, min(self.chunk, n - n0)) for n0 in range(0, n, self.chunk))

    def find_limits(self) -> None:
        """For `ties`, before anything else."""
        backward_limit.limits_variant(self.dtype).launch(
            (self.total,), self.device, bias=self.biases, limits=self.limits, N=self.data.n,
            has_bias=int(self.has_bias), **self.read, **self.of_q,
        )  # fmt: skip

    def coefficients(self, b0: int, b: int, n0: int, n: int, for_rows: bool = False) -> None:
        """Of a block and a chunk, from dots to dots."""
        v = self.dots_v
        tiles = -(-b // v.constexprs["BLOCK_B"]) * -(-n // v.constexprs["BLOCK_N"])
        for terms, into in ((self.q.terms, self.dots), (self.terms_g, self.dots_g)):
            tuning.launch(
                v, (tiles, self.parts_d), self.device, terms=terms, rows=self.dots_rows, dots=into,
                B=self.total, b0=b0, b=b, n0=n0, n=n, part_d=self.part_d, **self.sizes,
            )  # fmt: skip
        room = weigh.room(self.plan.rows)
        backward.coefficients_variant(self.dtype, room, self.kernel, for_rows).launch(
            (b,), self.device, dots=self.dots, dots_g=self.dots_g, sq_norms=self.data.sq_norms,
            bias=self.biases, pulls=self.pulls, grad_mean=self.grad_mean, sigma=self.q.sigma,
            center=self.q.center, sums=self.sums, near=self.near, factor=self.factor,
            unit=self.unit, b0=b0, b=b, n0=n0, n=n, parts=self.parts_d,
            has_bias=int(self.has_bias), **self.read, **self.of_q, **self.of_g,
        )  # fmt: skip

    def ties(self, b0: int, b: int, n0: int, n: int, for_rows: bool = False) -> None:
        """After `coefficients`, for queries at a limit."""
        backward_limit.ties_variant(self.dtype).launch(
            (b,), self.device, bias=self.biases, grad_mean=self.grad_mean, limits=self.limits,
            sums=self.sums, moved=self.dots_g, b0=b0, b=b, n0=n0, n=n,
            has_bias=int(self.has_bias), for_rows=int(for_rows), **self.read, **self.of_q,
            **self.of_g,
        )  # fmt: skip


def posterior_backward(
    q: Queries, data: Rows, mean: Tensor, stats: Tensor, grad_mean: Tensor, grads: Tensor,
    machine: planner.Machine, kernel: str, precision: str, out: list[Tensor],
) -> None:  # fmt: skip
    """stats, grads [4, B] float64: log_z, mean_logit, mean_bias, weight_sq, and their gradients.
    Into out: grad_x [B, D] float32, grad_sigma, grad_alpha, grad_temperature [B] and grad_bias
    float64, the last [N] of zeros, or empty."""
    sweep = _Sweep(q, data, mean, stats, grad_mean, grads, machine, kernel, precision)
    d, device = sweep.d, sweep.device
    add_v = products.accumulate_variant(sweep.dtype, sweep.plan.few, precision, data.described)
    add_rows = products.rows_for(add_v, data)
    grads_v, columns_v = backward_ends.grads_variant(), backward_ends.columns_variant()
    part_n = planner.share(sweep.chunk, sweep.plan.parts_n, add_v.constexprs["BLOCK_N"])
    parts_n = -(-sweep.chunk // part_n)
    acc = sweep.floats(parts_n * sweep.plan.queries * d)
    tiles_d = -(-d // add_v.constexprs["BLOCK_D"])
    if sweep.has_bias:
        sweep.find_limits()
    for b0, b in sweep.blocks():
        tiles_b = -(-b // add_v.constexprs["BLOCK_B"])
        for n0, n in sweep.chunks():
            sweep.coefficients(b0, b, n0, n)
            tuning.launch(
                add_v, (tiles_b * tiles_d, parts_n), device, changes=("acc",), weights=sweep.dots,
                rows=add_rows, factor=sweep.factor, unit=sweep.unit, acc=acc, b=b, n0=n0, n=n,
                part_n=part_n, **sweep.sizes,
            )  # fmt: skip
            if sweep.has_bias:
                sweep.ties(b0, b, n0, n)
                columns_v.launch(
                    (-(-n // columns_v.constexprs["BLOCK_N"]),), device, moved=sweep.dots_g,
                    grad_bias=out[4], b=b, n0=n0, n=n,
                )  # fmt: skip
        grads_v.launch(
            (b,), device, sums=sweep.sums, acc=acc, near=sweep.near, sigma=q.sigma,
            center=q.center, grad_x=out[0], grad_sigma=out[1], grad_alpha=out[2],
            grad_temperature=out[3], b0=b0, b=b, D=d, parts=parts_n, offset=q.how.offset,
            **sweep.of_q, **sweep.of_g,
        )  # fmt: skip


def posterior_backward_rows(
    q: Queries, data: Rows, mean: Tensor, stats: Tensor, grad_mean: Tensor, grads: Tensor,
    machine: planner.Machine, kernel: str, precision: str, scale: float, shift: float, out: Tensor,
) -> None:  # fmt: skip
    """Into out: the gradient for the rows, contiguous [N, D] in their type; the rest is that of
    `posterior_backward`."""
    sweep = _Sweep(q, data, mean, stats, grad_mean, grads, machine, kernel, precision)
    for b0, b in sweep.blocks():
        for n0, n in sweep.chunks():
            sweep.coefficients(b0, b, n0, n)
        sums = sweep.sums[: backward.SUMS * b].view(backward.SUMS, b)
        w, drift = sums[backward.W.value], sums[backward.DRIFT.value]
        drift = torch.where(w > 0, drift / w, 0.0) * q.temperature[b0 : b0 + b]
        sweep.pulls[2, b0 : b0 + b] = drift
    sweep.find_limits()
    rows_v = backward_rows.variant(sweep.dtype)
    step_n, step_d = (rows_v.constexprs[name] for name in ("BLOCK_N", "BLOCK_D"))
    of_each = backward_rows.factors(q, scale, shift, kernel)
    many = sweep.plan.queries < sweep.total
    acc = sweep.floats((sweep.chunk if many else 0) * sweep.d)
    for n0, n in sweep.chunks():
        for b0, b in sweep.blocks():
            sweep.coefficients(b0, b, n0, n, for_rows=True)
            sweep.ties(b0, b, n0, n, for_rows=True)
            rows_v.launch(
                (-(-n // step_n) * -(-sweep.d // step_d),), sweep.device, coefficients=sweep.dots,
                weights=sweep.dots_g, factors=of_each, x=q.x, grad_mean=grad_mean, acc=acc,
                grad_rows=out, B=sweep.total, b0=b0, b=b, n0=n0, n=n,
                is_last=int(b0 + b == sweep.total), scale=scale, **sweep.read,
            )  # fmt: skip
