"""The launches of the sums over lists of rows, and of their gradient.

Forward there are four: the distances of all listed pairs, each list's weights, sums of rows times
weights, and the join of the parts of long lists. Backward there is one more, for the rows' factors
in the gradient, after the weights were made again. All is in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core.call import DeviceCall, check_types, stride_of
from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.listed import variants
from memokern.calls import BasicSums, Gradients, Query, RowLists, Rows, Sums
from memokern.calls.checks import check_lists, check_selectable, prepared, prepared_lists
from memokern.util.torch_internals import capturing

_F64 = torch.float64


def posterior_listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums over the rows listed, each logit by direct differences."""
    call = _Lists(query, rows, lists)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(4)]
    out = Sums._make([call.new(b, d), *columns, call.new(b, d)])
    if b:
        call.run(False, out._asdict())
    return out


def posterior_listed_backward(
    query: Query, rows: Rows, lists: RowLists, grads: BasicSums
) -> Gradients:
    """The gradients for the query; the weights are computed anew."""
    call = _Lists(query, rows, lists)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(3)]
    grad_bias = query.sigma.new_zeros(0 if query.bias is None else rows.n)
    none = [query.sigma.new_empty(0) for _ in range(2)]  # of a condition, which queries have not
    grad_x = call.new(b, d)
    if b:
        out = dict(zip(("x", "sigma", "alpha", "temperature"), (grad_x, *columns), strict=True))
        given = {name: v.detach().to(_F64).contiguous() for name, v in grads._asdict().items()}
        wanted = {f"grad_{name}": v for name, v in (given | out).items() if name != "residual"}
        pair_bias = call.new(call.m, dtype=_F64)
        call.run(True, {**wanted, "pair_bias": pair_bias})
        if query.bias is not None:  # accumulate sorts the rows, so that the sums have an order
            grad_bias = grad_bias.index_put((call.index,), pair_bias, accumulate=True)
    return Gradients._make([grad_x, *columns, grad_bias, *none])


class _Lists(DeviceCall):
    """A call's checked arguments, and what both directions do with them. m: the rows listed."""

    def __init__(self, query: Query, rows: Rows, lists: RowLists) -> None:
        self.query, self.rows = prepared(query.detach(), rows), rows.detach()
        check_selectable(query, "posterior_listed")
        check_types(self.query.x, self.rows)
        super().__init__(query.x.device)
        self.start, self.index = prepared_lists(lists, len(self.query.x))
        self.m = len(self.index)
        # While a CUDA graph is captured, which cannot wait for an answer, this is left out: the
        # kernels read no other memory even then.
        if not capturing(self.device):
            check_lists(RowLists(self.start, self.index), rows.n)

    def run(self, backward: bool, out: dict[str, Tensor]) -> None:
        """All launches, into arrays by their names in ListedParams."""
        query, rows, m = self.query, self.rows, self.m
        b, d = query.x.shape
        kind, new = rows.data.dtype, self.new
        slabs = -(-d // variants.FEATURES)
        parts = self.parts(b * slabs, m // (variants.ROWS_OF_PART * b) + 1)
        names = ("r2", "weight", *(("gy", "xy", "factor") if backward else ()))
        argument: dict[str, Any] = {
            **out, **{name: new(m, dtype=_F64) for name in names}, "rows": rows.data,
            "bias": query.bias, "x": query.x, "sigma": query.sigma, "alpha": query.alpha,
            "temperature": query.temperature, "start": self.start, "index": self.index,
            "known": new(abi.LISTED_ROWS, b, dtype=_F64), "part": new(parts, b, d, dtype=_F64),
            "scale": rows.scale, "shift": rows.shift, "b": b, "n": rows.n, "d": d,
            "stride": stride_of(rows.data), "m": m, "backward": int(backward),
        }  # fmt: skip

        def run(variant: Variant, entry: int, blocks: int, parts: int) -> None:
            self.launch(
                variant, variant.entries[entry], (blocks, 1),
                abi.filled(abi.ListedParams, **argument, parts=parts),
                variants.SHARED.get(variant.program, 0),
            )  # fmt: skip

        if m:
            blocks = self.parts(1, -(-m // variants.PAIRS))
            run(variants.pairs_variant(kind, backward), 0, blocks, blocks)
        weights = variants.weights_variant()
        for entry in range(1 + backward):
            run(weights, entry, b, parts)
        run(variants.sum_variant(kind), 0, slabs * b * parts, parts)
        run(variants.finish_variant(), 0, slabs * b, parts)
