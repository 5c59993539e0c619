"""The launches of the backward sweep: four for each block of queries, six where there is a bias.

The first two split the queries and the gradients of their means into terms. The third sweeps: each
cluster leaves a part. The last adds up the parts. Between them, the queries at sigma = 0 and the
gradients for the biases, for which the sweep writes a number for each pair: b n float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.gradient import variants
from memokern.backends.cuda.posterior.call import SweepCall, space_of, split_queries, sweep
from memokern.backends.cuda.posterior.variants import SHARED_OF_QUERIES
from memokern.calls import BasicSums, Gradients, Query, Rows
from memokern.calls.checks import contiguous64

_F32, _F64 = torch.float32, torch.float64
_STATS = BasicSums._fields[1:]


def posterior_backward(query: Query, rows: Rows, sums: BasicSums, grads: BasicSums) -> Gradients:
    """The gradients for the query, given those for the sums."""
    call = SweepCall(query, rows)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(3)]
    grad_bias = call.new(0 if query.bias is None else call.rows.n, dtype=_F64)
    none = [call.new(0, dtype=_F64) for _ in range(2)]  # of a condition, which queries have not
    out = Gradients._make([call.new(b, d), *columns, grad_bias, *none])
    if b:
        _into_gradients(call, sums, grads, out)
    else:
        out.bias.zero_()
    return out


def _of_sums(sums: BasicSums, grads: BasicSums) -> dict[str, Tensor]:
    """Both by their names in GradientParams, as the kernels take them."""
    given = {"mean": sums.mean, "grad_mean": grads.mean}
    found = {name: v.to(_F32).contiguous() for name, v in given.items()}
    for name in _STATS:
        found[name] = contiguous64(getattr(sums, name))
        found[f"grad_{name}"] = contiguous64(getattr(grads, name))
    return found


def _into_gradients(call: SweepCall, sums: BasicSums, grads: BasicSums, out: Gradients) -> None:
    query, rows, plan = call.query, call.rows, call.planned(backward=True)
    b, kind = len(query.x), rows.data.dtype
    tile, q, space = plan.tile, plan.tile.queries, space_of(call, plan)
    biased = query.bias is not None
    given = _of_sums(sums, grads)
    work = {
        "sums": call.new(plan.clusters * abi.GRADIENT_ROWS * q, dtype=_F64),
        "grad_terms": torch.empty_like(space.terms),
        "grad_table": call.new(abi.GRADIENT_TABLE_ROWS * q, dtype=_F64),
        "pairs": call.new(min(b, q) * rows.n) if biased else None,
    }
    terms, ties = variants.terms_variant(kind), variants.ties_variant(kind)
    bias, finish = variants.bias_variant(), variants.finish_variant()
    for b0 in range(0, b, q):
        part = slice(b0, min(b0 + q, b))
        some = query.take(part)
        each = split_queries(call, plan, space, some)
        results: dict[str, Any] = {
            f"grad_{name}": getattr(out, name)[part]
            for name in ("x", "sigma", "alpha", "temperature")
        }
        argument = abi.filled(
            abi.GradientParams, **each, **results, **{name: v[part] for name, v in given.items()},
            **work, terms=space.terms, acc=space.acc, near=space.near, rows=rows.data,
            sq_norms=call.sq_norms, bias=query.bias, center=call.center,
            temperature=some.temperature, grad_bias=out.bias if biased else None,
            shift=rows.shift, zero=call.zero, n=rows.n, dp=tile.cluster * tile.features,
            stride=call.stride, parts=plan.clusters, queries=q, first=int(b0 == 0),
        )  # fmt: skip
        call.launch(terms, terms.entries[0], (q, 1), argument, SHARED_OF_QUERIES)
        sweep(call, plan, argument)
        if biased:
            blocks = -(-rows.n // variants.ROWS_OF_BIAS)
            call.launch(ties, ties.entries[0], (len(some.x), 1), argument, SHARED_OF_QUERIES)
            call.launch(bias, bias.entries[0], (blocks, 1), argument)
        call.launch(finish, finish.entries[0], (len(some.x), 1), argument, SHARED_OF_QUERIES)
