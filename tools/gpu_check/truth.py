"""The right answer: the formulas in float64, by direct differences, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64
CHUNK = 1 << 27  # numbers of queries times rows times features at a time


class Given(NamedTuple):
    """Queries and rows. x [B, D] float64; rows [N, D] as stored, or float64; the rows' values are
    rows * scale + shift. sigma, alpha, temperature [B] float64; bias [N] float64."""

    x: Tensor
    rows: Tensor
    scale: float
    shift: float
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor
    weighting: str = "gaussian"

    def chunks(self) -> list[slice]:
        """Some rows at a time."""
        step = max(1, CHUNK // max(1, self.x.numel()))
        return [slice(i, i + step) for i in range(0, len(self.rows), step)]

    def values(self, part: slice) -> Tensor:
        """Rows as numbers."""
        return self.rows[part].to(F64) * self.scale + self.shift

    def take(self, query: int, rows: Tensor) -> Given:
        """One query, with some of the rows."""
        x, sigma, alpha, temperature = (
            v[query : query + 1] for v in (self.x, self.sigma, self.alpha, self.temperature)
        )
        return self._replace(
            x=x, rows=self.rows[rows], sigma=sigma, alpha=alpha, temperature=temperature,
            bias=self.bias[rows],
        )  # fmt: skip


def squares(given: Given) -> Tensor:
    """|x - alpha y|^2 [B, N]."""
    parts = []
    for part in given.chunks():
        moved = given.alpha[:, None, None] * given.values(part)
        parts.append((given.x[:, None] - moved).square().sum(2))
    return torch.cat(parts, 1)


def logits(given: Given) -> Tensor:
    """l [B, N]. At sigma = 0, where it is infinite, the bias alone of the nearest rows."""
    r2, dim = squares(given), given.x.shape[1]
    if given.weighting == "log":
        return -dim / 2 * torch.log(r2 / dim) + given.bias
    zero = given.sigma[:, None] == 0
    sigma = torch.where(zero, 1.0, given.sigma[:, None])
    nearest = r2 <= r2.amin(1, keepdim=True) * (1 + 1e-12)
    limit = torch.where(nearest, 0.0, -torch.inf)
    return torch.where(zero, limit, -r2 / (2 * sigma.square())) + given.bias


def sums(given: Given) -> tuple[Tensor, ...]:
    """mean [B, D], log_z, mean_logit, mean_bias, weight_sq [B], residual [B, D]."""
    logit, t = logits(given), given.temperature
    w = torch.softmax(logit / t[:, None], 1)
    mean = torch.zeros_like(given.x)
    for part in given.chunks():
        mean = mean + w[:, part] @ given.values(part)
    has_weight = w > 0
    return (
        mean,
        t * torch.logsumexp(logit / t[:, None], 1),
        torch.where(has_weight, w * logit, 0.0).sum(1),
        torch.where(has_weight, w * given.bias, 0.0).sum(1),
        w.square().sum(1),
        given.alpha[:, None] * mean - given.x,
    )


def listed_sums(given: Given, start: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """The sums of each query over its own list of rows, none of which is empty."""
    lists = index.split(start.diff().tolist())
    found = [sums(given.take(i, rows)) for i, rows in enumerate(lists)]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


class Compared(NamedTuple):
    """The output that is furthest off for what is allowed: its name, its largest error, and what is
    allowed there. ratio: the error over what is allowed; right up to 1."""

    output: str
    error: float
    allowed: float
    ratio: float


def compare(output: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> Compared:
    """NaN and infinities must be where they are in the truth."""
    if got.shape != want.shape:
        raise ValueError(f"{output} has the shape {list(got.shape)}, not {list(want.shape)}")
    got, want = got.to(F64), want.to(F64)
    bound = torch.as_tensor(allowed, dtype=F64, device=want.device).expand(want.shape)
    same = (got == want) | (got.isnan() & want.isnan())
    off = torch.where(same, 0.0, (got - want).abs())
    off = torch.where(off.isfinite(), off, torch.inf)
    if off.numel() == 0:
        return Compared(output, 0.0, 0.0, 0.0)
    ratio = torch.where(off == 0, 0.0, off / bound).flatten()
    at = int(ratio.argmax())
    return Compared(output, float(off.flatten()[at]), float(bound.flatten()[at]), float(ratio[at]))


def worst(found: list[Compared]) -> Compared:
    """The one that is furthest off."""
    return max(found, key=lambda c: c.ratio if math.isfinite(c.ratio) else math.inf)


def rows_gradient(given: Given, grad: Tensor, count: int) -> Tensor:
    """The gradient of sum <grad, mean> for the first rows, as numbers, at temperature 1."""
    w = torch.softmax(logits(given), 1)
    mean = sums(given)[0]
    y = given.values(slice(0, count))
    alpha, sigma = given.alpha[:, None], given.sigma[:, None]
    found = []
    for n, row in enumerate(y):
        along = (grad * (row - mean)).sum(1, keepdim=True)
        moved = along * alpha * (given.x - alpha * row) / sigma.square()
        found.append((w[:, n : n + 1] * (grad + moved)).sum(0))
    return torch.stack(found)
