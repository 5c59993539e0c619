"""How many samples are copies of training rows.

Every criterion is a function of the exact distances to the nearest rows, so that all of them work
on pixels and on embeddings alike (:func:`embedded`).
"""

from __future__ import annotations

from memokern.memorization.criteria import (
    carlini,
    collapse,
    exact_match,
    merged_ratio,
    neighbourhood,
    ratio,
)
from memokern.memorization.distances import embedded
from memokern.memorization.reporting import report
from memokern.memorization.result import Memorization

__all__ = [
    "Memorization",
    "carlini",
    "collapse",
    "embedded",
    "exact_match",
    "merged_ratio",
    "neighbourhood",
    "ratio",
    "report",
]
