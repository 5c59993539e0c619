"""What every adapter does: ask a denoiser for what a client's x is at the client's levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memokern import validate
from memokern.conditional import EVERY_ROW, Label
from memokern.data.storage import as_given
from memokern.data.training_set import TrainingSet
from memokern.denoiser import Denoiser
from memokern.processes import EDM, Process
from memokern.regularizers import Regularizer
from memokern.validate import PerQuery, wide

# What samplers, and so adapters, ask of a denoiser.
NEEDED = ("process", "space", "evaluate")
# sigma / alpha in the place of infinity, for processes that do not reach it.
FARTHEST = 1e6
# By so much of itself a ratio may be missed by rounding alone.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Seen:
    r"""What a denoiser says of x = alpha x0 + sigma eps.

    Attributes:
        found: the denoiser's evaluation. alpha, sigma: the client's, [\*batch] float64.
        gap: alpha / sigma where the denoiser was asked, less the client's, [\*batch]; None for 0.
    """

    found: Any
    alpha: Tensor
    sigma: Tensor
    gap: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        r"""[\*batch, \*shape]."""
        out: Tensor = self.found.x0
        return out

    @property
    def eps(self) -> Tensor:
        r"""[\*batch, \*shape]; at sigma = 0 the noise's mean, 0."""
        eps: Tensor = self.found.eps
        if self.gap is not None:  # x = alpha x0 + sigma eps must hold for the client
            eps = eps + wide(self.gap, eps) * self.x0
        return torch.where((wide(self.sigma, eps) == 0) & ~torch.isfinite(eps), 0.0, eps)

    @property
    def score(self) -> Tensor:
        """-eps / sigma."""
        eps = self.eps
        return -eps / wide(self.sigma, eps)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0, for alpha^2 + sigma^2 = 1."""
        eps, x0 = self.eps, self.x0
        return wide(self.alpha, eps) * eps - wide(self.sigma, x0) * x0

    def velocity(self, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps, for slopes [*batch] or []."""
        eps, x0 = self.eps, self.x0
        return wide(d_alpha, x0) * x0 + wide(d_sigma, eps) * eps


class Adapter(nn.Module):
    r"""A denoiser behind a client's calling convention; the base of this package's models.

    Rows become a :class:`memokern.Denoiser` on the client's own process, in whose units the
    regulariser is. A denoiser keeps its process: it is asked at the time with the client's
    sigma / alpha, and x is scaled to it. So one denoiser serves clients of all processes, and
    whatever takes the place of a Denoiser, such as :class:`memokern.Given` or a network, serves
    them too. Where a client starts without any signal (alpha = 0) and the denoiser's process does
    not, sigma / alpha = 1e6, or the most that the process has, stands for that start. A network is
    asked for no more noise than its process starts with, which is what it was trained on.

    Args:
        source: a TrainingSet, rows [N, \*shape], or a denoiser. regularizer: with rows only.
        path: the client's process.
        bandwidth: of the conditions that the client gives, where it gives any.

    Raises: TypeError, ValueError for a source that is none of these, or a second regulariser.
    """

    def __init__(
        self,
        source: Any,
        path: Process,
        regularizer: Regularizer | None = None,
        bandwidth: PerQuery | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, TrainingSet | Tensor):
            source = Denoiser(source, path, regularizer)
        elif not all(hasattr(source, name) for name in NEEDED):
            raise TypeError(
                "expected a TrainingSet, rows [N, *shape] or a denoiser (memokern.Denoiser, Given,"
                f" training.LearnedDenoiser), got {type(source).__name__}"
            )
        elif regularizer is not None:
            raise ValueError("a denoiser has its own regularizer: give it there, or give rows")
        self.path, self.denoiser, self.bandwidth = path, source, bandwidth
        self.shape = tuple(source.space.shape[1:])  # of a row
        network = source
        while not isinstance(network, nn.Module) and hasattr(network, "denoiser"):
            network = network.denoiser
        if network is not source and isinstance(network, nn.Module):
            self.inside = network  # so that .to() and parameters() find it
        self.classes = int(getattr(network, "label_dim", 0))
        closed = isinstance(network, Denoiser)
        known = network.data.labels if closed else None
        # The client's null class, unless -1, which the denoiser has for it, is a class of the rows.
        usual = known is not None and not known.is_meta and int(known.min()) >= 0
        self.null = self.classes if usual else None
        process = source.process
        noisiest = torch.tensor(process.t_noise, dtype=torch.float64, device="cpu")
        start = float(process.ratio(noisiest))
        self.farthest = FARTHEST if closed and not math.isinf(start) else start

    def numbers(self, name: str, value: PerQuery, x: Tensor) -> Tensor:
        r"""A number per query [\*batch] float64, of one, or of a tensor that broadcasts."""
        split = x.dim() - len(self.shape)
        if split < 0 or tuple(x.shape[split:]) != self.shape:
            row = self.denoiser.space.new_empty((1, *self.shape))
            validate.batch_shape(validate.computable(x), row)  # raises
        return validate.per_query(name, value, x.shape[:split], x.device)

    def at(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        label: Label = None,
        condition: Tensor | None = None,
        *,
        time: Tensor | None = None,
    ) -> Seen:
        r"""What the denoiser says of x [\*batch, \*shape] at levels [\*batch] float64.

        Args:
            label: as :class:`memokern.Denoiser` has it. The number after the last one, where rows
                have labels, is the null class too, as in networks with an embedding for it.
            condition: [\*batch, K].
            time: [\*batch], that of the client's process with these levels, where it is known.

        Raises: as the denoiser's `evaluate`.
        """
        given: dict[str, Any] = {}
        if condition is not None:
            given = {"condition": condition, "bandwidth": self.bandwidth}
        label = self._label(label)
        process = self.denoiser.process
        if time is not None and (process is self.path or type(process) is type(self.path) is EDM):
            return Seen(self.denoiser.evaluate(x, time, label, **given), alpha, sigma)
        x, ratio = validate.computable(x), sigma / alpha
        asked = process.time_of_ratio(ratio.clamp(max=self.farthest))
        a, s = process.alpha(asked), process.sigma(asked)
        # One of the two is far from 0.
        noisy = ratio > 1
        scale = torch.where(noisy, s, a) / torch.where(noisy, sigma, alpha)
        found = self.denoiser.evaluate(wide(scale, x) * x, asked, label, **given)
        missed = noisy & (s / a < ratio * (1 - ROUNDING))
        gap = torch.where(missed, a / s - alpha / torch.where(missed, sigma, 1.0), 0.0)
        return Seen(found, alpha, sigma, gap)

    def _label(self, label: Label) -> Label:
        """The denoiser's label for a client's."""
        if self.null is None or isinstance(label, list | tuple) or label is None:
            return label
        numbers = as_given(label, "label")
        if numbers.is_floating_point():  # one-hot
            return label
        return torch.where(numbers == self.null, EVERY_ROW, numbers)


def require_neutral(name: str, value: Tensor | None, what: str) -> None:
    """ValueError for a client's input that rows know nothing of, unless it is absent or zero."""
    if value is not None and bool((torch.as_tensor(value) != 0).any()):
        raise ValueError(f"expected {name} absent or zero, because {what}")
