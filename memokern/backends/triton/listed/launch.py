"""The launchers of the sums over lists of rows, and of their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.triton.core import machine
from memokern.backends.triton.core.centering import check_types, scale_shift
from memokern.backends.triton.core.pairs import MOST_PAIRS, Pairs
from memokern.backends.triton.core.query_table import HARD, LOST, SOFT
from memokern.backends.triton.core.rows import stride_of
from memokern.backends.triton.listed import kernels
from memokern.calls import BasicSums, Gradients, Query, RowLists, Rows, Sums
from memokern.calls.checks import check_lists, check_selectable, prepared, prepared_lists
from memokern.util.torch_internals import capturing

_F64 = torch.float64
# sigma counts as 0 where r^2 / (sigma^2 T) could come near 1.8e308, where float64 overflows.
_MOST_LOGIT = 1e280


def posterior_listed(query: Query, rows: Rows, lists: RowLists) -> Sums:
    """The sums over the rows listed, each logit by direct differences."""
    if len(query.x) == 0:
        empty = [query.sigma.new_empty(0) for _ in range(4)]
        none = query.x.new_empty(query.x.shape)
        return Sums._make([none, *empty, none.clone()])
    each = _Lists(query, rows, lists)
    w, stats = each.weights(each.pairs(None)[0])
    # log_z is -inf of a list without weight, and at sigma = 0 where no row is hit; only there is
    # mean_logit a number.
    nothing = each.lost | torch.isnan(stats[1])
    mean = torch.where(nothing[:, None], torch.nan, each.sum(w))
    residual = each.query.alpha[:, None] * mean - each.query.x.to(_F64)
    columns = [torch.where(each.lost, torch.nan, v) for v in stats[:4].unbind(0)]
    dtype = query.x.dtype
    return Sums._make([mean.to(dtype), *columns, residual.to(dtype)])


def posterior_listed_backward(
    query: Query, rows: Rows, lists: RowLists, grads: BasicSums
) -> Gradients:
    """The gradients for the query; the weights are computed anew."""
    grad_bias = query.sigma.new_zeros(0 if query.bias is None else rows.n)
    none = [query.sigma.new_empty(0) for _ in range(2)]  # of a condition, which queries have not
    if len(query.x) == 0:
        empty = [query.sigma.new_empty(0) for _ in range(3)]
        return Gradients._make([query.x.new_empty(query.x.shape), *empty, grad_bias, *none])
    each = _Lists(query, rows, lists)
    grads = BasicSums(*(v.detach().to(_F64) for v in grads[:5]))
    products = each.pairs(grads.mean.contiguous())
    w, stats = each.weights(products[0])
    q, grad_b, out = each.coefficients(w, products, stats, torch.stack(grads[1:]))
    pull = each.query.alpha[:, None] * each.sum(q) - each.query.x.to(_F64) * out[3][:, None]
    hard = each.mode == HARD.value
    width = torch.where(hard, 1.0, each.query.sigma)[:, None]
    grad_x = torch.where(hard[:, None], 0.0, pull / width / width)
    if query.bias is not None:  # accumulate sorts the rows, so that the sums have an order
        grad_b = torch.where(each.lost[each.pair_query], torch.nan, grad_b)
        grad_bias = grad_bias.index_put((each.index,), grad_b, accumulate=True)
    grad_x = torch.where(each.lost[:, None], torch.nan, grad_x).to(query.x.dtype)
    columns = [torch.where(each.lost, torch.nan, v) for v in out[:3].unbind(0)]
    return Gradients._make([grad_x, *columns, grad_bias, *none])


class _Lists:
    """A call's checked arguments, and what both directions do with them.

    pair_query [M]: the query of each listed row. mode [B] int32. lost [B]: queries that are not
    numbers of their range.
    """

    def __init__(self, query: Query, rows: Rows, lists: RowLists) -> None:
        self.query, self.rows = prepared(query.detach(), rows), rows.detach()
        check_selectable(query, "posterior_listed")
        check_types(self.query.x, self.rows)
        self.b, self.d = self.query.x.shape
        self.device = self.query.x.device
        self.start, self.index = prepared_lists(lists, self.b)
        self._check()
        self.scale_shift = scale_shift(self.rows)
        xx = self.query.x.to(_F64).square().sum(1)
        sigma, inverse = self.query.sigma, 1 / self.query.temperature
        soft = inverse / sigma / sigma * (xx + 1) < _MOST_LOGIT
        self.lost = ~((xx < torch.inf) & (sigma >= 0) & (inverse > 0) & (inverse < torch.inf))
        mode = torch.where(soft, SOFT.value, HARD.value)
        self.mode = torch.where(self.lost, LOST.value, mode).to(torch.int32)
        each = torch.arange(len(self.index), device=self.device)
        pair_query = torch.searchsorted(self.start[1:], each, right=True)
        self.pair_query = pair_query.clamp_(max=self.b - 1)

    def _check(self) -> None:
        """ValueError unless the lists are lists. While a CUDA graph is captured, which cannot wait
        for an answer, it is left out: the kernels read no other memory even then."""
        m, n = len(self.index), self.rows.n
        if m > MOST_PAIRS:
            raise ValueError(f"a call can list at most {MOST_PAIRS:,} rows in all, not {m:,}")
        if capturing(self.device):
            return
        check_lists(RowLists(self.start, self.index), n)

    def pairs(self, grad_mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """r^2, <g, y>, <x - alpha y, y> [M] of the listed pairs; the last two with grad_mean
        only."""
        pairs = Pairs(self.query, self.rows, self.scale_shift)
        return pairs.evaluate(self.pair_query, self.index, grad_mean)

    def _per_query(self) -> dict[str, Tensor | int]:
        bias = self.query.bias
        return {
            "index": self.index, "bias": self.scale_shift if bias is None else bias,
            "start": self.start, "mode": self.mode, "sigma": self.query.sigma,
            "temperature": self.query.temperature, "B": self.b,
        }  # fmt: skip

    def weights(self, r2: Tensor) -> tuple[Tensor, Tensor]:
        """w [M], and the six numbers of each query [6, B] that `listed_weights_kernel` names."""
        w = torch.empty_like(r2)
        stats = torch.empty(6, self.b, dtype=_F64, device=self.device)
        variant = kernels.weights_variant(self.query.bias is not None)
        variant.launch((self.b,), self.device, r2=r2, w=w, stats=stats, **self._per_query())
        return w, stats

    def coefficients(
        self, w: Tensor, products: tuple[Tensor, Tensor, Tensor], stats: Tensor, grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q and the pairs' parts of the bias's gradient [M], and the four numbers of each query
        [4, B] that `listed_coefficients_kernel` names."""
        r2, gy, xy = products
        q, grad_b = torch.empty_like(r2), torch.empty_like(r2)
        out = torch.empty(4, self.b, dtype=_F64, device=self.device)
        kernels.coefficients_variant(self.query.bias is not None).launch(
            (self.b,), self.device, w=w, r2=r2, gy=gy, xy=xy, stats=stats, grads=grads, q=q,
            grad_b=grad_b, out=out, **self._per_query(),
        )  # fmt: skip
        return q, grad_b, out

    def sum(self, w: Tensor) -> Tensor:
        """sum of w y over each list [B, D]; the parts of a long list are added up in order."""
        data = self.rows.data
        variant = kernels.sum_variant(data.dtype)
        blocks = self.b * -(-self.d // variant.constexprs["BLOCK_D"])
        # There are programs enough for every multiprocessor, of at least four steps each.
        steps = len(w) // (4 * variant.constexprs["BLOCK_M"] * self.b) + 1
        wanted = 4 * machine.of(self.device).multiprocessors
        parts = max(1, min(wanted // blocks, steps))
        out = torch.empty(parts, self.b, self.d, dtype=_F64, device=self.device)
        variant.launch(
            (blocks * parts,), self.device, w=w, index=self.index, rows=data,
            scale_shift=self.scale_shift, start=self.start, out=out, B=self.b, D=self.d,
            stride_n=stride_of(data), parts=parts,
        )  # fmt: skip
        return out.sum(0)
