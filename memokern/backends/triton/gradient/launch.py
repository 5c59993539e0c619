"""The launchers of the backward sweep, in chunks of rows: three products for each, to the forward's
two.

Each chunk is multiplied by all queries, and by all incoming gradients of the mean. From both
products comes the coefficient of every pair (`coefficients_kernel`). Then the coefficients are
multiplied by the rows, and summed over the queries, which is the gradient for the bias. The work
space is WORKSPACE bytes for the two products, the split queries and gradients, and two arrays of
sums [B, D] at least.

The gradient for the rows is a sweep of its own, whose coefficients go to `row_gradient_kernel`. A
sweep for the sums alone comes before it: sum w <g, y - mean>, which would be zero without the
rounding of the mean, must be known so that it can be taken off every coefficient. The work space is
as above, and a chunk of rows in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memokern.backends.triton.core import machine, tuning
from memokern.backends.triton.core.rows import KernelRows
from memokern.backends.triton.gradient import (
    backward_reduce,
    backward_rows,
    coefficients,
    far_queries,
    zero_sigma,
)
from memokern.backends.triton.posterior import finish, planner, products, weigh
from memokern.backends.triton.posterior.launch import sweep
from memokern.backends.triton.posterior.queries import KernelQueries, prepare
from memokern.calls import BasicSums, Gradients, Query, Rows
from memokern.calls.stored import sharp

_F32, _F64 = torch.float32, torch.float64


def posterior_backward(query: Query, rows: Rows, sums: BasicSums, grads: BasicSums) -> Gradients:
    """The gradients for the query, given those for the sums."""
    q, data = prepare(query, rows)
    (b, d), device = q.x.shape, q.x.device
    columns = [torch.empty(b, dtype=_F64, device=device) for _ in range(3)]
    grad_bias = torch.zeros(data.n if data.has_bias else 0, dtype=_F64, device=device)
    grad_x = torch.empty(b, d, dtype=_F32, device=device)
    none = grad_bias.new_empty(0)  # the gradients of a condition, which queries have not
    out = Gradients._make([grad_x, *columns, grad_bias, none, none.clone()])
    if b:
        _into_gradients(_Backward(q, data, sums, grads), out)
    return out._replace(x=out.x.to(query.x.dtype))


def posterior_backward_rows(query: Query, rows: Rows, grads: BasicSums) -> Tensor:
    """The gradient for floating-point rows [N, D], in their type."""
    data, given = rows.data, sharp(rows)
    if given is not rows:
        of_values = posterior_backward_rows(query, given, grads)
        return (rows.scale * of_values).to(data.dtype)
    if query.x.shape[0] == 0:
        return torch.zeros(data.shape, dtype=data.dtype, device=data.device)
    q, stored = prepare(query, rows)
    sums = finish.empty_sums(q)
    sweep(q, stored, sums)
    out = torch.empty(data.shape, dtype=data.dtype, device=data.device)
    _into_rows(_Backward(q, stored, BasicSums(*sums[:5]), grads), rows, out)
    return out


class _Backward:
    """What the coefficients of a chunk of rows and a block of queries are made of."""

    def __init__(
        self, q: KernelQueries, data: KernelRows, sums: BasicSums, grads: BasicSums
    ) -> None:
        self.q, self.data = q, data
        self.total, self.d = q.x.shape
        self.dtype, self.device = data.data.dtype, q.x.device
        size = (self.total, data.n, self.d, self.dtype, machine.of(self.device))
        self.plan = planner.chunked(*size, q.weighting, products=2)
        self.dot_v = products.dot_products_variant(
            self.dtype, self.plan.few_queries, q.precision, data.described
        )
        self.dot_rows = products.rows_for(self.dot_v, data)
        self.chunk = min(self.plan.rows, data.n)
        self.part_d = planner.part_size(self.d, self.plan.parts_d, self.dot_v.constexprs["BLOCK_D"])
        self.parts_d = -(-self.d // self.part_d)
        pairs = self.parts_d * self.plan.queries * self.chunk
        # Hold the parts of the products with x and with g, then what the coefficients' kernel puts
        # in the place of the first.
        self.buffer, self.buffer_g = self.floats(pairs), self.floats(pairs)
        self.near = self.floats(self.plan.queries * self.d)
        self.factor, self.unit = self.floats(self.plan.queries), self.floats(self.plan.queries)
        self.sums = self.doubles(coefficients.SUMS * self.plan.queries)
        self.ties, self.grad_table = self.doubles(3, self.total), self.doubles(3, self.total)
        self.terms_g = torch.empty_like(q.terms)
        mean = sums.mean.to(_F32).contiguous()
        self.grad_mean = grads.mean.to(_F32).contiguous()
        coefficients.split_gradients_variant(self.dtype).launch(
            (self.total,), self.device, grad_mean=self.grad_mean, mean=mean,
            scale_shift=q.scale_shift, terms=self.terms_g, grad_table=self.grad_table,
            B=self.total, D=self.d, offset=q.operand.offset,
        )  # fmt: skip
        # What several kernels take, by the names of their arguments.
        self.sizes: dict[str, Any] = {"stride_n": data.stride, "D": self.d}
        self.of_rows = {"rows": data.data, **self.sizes}
        self.of_bias = {"bias": data.bias_or_any, "has_bias": data.has_bias}
        self.of_queries = {
            "table": q.table, "x": q.x, "alpha": q.alpha, "temperature": q.temperature,
            "scale_shift": q.scale_shift, "B": self.total,
            "stats": torch.stack([v.to(_F64) for v in sums[1:5]]),
        }  # fmt: skip
        self.far = self.doubles(5, self.total)
        far_queries.variant(self.dtype).launch(
            (self.total,), self.device, sigma=q.sigma, far=self.far, N=data.n, **self.of_bias,
            **self.of_rows, **self.of_queries,
        )  # fmt: skip
        self.of_grads = {"mean": mean, "grads": torch.stack([v.to(_F64) for v in grads[1:5]])}

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=_F32, device=self.device)

    def doubles(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=_F64, device=self.device)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first query of each block, and how many queries it has."""
        step = self.plan.queries
        return ((b0, min(step, self.total - b0)) for b0 in range(0, self.total, step))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first row of each chunk, and how many rows it has."""
        n = self.data.n
        return ((n0, min(self.chunk, n - n0)) for n0 in range(0, n, self.chunk))

    def sum_ties(self) -> None:
        """What `tie_gradients` needs, once for all blocks and chunks."""
        zero_sigma.tie_sums_variant(self.dtype).launch(
            (self.total,), self.device, ties=self.ties, N=self.data.n, **self.of_bias,
            **self.of_rows, **self.of_queries,
        )  # fmt: skip

    def coefficients(self, b0: int, b: int, n0: int, n: int, for_rows: bool = False) -> None:
        """The products of a block and a chunk, and from them the coefficients, in their place."""
        v = self.dot_v
        tiles = -(-b // v.constexprs["BLOCK_B"]) * -(-n // v.constexprs["BLOCK_N"])
        for terms, into in ((self.q.terms, self.buffer), (self.terms_g, self.buffer_g)):
            tuning.launch(
                v, (tiles, self.parts_d), self.device, terms=terms, rows=self.dot_rows,
                products=into, B=self.total, b0=b0, b=b, n0=n0, n=n, part_d=self.part_d,
                **self.sizes,
            )  # fmt: skip
        size = weigh.chunk_size(self.plan.rows)
        coefficients.coefficients_variant(
            self.dtype, size, self.q.weighting, for_rows
        ).launch(
            (b,), self.device, products=self.buffer, products_g=self.buffer_g,
            sq_norms=self.data.sq_norms, grad_table=self.grad_table, grad_mean=self.grad_mean,
            sigma=self.q.sigma, far=self.far,
            center=self.q.center, sums=self.sums, near=self.near, factor=self.factor,
            unit=self.unit, b0=b0, b=b, n0=n0, n=n, parts=self.parts_d, **self.of_bias,
            **self.of_rows, **self.of_queries, **self.of_grads,
        )  # fmt: skip

    def tie_gradients(self, b0: int, b: int, n0: int, n: int, for_rows: bool = False) -> None:
        """After `coefficients`, for the queries whose nearest rows share all weight."""
        zero_sigma.tie_gradients_variant(self.dtype).launch(
            (b,), self.device, grad_mean=self.grad_mean, ties=self.ties, sums=self.sums,
            pairs=self.buffer_g, b0=b0, b=b, n0=n0, n=n, for_rows=int(for_rows), **self.of_bias,
            **self.of_rows, **self.of_queries, **self.of_grads,
        )  # fmt: skip


def _into_gradients(back: _Backward, out: Gradients) -> None:
    """Write the gradients for the query; out.bias holds zeros."""
    q, data, d, device = back.q, back.data, back.d, back.device
    add_v = products.accumulate_variant(
        back.dtype, back.plan.few_queries, q.precision, data.described
    )
    add_rows = products.rows_for(add_v, data)
    query_v = backward_reduce.query_gradients_variant()
    bias_v = backward_reduce.bias_gradient_variant()
    part_n = planner.part_size(back.chunk, back.plan.parts_n, add_v.constexprs["BLOCK_N"])
    parts_n = -(-back.chunk // part_n)
    acc = back.floats(parts_n * back.plan.queries * d)
    tiles_d = -(-d // add_v.constexprs["BLOCK_D"])
    if data.has_bias:
        back.sum_ties()
    for b0, b in back.blocks():
        tiles_b = -(-b // add_v.constexprs["BLOCK_B"])
        for n0, n in back.chunks():
            back.coefficients(b0, b, n0, n)
            tuning.launch(
                add_v, (tiles_b * tiles_d, parts_n), device, changes=("acc",), weights=back.buffer,
                rows=add_rows, factor=back.factor, unit=back.unit, acc=acc, b=b, n0=n0, n=n,
                part_n=part_n, **back.sizes,
            )  # fmt: skip
            if data.has_bias:
                back.tie_gradients(b0, b, n0, n)
                bias_v.launch(
                    (-(-n // bias_v.constexprs["BLOCK_N"]),), device, pairs=back.buffer_g,
                    grad_bias=out.bias, b=b, n0=n0, n=n,
                )  # fmt: skip
        query_v.launch(
            (b,), device, sums=back.sums, acc=acc, near=back.near, sigma=q.sigma, far=back.far,
            center=q.center, grad_x=out.x, grad_sigma=out.sigma, grad_alpha=out.alpha,
            grad_temperature=out.temperature, b0=b0, b=b, D=d, parts=parts_n,
            offset=q.operand.offset, **back.of_queries, **back.of_grads,
        )  # fmt: skip


def _into_rows(back: _Backward, rows: Rows, out: Tensor) -> None:
    """Write the gradient for the rows, contiguous [N, D] in their type."""
    q = back.q
    for b0, b in back.blocks():
        for n0, n in back.chunks():
            back.coefficients(b0, b, n0, n)
        sums = back.sums[: coefficients.SUMS * b].view(coefficients.SUMS, b)
        w, drift = sums[coefficients.W.value], sums[coefficients.DRIFT.value]
        drift = torch.where(w > 0, drift / w, 0.0) * q.temperature[b0 : b0 + b]
        back.grad_table[2, b0 : b0 + b] = drift
    back.sum_ties()
    variant = backward_rows.variant(back.dtype)
    step_n, step_d = (variant.constexprs[name] for name in ("BLOCK_N", "BLOCK_D"))
    factors = backward_rows.factors(q, rows)
    many = back.plan.queries < back.total
    acc = back.floats((back.chunk if many else 0) * back.d)
    for n0, n in back.chunks():
        for b0, b in back.blocks():
            back.coefficients(b0, b, n0, n, for_rows=True)
            back.tie_gradients(b0, b, n0, n, for_rows=True)
            variant.launch(
                (-(-n // step_n) * -(-back.d // step_d),), back.device, coefficients=back.buffer,
                weights=back.buffer_g, factors=factors, x=q.x, grad_mean=back.grad_mean, acc=acc,
                grad_rows=out, B=back.total, b0=b0, b=b, n0=n0, n=n,
                is_last=int(b0 + b == back.total), scale=rows.scale, **back.of_rows,
            )  # fmt: skip
