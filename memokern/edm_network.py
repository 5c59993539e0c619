"""What the scripts and samplers of Karras et al. (arXiv 2206.00364) ask of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from memokern.data.training_set import TrainingSet
from memokern.processes import Process


class EDMNetwork:
    """The attributes that those scripts read, of a network with a process and a training set."""

    process: Process
    data: TrainingSet
    kind: Tensor
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type that pipelines take for x: that of float64 rows, else float32, or what `.to()`
        asked for."""
        return self.kind.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows, where x has to be."""
        return self.rows.device

    @property
    def space(self) -> Tensor:
        """An empty tensor [0, *shape], of the type and on the device that queries have."""
        data = self.data
        return torch.empty((0, *data.shape), dtype=data.compute_dtype, device=data.device)

    @property
    def sigma_min(self) -> float:
        """The lowest level > 0 of the process's grid."""
        return self.process.sigma_min

    @property
    def sigma_max(self) -> float:
        """The level at which the process starts."""
        start = torch.tensor(self.process.t_noise, dtype=torch.float64, device="cpu")
        return float(self.process.sigma(start))

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """sigma as a tensor, not rounded, because every level is possible."""
        return torch.as_tensor(sigma)

    @property
    def img_channels(self) -> int:
        """C of rows [C, H, W]."""
        return self._image_shape("img_channels")[0]

    @property
    def img_resolution(self) -> int:
        """H = W of rows [C, H, W]."""
        return self._image_shape("img_resolution")[1]

    def _image_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.space.shape[1:])
        if len(shape) != 3 or shape[1] != shape[2]:
            raise AttributeError(f"{name} is that of rows [C, R, R], got rows {list(shape)}")
        return shape

    @property
    def label_dim(self) -> int:
        """The number of labels, 1 more than the largest; 0 without labels."""
        count: int = self.data.label_count()
        return count
