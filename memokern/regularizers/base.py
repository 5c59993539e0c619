"""What a regulariser may change, how regularisers are composed, and parameters that may depend on
sigma."""

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
    """The value, a number checked; what a function of sigma returns is checked where it is used."""
    if callable(value):
        return value
    return checks.number(name, value, low, strict=strict, hint="; or a function of sigma")


def show(value: object) -> str:
    """A parameter as repr shows it; a function is shown by its name."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else str(value)


def level_at(name: str, level: Level, sigma: Tensor, low: float, *, strict: bool = False) -> Tensor:
    """The parameter at these noise levels, [*batch] float64; ValueError if a function of sigma
    returned something out of range."""
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
    r"""The arguments of one sweep.

    Attributes:
        x: [\*batch, \*shape]. sigma, alpha, temperature: [\*batch] float64.
        bias: [N], added to the logits, or None. weighting: "gaussian" or "log".
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    weighting: str = "gaussian"


class Regularizer:
    """The base class: override what a variant changes. ``a & b`` composes two of them.

    :func:`memokern.regularizers.evaluate` calls, in this order, `replicate` and `prepare`, then
    sweeps, then calls `gate` and `gather`.

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

    # For a class that a composition may hold only once: what to do instead of composing two.
    once: ClassVar[str] = ""

    def replicate(self, query: Query) -> Query:
        """Makes M queries of each, along a new first axis of every tensor that is given per query;
        :meth:`gather` takes that axis away again."""
        return query

    def prepare(self, query: Query, data: Data) -> Query:
        """Changes what the sweep is asked: sigma, temperature, bias or weighting."""
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        """The gated residual, after the sweep. `query` is as `prepare` was given it."""
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        """One result from the M that `replicate` asked for, after all gates."""
        return residual

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor | None:
        r"""div_x of the gated residual [\*batch] float64, from that of the residual given; the
        other arguments as of `gate`. None where it does not follow from these: it is then found by
        differentiating. The base class answers for regularisers that change nothing."""
        changed = ("replicate", "prepare", "gate", "gather")
        own = any(getattr(type(self), name) is not getattr(Regularizer, name) for name in changed)
        return None if own else divergence

    def level_gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        """gamma(sigma, alpha) in (0, 1], with which the gated residual is gamma (alpha mean - x),
        [*sigma.shape] float64; None where it is not that, or where a row that has all the weight
        could lose it further down the flow (:mod:`memokern.samplers.closed_end` has the condition).
        The base class answers for regularisers that change nothing."""
        changed = ("replicate", "prepare", "gate", "gather")
        own = any(getattr(type(self), name) is not getattr(Regularizer, name) for name in changed)
        return None if own else torch.ones_like(sigma)

    def log_potential(self, posterior: Posterior, query: Query) -> Tensor | None:
        r"""phi [\*batch] such that the regularised score is grad_x phi; None where there is
        none."""
        return None

    def __and__(self, other: Regularizer) -> Compose:
        return Compose(self, other)

    def __repr__(self) -> str:
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        shown = ", ".join(f"{k}={show(v)}" for k, v in public.items())
        return f"{type(self).__name__}({shown})"


class Compose(Regularizer):
    """Several regularisers in one: they change the logits in their order, then gate in their order.

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

    @property
    def parts(self) -> tuple[Regularizer, ...]:
        """Those that it is made of, in their order."""
        return tuple(self._parts)

    def prepare(self, query: Query, data: Data) -> Query:
        for part in self._parts:
            query = part.prepare(query, data)
        return query

    def replicate(self, query: Query) -> Query:
        for part in self._parts:
            query = part.replicate(query)
        return query

    def gate(self, residual: Tensor, query: Query, posterior: Posterior) -> Tensor:
        for part in self._parts:
            residual = part.gate(residual, query, posterior)
        return residual

    def gather(self, residual: Tensor) -> Tensor:
        for part in self._parts:
            residual = part.gather(residual)
        return residual

    def gate_divergence(
        self, divergence: Tensor, residual: Tensor, query: Query, posterior: Posterior
    ) -> Tensor | None:
        found: Tensor | None = divergence
        for part in self._parts:
            if found is None:
                break
            found = part.gate_divergence(found, residual, query, posterior)
            residual = part.gate(residual, query, posterior)
        return found

    def level_gate(self, sigma: Tensor, alpha: Tensor) -> Tensor | None:
        # Of two that change the noise in the weights it is not proven.
        changing = sum(type(p).prepare is not Regularizer.prepare for p in self._parts)
        found: Tensor | None = torch.ones_like(sigma) if changing <= 1 else None
        for part in self._parts:
            gate = part.level_gate(sigma, alpha)
            found = None if found is None or gate is None else found * gate
        return found

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self._parts))})"
