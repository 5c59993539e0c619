"""Polynomials through values at a few places, and the points that integrals are summed at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Of Gauss and Legendre, on [-1, 1]: integrands here are smooth, and no count of evaluations.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)


def lagrange(places: Sequence[float], at: np.ndarray) -> np.ndarray:
    """The polynomials [len(places), len(at)] that are 1 at one of the places and 0 at the others.

    Example:
        >>> import numpy as np
        >>> from memokern.samplers.interpolation import lagrange
        >>> lagrange([0.0, 1.0], np.array([0.25])).tolist()
        [[0.75], [0.25]]
    """
    out = np.ones((len(places), len(at)))
    for i, one in enumerate(places):
        for j, other in enumerate(places):
            if i != j:
                out[i] *= (at - other) / (one - other)
    return out


def added(start: Tensor, factors: Sequence[float] | Tensor, values: Sequence[Tensor]) -> Tensor:
    """start + sum factor value, in one operation for each value: beside other work on the machine
    every operation on large tensors may wait for a processor. factors: numbers, or what broadcasts
    to a value each."""
    out = start
    for by, value in zip(factors, values, strict=True):
        if isinstance(by, Tensor):
            out = torch.addcmul(out, by, value)
        else:
            out = torch.add(out, value, alpha=float(by))
    return out
