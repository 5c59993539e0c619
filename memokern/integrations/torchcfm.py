"""For atong01/conditional-flow-matching (torchcfm): model(t, x, y) gives the velocity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memokern.integrations.adapter import Adapter
from memokern.processes import FlowMatching, Process
from memokern.regularizers import Regularizer
from memokern.util import checks
from memokern.validate import PerQuery


class Bridge(Process):
    """x_t = a(t) x1 + b(t) x0 + s z with x0 standard normal, so that alpha = a and
    sigma^2 = b^2 + s^2: torchcfm's paths of independent pairs, whose noise s stays to the end.

    Args:
        s: >= 0. straight: a = t and b = 1 - t; else a = sin(pi t / 2) and b = cos(pi t / 2).

    Example:
        >>> import torch
        >>> from memokern.integrations.torchcfm import Bridge
        >>> Bridge(0.6).sigma(torch.tensor([0.2, 1.0], dtype=torch.float64)).tolist()
        [1.0, 0.6]
    """

    t_noise, t_data = 0.0, 1.0

    def __init__(self, s: float, straight: bool = True) -> None:
        self.s = checks.number("s", s, 0.0)
        self.straight = bool(straight)
        if self.s > 0:
            self.sigma_min = self.s

    def alpha(self, t: Tensor) -> Tensor:
        return t if self.straight else torch.sin(math.pi / 2 * t)

    def _own(self, t: Tensor) -> Tensor:
        """b(t)."""
        return 1 - t if self.straight else torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._own(t).square().add(self.s**2).sqrt() if self.s else self._own(t).abs()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.straight else math.pi / 2 * self._own(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        slope = torch.ones_like(t) if self.straight else math.pi / 2 * self.alpha(t)
        return -slope * self._own(t) / self.sigma(t) if self.s else -slope


def _bridge_of(matcher: Any) -> Process:
    """The process of a torchcfm flow matcher; by its class's name, so that it need not be there."""
    name = type(matcher).__name__
    noise = float(getattr(matcher, "sigma", 0.0))
    if matcher is None or (name == "ConditionalFlowMatcher" and noise == 0):
        return FlowMatching()
    if name == "ConditionalFlowMatcher":
        return Bridge(noise)
    if name == "TargetConditionalFlowMatcher":
        return FlowMatching(sigma_min=noise)
    if name == "VariancePreservingConditionalFlowMatcher":
        return Bridge(noise, straight=False)
    raise ValueError(
        "expected a ConditionalFlowMatcher, TargetConditionalFlowMatcher or"
        f" VariancePreservingConditionalFlowMatcher of torchcfm, got {name}: where noise and rows"
        " are paired by a plan, the mean velocity is not a closed form of the rows alone"
    )


class VectorField(Adapter):
    r"""The vector field that torchcfm's training has as its minimiser, where its networks stand.

    Args:
        source: a TrainingSet, rows [N, \*shape], or any denoiser (:class:`Adapter` says how).
        matcher: the flow matcher that a network would be trained with; None for
            ConditionalFlowMatcher(sigma=0), x_t = t x1 + (1 - t) x0.
        regularizer: with rows; in the units of that path.

    forward(t, x, y=None): t a number or [B], x [B, \*shape]; E[u_t given x_t = x] in x's type. t
    outside [0, 1], where adaptive solvers step, is held at the end. y: labels [B]. So it is called
    by torchdiffeq.odeint, torchdyn's NeuralODE (with args=), and as torchcfm's UNetModelWrapper is.

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`; ValueError for other matchers.

    Source: Tong et al., arXiv 2302.00482; the minimiser for rows is in arXiv 2506.03719.

    Example:
        >>> import torch
        >>> from memokern.integrations import VectorField
        >>> field = VectorField(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        >>> field(torch.tensor(0.5), torch.tensor([[0.5, 0.25]]))  # (tanh(1) - 0.5) / 0.5
        tensor([[ 0.5232, -0.5000]])
    """

    def __init__(
        self, source: Any, matcher: Any = None, regularizer: Regularizer | None = None
    ) -> None:
        super().__init__(source, _bridge_of(matcher), regularizer)

    def forward(
        self,
        t: PerQuery,
        x: Tensor,
        y: Tensor | None = None,
        *,
        args: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if args:
            raise ValueError(f"expected no args, got {sorted(args)}; labels are y=")
        time = self.numbers("t", t, x).clamp(0.0, 1.0)
        path = self.path
        found = self.at(x, path.alpha(time), path.sigma(time), y, time=time)
        return found.velocity(path.d_alpha(time), path.d_sigma(time)).to(x.dtype)
