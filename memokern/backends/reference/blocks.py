"""Rows and queries in blocks: no temporary of the reference has more than :data:`ELEMENTS` numbers,
but for one query's number for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memokern.calls import Query, Rows, Sums

F64 = torch.float64
SAMPLE = 64  # rows, about, of which a center is taken
ELEMENTS = 1 << 22  # of a temporary: 32 MiB in float64


def row_blocks(rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """The rows as float64 values, a block at a time: never a float copy of the data set."""
    step = max(1, ELEMENTS // max(1, rows.dim))
    for start in range(0, rows.n, step):
        where = slice(start, min(start + step, rows.n))
        yield where, rows.values(where)


def query_blocks(b: int, n: int) -> Iterator[slice]:
    """The queries, as many at a time as may have a float64 for each row."""
    step = max(1, ELEMENTS // max(1, n))
    for start in range(0, b, step):
        yield slice(start, min(start + step, b))


def nan_for_inf(x: Tensor) -> Tensor:
    """A query that is not finite is lost: NaN, which goes on into its gradients too."""
    return x * torch.where(torch.isinf(x), torch.nan, 1.0)


def nan_where_lost(query: Query, nearest: Tensor) -> Tensor:
    """0 [B], or NaN with such derivatives where the squared distance of the nearest row [B] is not
    known, because a row is NaN: at sigma = 0 no logit would tell."""
    lost = torch.isnan(nearest)
    each = query.x.sum(1) + query.sigma + query.alpha + query.temperature
    return torch.where(lost, torch.nan, 0.0) * torch.where(lost, each, 0.0)


def gaussian_logit(r2: Tensor, sigma: Tensor, limit: Tensor) -> Tensor:
    """-r^2 / (2 sigma^2) of tensors that broadcast; 0 at a limit of small sigma."""
    width = torch.where(limit, 1.0, sigma)
    # Divided twice: sigma^2 underflows long before sigma does.
    return torch.where(limit, 0.0, -0.5 * (r2 / width) / width)


def joined(parts: Sequence[Sums], dtype: torch.dtype) -> Sums:
    """The sums of blocks of queries as one, mean and residual in the type of the queries."""
    mean, *columns, residual = (torch.cat(column) for column in zip(*parts, strict=True))
    return Sums._make([mean.to(dtype), *columns, residual.to(dtype)])


def center_of(rows: Rows) -> Tensor:
    """[D] float64: the owner's center, else the median of a few rows, which no far one moves."""
    if rows.center is not None:
        return rows.center.to(F64)
    with torch.no_grad():
        some = slice(None, None, max(1, rows.n // SAMPLE))
        # Of expanded rows, whose stride is 0, PyTorch's median is whatever the memory held.
        return rows.detach().values(some).contiguous().median(0).values


def empty_squares(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """[B, N] to be filled, with the dimensions that vmap gives any of the three.

    One tensor from the start: small ones that stay, made between large ones that go, would leave
    holes as large as these in the heap.
    """
    return x[:, :1] * alpha[:, None] * y[:, 0]


def direct_squares(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """|x_b - alpha_b y_n|^2 as a sum of squared differences, blocked: [B, D], [N, D] -> [B, N]."""
    out = empty_squares(x, y, alpha)
    step = max(1, ELEMENTS // max(1, x.shape[0] * x.shape[1]))
    for start in range(0, len(y), step):
        diff = x[:, None] - alpha[:, None, None] * y[None, start : start + step]
        out[:, start : start + step] = diff.square_().sum(-1)
    return out


def residuals(
    power: Tensor, x: Tensor, rows: Rows, alpha: Tensor, center: Tensor, acc: Tensor
) -> Tensor:
    """sum_n power_n (alpha y_n - x) [B, D], given acc = sum_n power_n (y_n - center).

    As for the squared distances, the value comes from the differences, which do not cancel, and the
    derivatives from what it is equal to.
    """
    s = power.sum(1, keepdim=True)
    equal = alpha[:, None] * acc - s * (x - alpha[:, None] * center)
    with torch.no_grad():
        direct = torch.zeros_like(acc)
        for where, y in row_blocks(rows):
            step = max(1, ELEMENTS // max(1, len(x) * x.shape[1]))
            for first in range(0, len(y), step):
                part = y[first : first + step]
                w = power[:, where][:, first : first + step]
                diff = alpha[:, None, None] * part[None] - x[:, None]
                direct += torch.where(w[..., None] == 0, 0.0, w[..., None] * diff).sum(1)
    return direct + (equal - equal.detach())


def squared_distances(x: Tensor, rows: Rows, alpha: Tensor, center: Tensor) -> Tensor:
    """|x_b - alpha_b y_n|^2 [B, N] of float64 queries, differentiable to any order."""
    xc = x - alpha[:, None] * center
    squares, products = [], []
    with torch.no_grad():
        direct = empty_squares(x, rows.data, alpha)
    for where, y in row_blocks(rows):
        yc = y - center
        squares.append(yc.square().sum(1))
        products.append(xc @ yc.T)
        with torch.no_grad():
            direct[:, where] = direct_squares(x.detach(), y.detach(), alpha.detach())
    expanded = (
        xc.square().sum(1, keepdim=True)
        + alpha[:, None].square() * torch.cat(squares)
        - 2 * alpha[:, None] * torch.cat(products, 1)
    )
    # The value comes from direct differences, which do not cancel at small sigma; the derivatives,
    # exact polynomials of any order, from the expanded square.
    return direct + (expanded - expanded.detach())
