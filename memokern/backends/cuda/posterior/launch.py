"""The launches of the dense sweep: three for each block of queries, on one stream.

The first splits the queries into terms and makes their table. The second sweeps: each cluster goes
through its share of the tiles of rows and leaves a part. The third joins the parts. Rows of few
features have a sweep of their own (:mod:`memokern.backends.cuda.plane`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.plane import launch as plane
from memokern.backends.cuda.plane.variants import takes
from memokern.backends.cuda.posterior import variants
from memokern.backends.cuda.posterior.call import SweepCall, space_of, split_queries, sweep
from memokern.calls import Query, Rows, State, Sums

_F64 = torch.float64


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep, normalised."""
    call = SweepCall(query, rows)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(4)]
    # Apart: results of an operation may not share memory.
    out = Sums._make([call.new(b, d), *columns, call.new(b, d)])
    _sweep(call, "memokern_finish_sums", out._asdict())
    return out


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, not normalised."""
    call = SweepCall(query, rows)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(6)]
    out = State._make([*columns, call.new(b, d), call.new(b, d), call.center])
    fields = {name: value for name, value in out._asdict().items() if name not in ("acc", "center")}
    _sweep(call, "memokern_finish_state", {**fields, "sum": out.acc})
    return out


def _sweep(call: SweepCall, entry: str, out: dict[str, Tensor]) -> None:
    """All blocks of queries, into arrays of all queries by their names in FinishParams."""
    query, rows = call.query, call.rows
    b, d = query.x.shape
    if b == 0:
        return
    if takes(b, d):
        plane.sweep(call, int(entry == "memokern_finish_sums"), out)
        return
    plan = call.planned()
    tile, q, space = plan.tile, plan.tile.queries, space_of(call, plan)
    states = call.new(plan.clusters * abi.STATE_ROWS * q, dtype=_F64)
    join = variants.finish_variant()
    for b0 in range(0, b, q):
        part = slice(b0, min(b0 + q, b))
        some = query.take(part)
        each = split_queries(call, plan, space, some)
        swept = abi.filled(
            abi.SweepParams, **each, shift=rows.shift, rows=rows.data, sq_norms=call.sq_norms,
            bias=query.bias, terms=space.terms, states=states, acc=space.acc, near=space.near,
            n=rows.n, stride=call.stride,
        )  # fmt: skip
        joined = abi.filled(
            abi.FinishParams, **each, **{name: v[part] for name, v in out.items()}, zero=call.zero,
            states=states, acc=space.acc, near=space.near, temperature=some.temperature,
            center=call.center, dp=tile.cluster * tile.features, parts=plan.clusters, queries=q,
            log_threshold=float("-inf"),
        )  # fmt: skip
        sweep(call, plan, swept)
        call.launch(join, entry, (len(some.x), -(-d // variants.FINISH_FEATURES)), joined)
