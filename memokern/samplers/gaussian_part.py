r"""Steps in a Gaussian's coordinates, in which the flow of its own law is solved exactly.

With v = (x - alpha m) / sqrt(alpha^2 lambda + sigma^2) in the eigenbasis of its covariance, the
denoiser D = D_g + r, and p = alpha / sigma, the flow is dv / dp = r / sqrt(1 + lambda p^2). Through
the values of r that are known goes a polynomial in p^2, whose integral against that kernel is exact
up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from memokern.samplers.base import Level
from memokern.samplers.gaussian import Gaussian
from memokern.samplers.interpolation import NODES, WEIGHTS, added, lagrange


class GaussianPart:
    """Samples x [A, *shape] in the coordinates of a Gaussian: z [A, K] float64 of x - alpha m.

    The change of coordinates is made in the samples' type, but for the first. What it rounds is not
    added up, since z is kept.
    """

    def __init__(self, gaussian: Gaussian, x: Tensor, level: Level) -> None:
        self.gaussian = gaussian
        self.shape, self.dtype = x.shape[1:], x.dtype
        far = x.flatten(1).to(torch.float64) - level.alpha * gaussian.mean
        self.z = gaussian.transform.coordinates(far)

    @property
    def kind(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def take(self, at: Tensor) -> None:
        """Goes on with some of the samples."""
        self.gaussian, self.z = self.gaussian.take(at), self.z[at]

    def values(self, z: Tensor, level: Level) -> Tensor:
        """x of some z at a level."""
        g = self.gaussian
        x = level.alpha * g.mean + g.transform.values(z.to(self.kind))
        return x.to(self.dtype).reshape(-1, *self.shape)

    def rest(self, z: Tensor, x0: Tensor, level: Level) -> tuple[Tensor, float]:
        """r = D - D_g [A, K] where D = x0 at z, and the mean |r| over the mean |D - m|."""
        g = self.gaussian
        far = x0.flatten(1).to(self.kind) - g.mean.to(self.kind)
        d = g.transform.coordinates(far).to(torch.float64)
        scaled = g.variances * (level.alpha / level.sigma) ** 2
        r = torch.addcmul(d, scaled / (1 + scaled) / level.alpha, z, value=-1)
        with torch.no_grad():  # the coordinates are orthonormal
            sizes = [float(torch.linalg.vector_norm(v, dim=1).mean()) for v in (r, d)]
        return r, sizes[0] / sizes[1] if sizes[1] > 0 else 0.0

    def steps(
        self, now: Level, to: Level, places: list[float], order: int
    ) -> list[Callable[[list[Tensor]], Tensor]]:
        """The step from what r is at these p, and the one that knows it at the next level too: each
        takes the values of r and gives z there. Where there are fewer than `order`, r = 0 at p = 0
        is one more."""
        g = self.gaussian
        ends = now.alpha / now.sigma, to.alpha / to.sigma
        free = [] if len(places) == order else [0.0]
        all_known = ([*free, *places], [*free, *places, ends[1]])
        p, weight = _points(g.top, *ends)
        through = [lagrange([q**2 for q in known], p**2)[len(free) :] for known in all_known]
        squares = torch.from_numpy(p**2).to(self.z.device)
        kernel = (1 + g.table[..., None] * squares).rsqrt()  # [..., K, points]
        weights = torch.from_numpy(np.concatenate(through) * weight).to(self.z.device)
        integrals = (kernel @ weights.T).movedim(-1, 0).contiguous()  # [values of r, ..., K]
        if g.of is not None:
            integrals = integrals[:, g.of]
        scale, scale_there = (
            (level.alpha**2 * g.variances + level.sigma**2).sqrt() for level in (now, to)
        )
        v = self.z / scale

        def stepped(by: Tensor, rests: list[Tensor]) -> Tensor:
            return scale_there * added(v, by, rests)

        return [partial(stepped, by) for by in integrals.split([len(places), len(places) + 1])]


def _points(top: float, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Where functions of p are evaluated to be integrated, and by what they are weighed. top: the
    square root of the largest lambda, with which the kernel bends."""
    if top == 0:
        return (start + end) / 2 + (end - start) / 2 * NODES, WEIGHTS * (end - start) / 2
    first, last = math.asinh(top * start), math.asinh(top * end)
    at = (first + last) / 2 + (last - first) / 2 * NODES
    return np.sinh(at) / top, WEIGHTS * (last - first) / 2 * np.cosh(at) / top
