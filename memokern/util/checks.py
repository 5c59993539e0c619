"""Checks of plain arguments: the value comes back, or an error says what was expected and what
came.

>>> from memokern.util import checks
>>> checks.integer("steps", 18, low=1), checks.number("churn", 0, low=0.0)
(18, 0.0)
"""

from __future__ import annotations

import math
from numbers import Integral, Real


def integer(
    name: str, value: object, low: int | None = None, high: int | None = None, hint: str = ""
) -> int:
    """The value as an int >= low, or in low..high. numpy's integers are accepted, bool is not.

    Raises: TypeError for another type, ValueError out of range; `hint`, what to do, ends the
    message.

    Example:
        >>> from memokern.util import checks
        >>> checks.integer("steps", 0, low=1)
        Traceback (most recent call last):
        ValueError: expected steps >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"expected {name} as an int, got {type(value).__name__}{hint}")
    found = int(value)
    if low is not None and not low <= found <= (found if high is None else high):
        span = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"expected {name} {span}, got {found}{hint}")
    return found


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    *,
    strict: bool = False,
    infinite: bool = False,
    hint: str = "",
) -> float:
    """The value as a float >= low (> low if strict), finite unless `infinite`, and never NaN.

    Raises: TypeError for another type, ValueError out of range; `hint`, what to do, ends the
    message.

    Example:
        >>> from memokern.util import checks
        >>> checks.number("rtol", float("nan"), low=0.0, strict=True)
        Traceback (most recent call last):
        ValueError: expected rtol finite and > 0, got nan
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} as a number, got {type(value).__name__}{hint}")
    found = float(value)
    in_range = found > low if strict else found >= low  # NaN is never in range
    if not in_range or (math.isinf(found) and not infinite):
        allowed = limits(low, strict=strict, infinite=infinite)
        raise ValueError(f"expected {name} {allowed}, got {value}{hint}")
    return found


def limits(low: float, *, strict: bool = False, infinite: bool = False) -> str:
    """The range that :func:`number` allows, in words.

    Example:
        >>> from memokern.util import checks
        >>> checks.limits(0.0, strict=True)
        'finite and > 0'
    """
    words = [] if infinite else ["finite"]
    words += [f"{'>' if strict else '>='} {low:g}"] if low > -math.inf else []
    return " and ".join(words) or "not NaN"
