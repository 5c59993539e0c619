"""The launches of ``nearest``: all distances in float32 by direct differences, the bound that they
give on the k-th, the rows within it in float64, and one list of those of all parts. Nothing waits
for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core.call import DeviceCall, check_types, stride_of
from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.nearest import variants
from memokern.calls import Rows
from memokern.calls.checks import check_neighbours, prepared_x

_F64, _I64 = torch.float64, torch.int64
_PAIRS = 1 << 25  # queries times rows at a time, each of which takes 4 bytes of work space
_MOST_PARTS = 64  # of a query's rows: one block joins the lists of all


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    x, rows = prepared_x(x.detach(), rows), rows.detach()
    check_neighbours(k, rows)
    check_types(x, rows)
    call, b, n = DeviceCall(x.device), len(x), rows.n
    distance, index = call.new(b, k, dtype=_F64), call.new(b, k, dtype=_I64)
    step = min(b, max(1, _PAIRS // n))
    groups = -(-n // variants.GROUP_ROWS)
    about, least, most = call.new(step, n), call.new(step, groups), call.new(step)
    for b0 in range(0, b, step or 1):
        part = slice(b0, min(b0 + step, b))
        some, out = x[part], (distance[part], index[part])
        parts = min(_MOST_PARTS, call.parts(len(some), -(-n // variants.ROWS_OF_STEP)))
        part_distance = call.new(len(some), parts, k, dtype=_F64)
        part_index = call.new(len(some), parts, k, dtype=_I64)
        argument = abi.filled(
            abi.NearestParams, rows=rows.data, x=some, about=about, least=least, most=most,
            part_distance=part_distance, part_index=part_index, distance=out[0], index=out[1],
            scale=rows.scale, shift=rows.shift, b=len(some), n=n, d=rows.dim,
            stride=stride_of(rows.data), k=k, parts=parts,
        )  # fmt: skip
        _launch(call, argument, rows.data.dtype)
    return distance, index


def _launch(call: DeviceCall, argument: abi.NearestParams, kind: torch.dtype) -> None:
    b, groups = argument.b, -(-argument.n // variants.GROUP_ROWS)
    team = variants.TEAMS[b > 1]

    def run(variant: Variant, entry: int, blocks: int) -> None:
        shared = variants.SHARED[variant.program]
        call.launch(variant, variant.entries[entry], (blocks, 1), argument, shared)

    run(variants.about_variant(kind, team), 0, groups * -(-b // team))
    run(variants.bound_variant(), 0, b)
    exact = variants.exact_variant(kind)
    run(exact, 0, b * argument.parts)
    run(exact, 1, b)
