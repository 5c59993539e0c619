"""Regularisers from text, as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable

from memokern.regularizers.base import Compose, Regularizer
from memokern.regularizers.density import EmpiricalBayes
from memokern.regularizers.smoothing import GaussianSmoothing, SmoothedBank
from memokern.regularizers.tikhonov import Tikhonov
from memokern.regularizers.weights import NoiseUnconditioned, Temperature


def _flag(text: str) -> bool:
    """True or False from text; KeyError for anything else."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return known[text.lower()]


# What parse() knows: name -> (class, what makes each parameter from text). The first parameter is
# required, but for NoiseUnconditioned, which has a default.
_KNOWN: dict[str, tuple[Callable[..., Regularizer], dict[str, Callable[[str], object]]]] = {
    "tikhonov": (Tikhonov, {"c": float}),
    "empirical-bayes": (EmpiricalBayes, {"log_tau": float, "normalized": _flag}),
    "temperature": (Temperature, {"sigma_c": float}),
    "smoothing": (GaussianSmoothing, {"h": float, "samples": int, "seed": int}),
    "bank": (SmoothedBank, {"h": float}),
    "unconditioned": (NoiseUnconditioned, {"temperature": float}),
}


def parse(text: str) -> Regularizer | None:
    """A regulariser from text: ``name:key=value,key=value``, several joined with ``+``; None for
    "none".

    Raises: ValueError that lists the names and parameters that are known.

    Example:
        >>> from memokern.regularizers import parse
        >>> parse("temperature:sigma_c=0.5+tikhonov:c=1e-2")
        Compose(Temperature(sigma_c=0.5), Tikhonov(c=0.01))
        >>> parse("none") is None
        True
    """
    parts = [_parse_one(part.strip()) for part in _split(text) if part.strip() != "none"]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else Compose(*parts)


def describe(regularizer: Regularizer | None) -> str:
    """The text from which `parse` makes this regulariser again.

    Raises: ValueError for regularisers that `parse` does not know, or with functions of sigma.

    Example:
        >>> from memokern.regularizers import Temperature, Tikhonov, describe
        >>> describe(Temperature(0.5) & Tikhonov(0.01))
        'temperature:sigma_c=0.5+tikhonov:c=0.01'
    """
    if regularizer is None:
        return "none"
    if isinstance(regularizer, Compose):
        return "+".join(map(describe, regularizer.parts))
    for name, (make, keys) in _KNOWN.items():
        values = {key: getattr(regularizer, key, None) for key in keys}
        if type(regularizer) is make and all(isinstance(v, int | float) for v in values.values()):
            return f"{name}:{','.join(f'{key}={value!r}' for key, value in values.items())}"
    raise ValueError(
        f"{regularizer!r} cannot be written as text: it is none of {', '.join(_KNOWN)}, or has a"
        " function as its parameter"
    )


def _split(text: str) -> list[str]:
    """Splits at each "+" that a name follows, so that 1e+2 stays whole."""
    parts: list[str] = []
    for piece in text.split("+"):
        if parts and not piece.strip()[:1].isalpha():
            parts[-1] += "+" + piece
        else:
            parts.append(piece)
    return parts


def _parse_one(text: str) -> Regularizer:
    """One regulariser from ``name:key=value,key=value``."""
    name, _, arguments = text.partition(":")
    forms = ", ".join(
        f"{known}:{','.join(k + '=...' for k in keys)}" for known, (_, keys) in _KNOWN.items()
    )
    if name not in _KNOWN:
        raise ValueError(f"unknown regularizer {name!r}; expected none, {forms}")
    make, keys = _KNOWN[name]
    found: dict[str, object] = {}
    for item in filter(None, arguments.split(",")):
        key, sep, value = (p.strip() for p in item.partition("="))
        if key in found:
            raise ValueError(f"{name}: {key} is given twice")
        if not sep or key not in keys:
            raise ValueError(f"{name} knows {', '.join(k + '=...' for k in keys)}; got {item!r}")
        try:
            found[key] = keys[key](value)
        except (ValueError, KeyError):
            raise ValueError(f"{name}: {key}={value!r} is not a value that it takes") from None
    first = next(iter(keys))
    if first not in found and make is not NoiseUnconditioned:
        raise ValueError(f"{name} needs {first}=..., for example {name}:{first}=0.1")
    return make(**found)
