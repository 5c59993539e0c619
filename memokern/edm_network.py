"""What the scripts and samplers of Karras et al. (arXiv 2206.00364) ask of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memokern.data.training_set import TrainingSet
from memokern.processes import Process

Label = int | Tensor | Sequence[int | None] | None
# The label of queries that use all rows: the null class of guidance.
EVERY_ROW = -1


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
        return float(self.process.sigma(torch.tensor(self.process.t_noise, dtype=torch.float64)))

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
        labels = self.data.labels
        return 0 if labels is None or labels.is_meta else max(0, int(labels.max()) + 1)


def label_numbers(label: Label, batch: torch.Size, network: EDMNetwork) -> Tensor:
    """Labels as integers [] or [*batch]: given so, with None for -1, or one-hot
    [*batch, label_dim], where a query of zeros is -1.

    Raises: TypeError, ValueError for anything else.
    """
    if isinstance(label, list | tuple):
        label = [EVERY_ROW if v is None else v for v in label]
    labels = torch.as_tensor(label, device=network.device)
    if labels.is_floating_point() and labels.shape == (*batch, network.label_dim or -1):
        total = labels.sum(-1)
        if not bool(((labels == 0) | (labels == 1)).all()) or bool((total > 1).any()):
            raise ValueError("expected label as integers, or one-hot with one 1 or none per query")
        return torch.where(total == 0, EVERY_ROW, labels.argmax(-1))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected label as integers, got {labels.dtype}")
    if labels.dim() and labels.shape != batch:
        raise ValueError(
            f"expected label as one integer or one per query {tuple(batch)}, got"
            f" {tuple(labels.shape)}"
        )
    return labels
