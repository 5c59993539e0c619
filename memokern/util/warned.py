"""Warnings that name the line of the user's program."""

from __future__ import annotations

import inspect
import warnings

from torch.compiler import is_compiling

# Whose frames are not the user's: PyTorch's decorators lie between ours.
OURS = ("memokern", "torch", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns of the last line outside the library, however many calls of it lie between.

    Example:
        >>> import warnings
        >>> from memokern.util.warned import warn
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("rows are flat")
        >>> str(caught[0].message), caught[0].category.__name__
        ('rows are flat', 'UserWarning')
    """
    if is_compiling():  # frames are not to be had in a graph
        warnings.warn(message, category, stacklevel=2)
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_ours(str(frame.f_globals.get("__name__", ""))):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS
