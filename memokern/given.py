"""A denoiser whose queries all ask for the same, as samplers and likelihoods take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memokern.conditional import Label, Wanted
from memokern.processes import Process
from memokern.strategies.certificate import Certificate
from memokern.validate import PerQuery


class Evaluates(Protocol):
    """What is asked of the denoiser."""

    process: Process

    @property
    def space(self) -> Tensor: ...

    @property
    def evaluate(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Guided:
    r"""An evaluation with guidance, p_all + w (p - p_all) for each prediction p.

    Attributes:
        x0, eps, score: [\*batch, \*shape]. posterior: of the rows asked for, with the certificate;
        None of a network.
    """

    x0: Tensor
    eps: Tensor
    score: Tensor
    posterior: Any

    @property
    def certificate(self) -> Certificate | None:
        """That of the posterior."""
        found: Certificate | None = getattr(self.posterior, "certificate", None)
        return found


def label_part(label: Label, at: Tensor) -> Label:
    """The labels of some of the samples, [s] int64, where each has its own."""
    if isinstance(label, Tensor) and label.dim() > 0:
        return label[at.to(label.device)]
    if isinstance(label, list | tuple):
        return [label[i] for i in at.tolist()]
    return label


class Given:
    """A denoiser with what every query asks for, to take its place in samplers and likelihoods.

    Args:
        denoiser: a :class:`memokern.Denoiser`, or a network in its place, which knows labels only.
        label, condition, bandwidth: as :func:`memokern.posterior`; one for all samples, or one for
            each of the B that are drawn: [B], [B, K].
        guidance: w, as the Denoiser's: another sweep, over all rows, where it is not 1.

    Raises: ValueError for guidance without a label or condition; at the first evaluation what
    :func:`memokern.posterior` raises.

    Example:
        >>> from memokern import Denoiser, Given, TrainingSet, samplers
        >>> threes = Given(Denoiser(TrainingSet.digits()), label=3, guidance=1.5)
        >>> samplers.ode(threes, 2, steps=4, seed=0).x.shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        denoiser: Evaluates,
        label: Label = None,
        condition: Tensor | None = None,
        bandwidth: PerQuery | None = None,
        guidance: float | None = None,
    ) -> None:
        self.denoiser, self.process = denoiser, denoiser.process
        self.label, self.condition, self.bandwidth = label, condition, bandwidth
        if guidance is not None and not Wanted(label, condition):
            raise ValueError("guidance needs a label or a condition to guide to")
        self.guidance = guidance

    @property
    def space(self) -> Tensor:
        """As the denoiser's."""
        return self.denoiser.space

    def part(self, at: Tensor) -> Given:
        """The same for some of the samples, [s] int64."""
        asked: dict[str, Any] = {
            "label": label_part(self.label, at),
            "condition": self.condition,
            "bandwidth": self.bandwidth,
        }
        if self.condition is not None and self.condition.dim() > 1:
            asked["condition"] = self.condition[at]
        if isinstance(self.bandwidth, Tensor) and self.bandwidth.dim() > 0:
            asked["bandwidth"] = self.bandwidth[at]
        return Given(self.denoiser, guidance=self.guidance, **asked)

    def evaluate(self, x: Tensor, t: float | Tensor, label: Label = None, **asked: Any) -> Any:
        """As the denoiser's, for what was given. A label here goes before the one given."""
        condition = {"condition": self.condition, "bandwidth": self.bandwidth}
        # Networks know labels only.
        chosen = {name: value for name, value in condition.items() if value is not None}
        label = self.label if label is None else label
        part = self.denoiser.evaluate(x, t, label, **chosen, **asked)
        w = self.guidance
        if w is None or w == 1:
            return part
        whole = self.denoiser.evaluate(x, t, **asked)
        names = ("x0", "eps", "score")
        pairs = {name: (getattr(whole, name), getattr(part, name)) for name in names}
        return Guided(
            **{k: torch.lerp(a, b, w) for k, (a, b) in pairs.items()},
            posterior=getattr(part, "posterior", None),
        )
