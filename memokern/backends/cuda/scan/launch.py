"""The launches of ``bound_scan``: which rows can matter to each query.

A level of the index is one pass over what the levels before it left, in lists that only the device
knows the length of. Nothing waits until all is done, when the host reads how many rows are listed
in all. The proofs are in ``docs/pruning.md``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core.call import DeviceCall, check_types, largest, stride_of
from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.scan import variants
from memokern.calls import LogitBounds, Query, RowLists, Rows, Scan
from memokern.calls.checks import (
    bands_of,
    check_selectable,
    contiguous64,
    prepared,
    prepared_bounds,
)

_F64, _I64, _I32 = torch.float64, torch.int64, torch.int32
# Queries times rows that are scanned at a time, each of which takes 12 bytes of work space.
_PAIRS = 1 << 25


def bound_scan(query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    """The rows that can matter to each query; :mod:`memokern.ops` says what is proven of the
    others."""
    query, rows = prepared(query.detach(), rows), rows.detach()
    check_selectable(query, "bound_scan")
    check_types(query.x, rows)
    if rows.center is None or rows.sq_norms is None:
        raise ValueError("bound_scan needs the center of the rows that the bounds were made about")
    b, device = len(query.x), query.x.device
    bounds = prepared_bounds(bounds, b, rows)
    start = torch.zeros(b + 1, dtype=_I64, device=device)
    if b == 0:
        return Scan(RowLists(start, start.new_empty(0)), query.sigma.new_empty(0), start[:0])
    call = _ScanCall(query, rows, bounds)
    threshold, level = call.new(b, dtype=_F64), call.new(b, dtype=_I64)
    step, lists = min(b, max(1, _PAIRS // rows.n)), []
    space = call.space(step)
    for b0 in range(0, b, step):
        part = slice(b0, min(b0 + step, b))
        own = {"threshold": threshold[part], "level": level[part]}
        begun = call.new(part.stop - b0 + 1, dtype=_I64)
        lists.append(call.scan(part, {**space, **own, "start": begun}))
        start[b0 + 1 : part.stop + 1] = begun[1:] + start[b0]
    return Scan(
        RowLists(start, lists[0] if len(lists) == 1 else torch.cat(lists)), threshold, level
    )


class _ScanCall(DeviceCall):
    """Queries, rows and bounds as the kernels take them."""

    def __init__(self, query: Query, rows: Rows, bounds: LogitBounds) -> None:
        super().__init__(query.x.device)
        self.query, self.rows, self.bounds = query, rows, bounds
        assert rows.center is not None and rows.sq_norms is not None
        self.sq_norms = contiguous64(rows.sq_norms)
        self.bands = bands_of(bounds)
        self.largest = largest(query.bias, rows.center, self.sq_norms)
        self.fixed: dict[str, Any] = {
            "rows": rows.data, "sq_norms": self.sq_norms, "bias": query.bias,
            "coarse": bounds.coarse, "fine": bounds.fine, "largest": self.largest,
            "scale": rows.scale, "shift": rows.shift, "span": math.log(rows.n / bounds.eps),
            "n": rows.n, "d": rows.dim, "stride": stride_of(rows.data), "k0": bounds.dims[0],
            "bands": self.bands, "fine_width": bounds.fine.shape[1],
            "most_listed": bounds.most_listed,
        }  # fmt: skip

    def space(self, b: int) -> dict[str, Tensor]:
        """Memory for so many queries, of which nothing is written yet."""
        n, new = self.rows.n, self.new
        groups = variants.GROUPS * -(-n // variants.TILE_ROWS)
        width = self.bounds.z.shape[1] + self.bands + 1
        return {
            "scaled": new(b, width), "reach": new(b, dtype=_F64), "best": new(b, dtype=_F64),
            "least": new(b), "bound": new(b, n), "guess": new(b, groups),
            "place": new(b, groups, dtype=_I32), "left": new(b, n),
            "chunk": new(b, -(-n // variants.CHUNK_ROWS), dtype=_I32),
            "index": new(b, n, dtype=_I32), "count": new(b, dtype=_I64),
        }  # fmt: skip

    def scan(self, part: slice, own: dict[str, Tensor]) -> Tensor:
        """The lists of some queries [M], one after the other; the one place that waits."""
        some, bounds, n = self.query.take(part), self.bounds, self.rows.n
        b = len(some.x)

        def run(variant: Variant, entry: int, blocks: int, **more: Any) -> None:
            argument = abi.filled(
                abi.ScanParams, **self.fixed, **own, b=b, x=some.x, sigma=some.sigma,
                alpha=some.alpha, temperature=some.temperature, z=bounds.z[part],
                norms=bounds.norms[part], margin=bounds.margin[part], sq=bounds.sq[part], **more,
            )  # fmt: skip
            shared = variants.SHARED.get(variant.program, 0)
            self.launch(variant, variant.entries[entry], (blocks, 1), argument, shared)

        tiles, teams = -(-n // variants.TILE_ROWS), -(-b // variants.TILE_QUERIES)
        settle = variants.settle_variant(self.rows.data.dtype)
        listing, end = variants.list_variant(), variants.end_variant()
        run(variants.begin_variant(), 0, b)
        run(variants.bounds_variant(), 0, tiles * teams)
        run(settle, 0, b)
        for entry in (0, 1):  # counts, then lists
            run(listing, entry, b * -(-n // variants.CHUNK_ROWS))
        refine = variants.refine_variant(bounds.fine.dtype)
        parts = self.parts(b, -(-n // variants.ROWS_OF_STEP))
        for level in range(1, len(bounds.dims)):
            k1, k2 = (k - bounds.dims[0] for k in bounds.dims[level - 1 : level + 1])
            b1, b2 = bounds.first_band[level - 1 : level + 1]
            of_level = {"k1": k1, "k2": k2, "b1": b1, "b2": b2, "first": int(level == 1)}
            run(refine, 0, b * parts, parts=parts, **of_level)
            run(settle, 1, b)
        run(end, 0, 1)
        out = self.new(int(own["start"][-1]), dtype=_I64)
        if len(out):
            parts = self.parts(b, -(-n // variants.GATHERED))
            run(end, 1, b * parts, parts=parts, out=out)
        return out
