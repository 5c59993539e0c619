"""For NVlabs/edm and NVlabs/edm2: net(x, sigma, class_labels) gives the denoised x."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memokern.conditional import Label
from memokern.integrations.adapter import Adapter, require_neutral
from memokern.processes import EDM
from memokern.regularizers import Regularizer
from memokern.validate import PerQuery


class EDMModel(Adapter):
    r"""The `net` of edm's and edm2's generate.py, and of their losses.

    A :class:`memokern.Denoiser` on its default process has what their samplers read; this takes
    the further arguments of their networks, and denoisers of any process.

    Args:
        source: a TrainingSet, rows [N, C, R, R], or any denoiser (:class:`Adapter` says how).
        regularizer: with rows; in EDM's units, x = y + sigma z.

    forward(x, sigma, class_labels=, force_fp32=, augment_labels=, return_logvar=): x [B, C, R, R],
    sigma a number, [B] or [B, 1, 1, 1]; the denoised x in x's type. class_labels: one-hot
    [B, label_dim], zeros for the null class, or numbers [B]. force_fp32 changes nothing: nothing is
    computed in less than float32. augment_labels: zeros, because rows were not augmented.

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`; ValueError for return_logvar, an
        output for training that rows do not have.

    Example:
        >>> import torch
        >>> from memokern.integrations import EDMModel
        >>> net = EDMModel(torch.zeros(2, 3, 4, 4))
        >>> net.img_channels, net.img_resolution, net.label_dim, net.sigma_min
        (3, 4, 0, 0.002)
        >>> net(torch.ones(1, 3, 4, 4), torch.tensor(1.0), force_fp32=True).abs().max().item()
        0.0
    """

    def __init__(self, source: Any, regularizer: Regularizer | None = None) -> None:
        super().__init__(source, EDM(), regularizer)
        self.label_dim = self.classes
        process = self.denoiser.process
        start = torch.tensor(process.t_noise, dtype=torch.float64, device="cpu")
        low = process.ratio(process.time_of_sigma(process.sigma_min))
        high = float(process.ratio(start))
        # What generate.py takes its grid from: the levels of the denoiser's own process.
        self.sigma_min = float(low)
        self.sigma_max = high if math.isfinite(high) else EDM().sigma_max

    @property
    def img_channels(self) -> int:
        """C of rows [C, R, R]."""
        return self.shape[0]

    @property
    def img_resolution(self) -> int:
        """R of rows [C, R, R]."""
        return self.shape[-1]

    def round_sigma(self, sigma: PerQuery) -> Tensor:
        """sigma as a tensor, not rounded, because every level is possible."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Tensor,
        sigma: PerQuery,
        class_labels: Label = None,
        force_fp32: bool = False,
        *,
        augment_labels: Tensor | None = None,
        return_logvar: bool = False,
    ) -> Tensor:
        require_neutral("augment_labels", augment_labels, "the rows were not augmented")
        if return_logvar:
            raise ValueError("a closed form has no log variance to return (return_logvar)")
        level = self.numbers("sigma", sigma, x)
        found = self.at(x, torch.ones_like(level), level, class_labels, time=level)
        return found.x0.to(x.dtype)
