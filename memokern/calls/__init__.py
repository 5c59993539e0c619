"""What every backend is asked and what it answers, from the public functions down to the kernels.

A new input of the sweep is a field of :class:`Query` or :class:`Rows`; a new output one of
:class:`Sums` or :class:`State`.
"""

from memokern.calls.arguments import (
    WEIGHTINGS,
    Blocks,
    Condition,
    LogitBounds,
    Query,
    RowLists,
    Rows,
    Segments,
)
from memokern.calls.bias import condition_bias, condition_squares, with_own_bias
from memokern.calls.results import BasicSums, Gradients, Kept, Scan, Sums
from memokern.calls.state import (
    State,
    by_key,
    empty_state,
    joint_key,
    merge,
    rescaled,
    to_sums,
    without,
)

__all__ = [
    "WEIGHTINGS",
    "BasicSums",
    "Blocks",
    "Condition",
    "Gradients",
    "Kept",
    "LogitBounds",
    "Query",
    "RowLists",
    "Rows",
    "Scan",
    "Segments",
    "State",
    "Sums",
    "by_key",
    "condition_bias",
    "condition_squares",
    "empty_state",
    "joint_key",
    "merge",
    "rescaled",
    "to_sums",
    "with_own_bias",
    "without",
]
