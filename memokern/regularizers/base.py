"""What a regulariser may change, composition, and the numbers or functions of sigma they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memokern import validate
from memokern.data.training_set import TrainingSet
from memokern.results import Posterior
from memokern.util import checks

Data = TrainingSet | Tensor
# A number, or a function of the noise level: [*batch] float64 -> [*batch] float64.
Level = float | int | Callable[[Tensor], Tensor]


def check_level(name: str, value: Level, low: float, *, strict: bool = False) -> Level:
    """Checks a number; a function of sigma is checked where it is used."""
    if callable(value):
        return value
    return checks.number(name, value, low, strict=strict, hint="; or a function of sigma")


def show(value: object) -> str:
    """A parameter as repr shows it: a function by its name."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else str(value)


def level_at(name: str, level: Level, sigma: Tensor, low: float, *, strict: bool = False) -> Tensor:
    """The level at these noise levels [*batch] float64; what a function returned is checked."""
    value = level(sigma) if callable(level) else level
    out = validate.per_query(f"{name}(sigma)", value, sigma.shape, sigma.device)
    if callable(level):
        ok = torch.isfinite(out) & (out > low if strict else out >= low)
        validate.require(f"{name}(sigma)", value, out, ok, checks.limits(low, strict=strict))
    return out


def shrink(s2: Tensor, c: Tensor) -> Tensor:
    """s2 / (s2 + c), and 1 where c = 0, also at s2 = 0."""
    return torch.where(c == 0, 1.0, s2 / torch.where(c == 0, 1.0, s2 + c))


@dataclass(frozen=True)
class Query:
    r"""What the sweep is asked: x [\*batch, \*shape]; sigma, alpha, temperature [\*batch] float64;
    bias [N] or None; weighting "gaussian" or "log"."""

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    weighting: str = "gaussian"


class Regularizer:
    """The protocol: override what the variant changes. Combine two with ``a & b``.

    Example:
        >>> import torch
        >>> from memokern.regularizers import Regularizer, evaluate
        >>> class Half(Regularizer):  # a score of half the length
        ...     def gate(self, residual, query, posterior):
        ...         return 0.5 * residual
        >>> x, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> evaluate(x, rows, 1.0, regularizer=Half()).score.tolist()
        [[-1.0]]
    """

    # What to do instead, for a class of which a composition may hold one only.
    once: ClassVar[str] = ""

    def prepare(self, query: Query, data: Data) -> Query:
        """Before the sweep: the query it runs with."""
        return query

    def spread(self, query: Query) -> Query:
        """Before the sweep: one query as M, along a new first axis of every tensor per query."""
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        """After the sweep: the gated residual. `query` is the one asked, before `prepare`."""
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        """After the gates: undoes `spread`."""
        return residual

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor | None:
        r"""phi [\*batch] with regularised score = grad_x phi; None where there is none."""
        return None

    def __and__(self, other: Regularizer) -> Compose:
        return Compose(self, other)

    def __repr__(self) -> str:
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        shown = ", ".join(f"{k}={show(v)}" for k, v in public.items())
        return f"{type(self).__name__}({shown})"


class Compose(Regularizer):
    """Several regularisers: their changes of the logits in order, then their gates in order.

    Example:
        >>> from memokern.regularizers import Temperature, Tikhonov
        >>> Temperature(0.5) & Tikhonov(0.01)
        Compose(Temperature(sigma_c=0.5), Tikhonov(c=0.01))
    """

    def __init__(self, *parts: Regularizer) -> None:
        self._parts: list[Regularizer] = []
        for part in parts:
            if not isinstance(part, Regularizer):
                raise TypeError(f"expected regularizers, got {type(part).__name__}")
            self._parts.extend(part._parts if isinstance(part, Compose) else [part])
        for part in self._parts:
            if part.once and sum(isinstance(other, type(part)) for other in self._parts) > 1:
                raise ValueError(f"compose one {type(part).__name__} only: {part.once}")

    def prepare(self, query: Query, data: Data) -> Query:
        for part in self._parts:
            query = part.prepare(query, data)
        return query

    def spread(self, query: Query) -> Query:
        for part in self._parts:
            query = part.spread(query)
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        for part in self._parts:
            residual = part.gate(residual, query, posterior)
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        for part in self._parts:
            residual = part.gather(residual)
        return residual

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self._parts))})"
