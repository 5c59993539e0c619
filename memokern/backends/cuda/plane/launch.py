"""The launches of the sweep over rows of few features: two. Blocks share out queries and parts of
the rows, and then the parts are joined."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core.call import largest
from memokern.backends.cuda.plane import variants
from memokern.backends.cuda.posterior.call import SweepCall

_PART_ROWS = 2 * variants.TILE  # at least
_MOST_BYTES = 256 << 20  # of the parts' sums


def sweep(call: SweepCall, entry: int, out: dict[str, Tensor]) -> None:
    """All queries, into arrays by their names in PlaneParams. entry: 0 for a state, 1 for sums."""
    query, rows = call.query, call.rows
    b, d = query.x.shape
    width = variants.width_of(d)
    assert width is not None
    variant, join = variants.sweep_variant(rows.data.dtype, width), variants.finish_variant()
    blocks, sums = -(-b // variant.threads), variants.SUMS + 2 * width
    parts = call.parts(blocks, -(-rows.n // _PART_ROWS))
    parts = max(1, min(parts, _MOST_BYTES // (8 * sums * b)))
    part = call.new(parts * sums, b, dtype=torch.float64)
    known = largest(query.bias, call.center, call.sq_norms)
    argument = abi.filled(
        abi.PlaneParams, **out, rows=rows.data, bias=query.bias, x=query.x, sigma=query.sigma,
        alpha=query.alpha, temperature=query.temperature, center=call.center, largest=known,
        part=part, scale=rows.scale, shift=rows.shift, b=b, n=rows.n, d=d, stride=call.stride,
        parts=parts, log=int(query.weighting == "log"), features=width,
    )  # fmt: skip
    shared = variants.shared_of(variant)
    call.launch(variant, variant.entries[0], (blocks * parts, 1), argument, shared)
    call.launch(join, join.entries[entry], (-(-b // variants.FINISH_QUERIES), 1), argument)
