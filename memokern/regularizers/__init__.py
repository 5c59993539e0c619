r"""Regularised scores: small classes that change the logits before the sweep, or gate its result.

A gate takes the residual R = alpha mean - x to R'. Then score = R' / sigma^2 and
x0 = mean + (R' - R) / alpha, which are the unregularised ones where R' = R. Composed regularisers
first change the logits, in their order, and then gate, in the same order.
"""

from __future__ import annotations

from memokern.regularizers.base import Compose, Data, Level, Query, Regularizer
from memokern.regularizers.covariance import CovarianceTikhonov
from memokern.regularizers.density import EmpiricalBayes
from memokern.regularizers.prediction import Prediction, evaluate
from memokern.regularizers.smoothing import GaussianSmoothing, SmoothedBank
from memokern.regularizers.text import describe, parse
from memokern.regularizers.tikhonov import Tikhonov
from memokern.regularizers.weights import NoiseUnconditioned, Temperature

__all__ = [
    "Compose",
    "CovarianceTikhonov",
    "Data",
    "EmpiricalBayes",
    "GaussianSmoothing",
    "Level",
    "NoiseUnconditioned",
    "Prediction",
    "Query",
    "Regularizer",
    "SmoothedBank",
    "Temperature",
    "Tikhonov",
    "describe",
    "evaluate",
    "parse",
]
