r"""Where a flow towards the data is decided: one row has so much of the weight that it keeps it.

Let u = x / alpha, s = sigma / alpha, theta = -log s, and let row n have the largest weight. With
Delta = y_n - y_m, g_m = |u - y_m|^2 - |u - y_n|^2, V the variance of the noise in the weights, and
G_m = g_m / (2 V) = l_n - l_m (less the bias), the flow du / d theta = gamma (mean - u), in which
gamma in (0, 1] is a gate, gives, since <mean - u, Delta> = <y_n - u, Delta> + <mean - y_n, Delta>,

    dG_m / d theta = (gamma (|Delta|^2 - g_m + 2 <mean - y_n, Delta>) + kappa g_m) / (2 V)

with kappa = -d log V / d theta. Where kappa >= gamma and g_m >= 0, that is at least
gamma |Delta| (|Delta| - 2 |mean - y_n|) / (2 V). Now |mean - y_n| <= R = sum_m exp(-G_m) |Delta_m|
(with the biases). If 2 R <= |Delta_m| for every other row, no G_m falls, hence R does not grow, and
the condition holds for ever: the row keeps its weight, and the exact flow ends at it, or, with a
gate, on the line from u to it.

What is known of a sweep is enough to prove this, without a search. Let eta bound the weight of all
other rows, eta = 1 - sum w^2 + rounding, and d the diameter of the rows. Then R <= d eta / (1 -
eta); every G_m, bias included, is at least L = log((1 - eta) / eta); and since
g_m <= |Delta|^2 + 2 |u - y_n| |Delta|, no other row is nearer to y_n than

    sqrt(rho^2 + 2 V L') - rho,   rho >= |u - y_n|,   L' = L - the largest difference of biases.

The variance V is s^2 with plain weights (kappa = 2), s^2 + h^2 for a bank smoothed by h (kappa =
2 gamma), and s^2 T with the temperature T = max(sigma_c / sigma, 1) (kappa >= 1), so that
kappa >= gamma in each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memokern.denoiser import Denoiser
from memokern.given import Given
from memokern.processes import Process
from memokern.regularizers import Prediction, Regularizer
from memokern.samplers.base import Denoises, Level
from memokern.strategies.pruned import EPS

# What 1 - sum w^2 may be off by: the rounding of the sums.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}
# A gated flow's integral is cut off where s is this share of where it starts.
LOWEST = 1e-12
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)


class ClosedEnd:
    """The proof, and the end of the flow, for one run.

    Args:
        denoiser: as of the run. bias: [N] or None.
    """

    def __init__(self, denoiser: Denoises, bias: Tensor | None) -> None:
        plain: Any = denoiser
        if isinstance(plain, Given) and plain.condition is None and plain.guidance in (None, 1):
            plain = plain.denoiser
        self.possible = isinstance(plain, Denoiser)
        if not self.possible:
            return
        data, self.regularizer = plain.data, plain.regularizer
        self.process: Process = plain.process
        self.diameter = 2 * float(data.sq_norms.max().sqrt()) * (1 + 1e-6)
        added = [
            b.detach().to("cpu", torch.float64) for b in (bias, data.log_weights) if b is not None
        ]
        total = sum(added) if added else torch.zeros(1, dtype=torch.float64, device="cpu")
        assert isinstance(total, Tensor)
        finite = total[torch.isfinite(total)]
        self.spread = float(finite.max() - finite.min()) if len(finite) else math.inf
        if self.spread > 0 and self.regularizer is not None:
            # What changes the noise in the weights may change how much a bias counts.
            parts = getattr(self.regularizer, "parts", (self.regularizer,))
            if any(type(part).prepare is not Regularizer.prepare for part in parts):
                self.possible = False
                return
        level = torch.tensor(self.process.t_noise, dtype=torch.float64, device="cpu")
        gate = self._gate(self.process.sigma(level), self.process.alpha(level))
        self.possible = gate is not None
        # Whether the flow ends at the row itself.
        self.plain = gate is not None and bool(gate == 1)

    def _gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        """gamma at these levels; None where the proof does not hold."""
        if self.regularizer is None:
            return torch.ones_like(sigma)
        return self.regularizer.level_gate(sigma, alpha)

    def proven(self, found: Any) -> Tensor:
        """[S] bool: for which samples an evaluation proves that one row keeps the weight.

        found: what the denoiser gave.
        """
        if not (self.possible and isinstance(found, Prediction)):
            return torch.zeros(len(found.x0), dtype=torch.bool, device=found.x0.device)
        p = found.posterior
        with torch.no_grad():
            other = self.other(found)
            radius = self.diameter * other / (1 - other)
            lead = torch.log((1 - other) / other) - self.spread
            noise = (p.sigma / p.alpha).square() * p.temperature
            flat = p.residual.flatten(1)
            rho = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) / p.alpha + radius
            gap = 2 * noise * lead
            apart = gap / ((rho.square() + gap.clamp(min=0.0)).sqrt() + rho)
            return (other < 0.5) & (lead > 0) & (2 * radius <= apart)

    def other(self, found: Prediction) -> Tensor:
        """eta [S]: at most so much of the weight is that of other rows than the first."""
        kind = torch.float64 if found.x.dtype == torch.float64 else torch.float32
        return (1 - found.posterior.weight_sq).clamp(min=0.0) + ROUNDING[kind] + EPS[kind]

    def exact(self, found: Prediction) -> Tensor:
        """[S] bool: where the mean is the row itself, up to rounding."""
        kind = torch.float64 if found.x.dtype == torch.float64 else torch.float32
        return self.other(found) <= 2 * (ROUNDING[kind] + EPS[kind])

    def left(self, now: Level, to: Level) -> float:
        """The factor that u - y_n has at another level: exp(-the integral of gamma ds / s)."""
        s, end = (level.sigma / level.alpha for level in (now, to))
        if self.regularizer is None:
            return end / s
        low = math.log(max(end, LOWEST * s))
        half = (math.log(s) - low) / 2
        ratio = torch.exp(torch.from_numpy(low + half * (1 + _NODES)))
        time = self.process.time_of_ratio(ratio)
        gate = self._gate(self.process.sigma(time), self.process.alpha(time))
        assert gate is not None
        if bool((gate == 1).all()):
            return end / s
        return math.exp(-half * float(gate @ torch.from_numpy(_WEIGHTS)))
