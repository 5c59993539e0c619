"""The compiled kernels of the operations on lists of rows: checks, and hands them over.

The signatures are those of :mod:`memokern.ops_support`. The kernels: ``csrc/README.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.ladder import bands_of, check_limits
from memokern.backends.native import module, pointer, queries_of, rows_of, shaped

_F64 = torch.float64


def bound_scan(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor, sq_norms: Tensor, scale: float, shift: float,
    coarse: Tensor, fine: Tensor, z: Tensor, norms: Tensor, margin: Tensor, sq: Tensor,
    dims: list[int], first_band: list[int], eps: float, cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows that can matter to each query; see :mod:`memokern.ops` for what is proven."""
    q, (s, a, t), b = queries_of(x, rows, sigma, alpha, temperature, bias)
    args, keep = rows_of(rows, center, sq_norms, scale, shift)
    dims, first_band = list(dims), list(first_band)
    bands = bands_of(coarse, dims, first_band)
    check_limits(len(rows), eps, cap)
    ladder = torch.tensor(dims, dtype=torch.int64)
    firsts = torch.tensor(first_band, dtype=torch.int64)
    (n, _), m = rows.shape, x.shape[0]
    held = (
        shaped("coarse", coarse, (n, dims[0] + bands + 1), torch.float32),
        shaped("fine", fine, (n, dims[-1] - dims[0]), torch.float16, torch.float32),
        shaped("z", z, (m, dims[-1]), torch.float32),
        shaped("norms", norms, (m, bands + 1), torch.float32),
        shaped("margin", margin, (m,), _F64),
        shaped("sq", sq, (m,), _F64),
    )
    start = torch.empty(m + 1, dtype=torch.int64)
    threshold, level = torch.empty(m, dtype=_F64), torch.empty(m, dtype=torch.int64)
    found = module().bound_scan(
        args, q.dtype == _F64, q.data_ptr(), m, s.data_ptr(), a.data_ptr(), t.data_ptr(),
        pointer(b), held[0].data_ptr(), held[1].data_ptr(), fine.dtype == torch.float16,
        *(v.data_ptr() for v in held[2:]), ladder.data_ptr(), firsts.data_ptr(), len(dims), bands,
        eps, min(cap, n), torch.get_num_threads(),
        start.data_ptr(), threshold.data_ptr(), level.data_ptr(),
    )  # fmt: skip
    index = torch.empty(found.count, dtype=torch.int64)
    found.copy(index.data_ptr())
    del keep
    return start, index, threshold, level


class CosineProjection:
    """Float32 queries to the coordinates of an index whose basis is a cosine transform:
    `memokern.projection.Projected`, computed in one pass over the queries.

    Args: tensors as `csrc/kernels.h` names them; sizes of the axes (C, H, W).
    """

    SIDE = 16  # to whose multiples the kernel pads a box

    def __init__(
        self, axes: tuple[int, int, int], channels_last: bool, turn: Tensor, down: Tensor,
        across: Tensor, box: Tensor, boxes: int, place: Tensor, kept: int, edges: Tensor,
        center: Tensor, worth: Tensor, largest: float,
    ) -> None:  # fmt: skip
        self._held = (turn, down, across, box, place, edges, center, worth)
        self._kept, self._bands = kept, len(edges) - 1
        self._basis = module().Cosine(
            *axes, channels_last, turn.data_ptr(), down.data_ptr(), across.data_ptr(),
            box.data_ptr(), boxes, place.data_ptr(), len(place), kept, edges.data_ptr(),
            self._bands, center.data_ptr(), worth.data_ptr(), largest,
        )  # fmt: skip

    def __call__(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, norms, margin, sq of x [B, D] float32 with alpha [B] float64."""
        x, alpha, b = x.contiguous(), alpha.to(_F64).contiguous(), len(x)
        z, norms = x.new_empty(b, self._kept), x.new_empty(b, self._bands + 1)
        margin, sq = alpha.new_empty(b), alpha.new_empty(b)
        module().project(
            self._basis, x.data_ptr(), alpha.data_ptr(), b, torch.get_num_threads(),
            z.data_ptr(), norms.data_ptr(), margin.data_ptr(), sq.data_ptr(),
        )  # fmt: skip
        return z, norms, margin, sq


def posterior_on_support(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums of ``posterior`` over the rows listed, each logit by direct differences."""
    q, (s, a, t), b = queries_of(x, rows, sigma, alpha, temperature, bias)
    args, _ = rows_of(rows, None, None, scale, shift)
    start = shaped("start", start, (x.shape[0] + 1,), torch.int64)
    index = shaped("index", index, (index.numel(),), torch.int64)
    mean = torch.empty_like(q)
    stats = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(4))
    module().support(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), pointer(b), start.data_ptr(), index.data_ptr(),
        len(index), torch.get_num_threads(), mean.data_ptr(), *(v.data_ptr() for v in stats),
    )  # fmt: skip
    return mean.to(x.dtype), stats[0], stats[1], stats[2], stats[3]


def posterior_on_support_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, mean: Tensor, log_z: Tensor,
    mean_logit: Tensor, mean_bias: Tensor, weight_sq: Tensor, grad_mean: Tensor,
    grad_log_z: Tensor, grad_mean_logit: Tensor, grad_mean_bias: Tensor, grad_weight_sq: Tensor,
    scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for x, sigma, alpha, temperature and bias.

    The weights are taken anew in float64: the forward results are not needed, and what their type
    rounded away does not enter.
    """
    q, (s, a, t), b = queries_of(x, rows, sigma, alpha, temperature, bias)
    args, _ = rows_of(rows, None, None, scale, shift)
    start = shaped("start", start, (x.shape[0] + 1,), torch.int64)
    index = shaped("index", index, (index.numel(),), torch.int64)
    grad_mean = grad_mean.to(_F64).contiguous()
    grad_stats = torch.stack(
        [v.to(_F64) for v in (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)]
    )
    grad_x = torch.empty_like(q)
    grads = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(3))
    grad_bias = torch.empty(0 if b is None else b.shape[0], dtype=_F64)
    module().support_backward(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), pointer(b), start.data_ptr(), index.data_ptr(),
        len(index), torch.get_num_threads(), grad_mean.data_ptr(), grad_stats.data_ptr(),
        grad_x.data_ptr(), *(v.data_ptr() for v in grads), 0 if b is None else grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grads[0], grads[1], grads[2], grad_bias
