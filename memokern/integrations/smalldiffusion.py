"""For yuanchenyang/smalldiffusion: model.predict_eps(x, sigma, cond) gives the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.integrations.adapter import Adapter
from memokern.processes import EDM, FlowMatching
from memokern.regularizers import Regularizer
from memokern.validate import PerQuery


class SmallDiffusionModel(Adapter):
    r"""The `model` of smalldiffusion.samples, in the place of its IdealDenoiser.

    Args:
        source: a TrainingSet, rows [N, \*shape], or any denoiser (:class:`Adapter` says how).
        regularizer: with rows; in the units of the client's x.
        flow: False for x = y + sigma z and its schedules; True for x = (1 - sigma) y + sigma z,
            where the model gives z - y, as its PredFlow models with ScheduleFlow.

    forward(x, sigma, cond=None): x [B, \*shape], sigma a number, [B] or [B, 1, ..., 1]; eps (with
    flow z - y) in x's type. cond: labels [B]; -1 or the number of classes is the null class.
    `predict_eps`, `predict_eps_cfg`, `rand_input` and `input_dims` are what its samplers call; a
    cfg_scale of c is eps + c (eps - that for all rows).

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`.

    Example:
        >>> import torch
        >>> from memokern.integrations import SmallDiffusionModel
        >>> model = SmallDiffusionModel(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        >>> model.predict_eps(torch.tensor([[1.25, 0.5]]), torch.tensor(0.25))
        tensor([[1., 2.]])
    """

    def __init__(
        self, source: Any, regularizer: Regularizer | None = None, *, flow: bool = False
    ) -> None:
        super().__init__(source, FlowMatching(reverse=True) if flow else EDM(), regularizer)
        self.flow = bool(flow)

    @property
    def input_dims(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.shape

    def rand_input(self, batchsize: int) -> Tensor:
        """Noise [batchsize, *shape] of the rows' type, on their device."""
        space = self.denoiser.space
        return torch.randn((batchsize, *self.shape), dtype=space.dtype, device=space.device)

    def forward(self, x: Tensor, sigma: PerQuery, cond: Tensor | None = None) -> Tensor:
        level = self.numbers("sigma", sigma, x)
        found = self.at(x, self.path.alpha(level), level, cond, time=level)
        if not self.flow:
            return found.eps.to(x.dtype)
        return found.velocity(self.path.d_alpha(level), self.path.d_sigma(level)).to(x.dtype)

    def predict_eps(self, x: Tensor, sigma: PerQuery, cond: Tensor | None = None) -> Tensor:
        """What the samplers step along: `forward`."""
        out: Tensor = self(x, sigma, cond=cond)
        return out

    def predict_eps_cfg(
        self, x: Tensor, sigma: PerQuery, cond: Tensor | None, cfg_scale: float
    ) -> Tensor:
        """The same with classifier-free guidance, for one sweep more where there is any."""
        part = self.predict_eps(x, sigma, cond)
        if cond is None or cfg_scale == 0:
            return part
        return part + cfg_scale * (part - self.predict_eps(x, sigma))
