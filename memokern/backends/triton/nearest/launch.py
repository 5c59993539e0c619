"""The launcher of ``nearest``. Nothing waits for the device: no list has a length that only the
device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.backends.triton.core import machine
from memokern.backends.triton.core.centering import Centred, centred, check_types, scale_shift
from memokern.backends.triton.core.rows import stride_of
from memokern.backends.triton.nearest import kernels
from memokern.calls import Rows
from memokern.calls.checks import check_neighbours, prepared_x

_F32, _F64 = torch.float32, torch.float64
_WORKSPACE = 64 << 20  # bytes of the least keys of all groups; more queries go in turns
_MOST_PARTS = 32  # of a query's groups: the slots of all parts are sorted
_U = 1.01 * 2.0**-24  # a little above the unit rounding, which pays for second-order terms


def nearest(x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    x, rows = prepared_x(x.detach(), rows), rows.detach()
    check_neighbours(k, rows)
    check_types(x, rows)
    b, about = len(x), centred(rows)
    dist = torch.empty(b, k, dtype=_F64, device=x.device)
    index = torch.empty(b, k, dtype=torch.int64, device=x.device)
    step = max(1, _WORKSPACE // (4 * -(-rows.n // kernels.GROUP)))
    for at in (slice(i, min(i + step, b)) for i in range(0, b, step)):
        dist[at], index[at] = _block(x[at], rows, k, about)
    return dist, index


def _block(x: Tensor, rows: Rows, k: int, about: Centred) -> tuple[Tensor, Tensor]:
    """The nearest rows of a block of queries."""
    (b, d), n, device = x.shape, rows.n, x.device
    groups, stride = -(-n // kernels.GROUP), stride_of(rows.data)
    xc = x.to(_F64) - about.center
    xx = xc.square().sum(1)
    lost = ~torch.isfinite(x).all(1)
    # About the center of rows of which one is NaN nothing may be known, and nothing is ruled out.
    known = torch.isfinite(xx)
    xc, xx = torch.where(known[:, None], xc, 0.0), torch.where(known, xx, torch.inf)
    least = torch.empty(b, groups, dtype=_F32, device=device)
    first = kernels.groups_variant(rows.data.dtype, b <= 16)
    first.launch(
        (-(-b // first.constexprs["BLOCK_B"]) * groups,), device, xc=xc.to(_F32), rows=rows.data,
        offset=about.offset, half_sq=about.half_sq, least=least, B=b, N=n, D=d, stride_n=stride,
        scale=rows.scale,
    )  # fmt: skip
    most = torch.full((b,), torch.inf, dtype=_F32, device=device)
    if groups >= k:
        e = key_error(xx.sqrt(), about, d, rows.scale, kernels.PRECISION)
        kth = least.topk(k, dim=1, largest=False).values[:, -1].to(_F64)
        bound = torch.where(torch.isfinite(e), kth + 2 * e, torch.inf)
        most = torch.nextafter(bound.to(_F32), most)
    second = kernels.exact_variant(rows.data.dtype, k)
    parts = max(1, min(groups, _MOST_PARTS, 2 * machine.of(device).multiprocessors // b))
    slots = second.constexprs["SLOTS"]
    dist = torch.empty(b, parts, slots, dtype=_F64, device=device)
    index = torch.empty(b, parts, slots, dtype=torch.int64, device=device)
    second.launch(
        (b * parts,), device, x=x, rows=rows.data, scale_shift=scale_shift(rows), least=least,
        most=most, dist=dist, index=index, N=n, D=d, stride_n=stride, parts=parts, k=k,
    )  # fmt: skip
    # By distance, and by index among equals.
    index, order = index.flatten(1).sort(dim=1, stable=True)
    dist, order = dist.flatten(1).gather(1, order).sort(dim=1, stable=True)
    dist, index = dist[:, :k], index.gather(1, order)[:, :k]
    index = _with_rows_at_no_distance(dist, index)
    return (
        torch.where(lost[:, None], torch.nan, dist),
        torch.where(lost[:, None], torch.arange(k, device=device), index),
    )


def _with_rows_at_no_distance(dist: Tensor, index: Tensor) -> Tensor:
    """The indices, of which those at distance inf are free slots as yet, since no slot takes a row
    that is not finite. Those rows come last, in their order: all others were found, so they are
    what is left of the rows 0, 1, ..., of which k are always enough."""
    k = index.shape[1]
    found = torch.where(dist < torch.inf, index, k).clamp(0, k)
    taken = torch.zeros(len(index), k + 1, dtype=torch.bool, device=index.device)
    taken = taken.scatter_(1, found, True)[:, :k]
    left = taken.sort(dim=1, stable=True).indices  # False first
    place = torch.arange(k, device=index.device) - (dist < torch.inf).sum(1, keepdim=True)
    return torch.where(dist < torch.inf, index, left.gather(1, place.clamp(min=0)))


def key_error(size: Tensor, about: Centred, d: int, scale: float, precision: str) -> Tensor:
    """What rounding can do to a key of `nearest_groups_kernel`, for |xc| = size [B] and any data.

    Let u = 2^-24 and Y = max |yc|. The product of xc and raw + offset, each rounded, has D sums in
    any order: with ieee it errs by (D + 8) u. tf32x3 drops the product of the low parts and what
    they lose, 3 2^-20, and sums 3 D products in tensor cores, which are taken to truncate with up
    to four times u each: (12 D + 64) u. A row is raw + offset, with offset rounded, and errs by
    4 u (Y + |offset|). The norm and the last three operations err by 4 u. In float64 are xc,
    |xc|^2, |yc|^2 and the direct difference, whose rounding comes last.
    """
    u, y = _U, about.largest_norm
    sums = d + 8 if precision == "ieee" else 12 * d + 64 + 3 * 16
    product, row = size * y, y + about.offset_norm
    wide = (d + 32) * 4.5e-16 * (size + row).square()
    e = u * (sums * size * (y + 4 * u * row) + 4 * size * row + 5 * product + 4 * y.square()) + wide
    # Where float32 might overflow nothing is ruled out.
    unit = max(1.0, abs(scale), 1 / abs(scale))
    return torch.where((size + 1) * (row + 1) * unit < 1e36, 1.01 * e, torch.inf)
