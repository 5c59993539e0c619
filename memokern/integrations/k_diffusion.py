"""For crowsonkb/k-diffusion: model(x, sigma, **extra_args) gives the denoised x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.integrations.adapter import Adapter, require_neutral
from memokern.processes import EDM
from memokern.regularizers import Regularizer
from memokern.validate import PerQuery


class KDiffusionModel(Adapter):
    r"""The `model` of k_diffusion.sampling's functions.

    Args:
        source: a TrainingSet, rows [N, \*shape], or any denoiser (:class:`Adapter` says how).
        regularizer: with rows; in EDM's units, x = y + sigma z.
        bandwidth: of `mapping_cond`.

    forward(x, sigma, class_cond=, mapping_cond=, aug_cond=): x [B, \*shape], sigma [B] or a number;
    the denoised x in x's type. class_cond: labels [B], where -1 or the number of classes is the
    null class; mapping_cond: conditions [B, K]; aug_cond: zeros, because rows were not augmented.

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`.

    Example:
        >>> import torch
        >>> from memokern.integrations import KDiffusionModel
        >>> model = KDiffusionModel(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        >>> model(torch.tensor([[0.9, 0.3]]), torch.tensor([0.1])).tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        source: Any,
        regularizer: Regularizer | None = None,
        bandwidth: PerQuery | None = None,
    ) -> None:
        super().__init__(source, EDM(), regularizer, bandwidth)

    def forward(
        self,
        x: Tensor,
        sigma: PerQuery,
        class_cond: Tensor | None = None,
        *,
        mapping_cond: Tensor | None = None,
        aug_cond: Tensor | None = None,
    ) -> Tensor:
        require_neutral("aug_cond", aug_cond, "the rows were not augmented")
        level = self.numbers("sigma", sigma, x)
        one = torch.ones_like(level)
        return self.at(x, one, level, class_cond, mapping_cond, time=level).x0.to(x.dtype)
