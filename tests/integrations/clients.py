"""The clients, where they are installed, and the problem that all are tested on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from memokern import TrainingSet
from memokern.calls import Query, Rows
from tests import oracle

F64 = torch.float64
# What the clients import for pictures, and what PyPI has of it is for PyTorch with CUDA.
PICTURES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def client(distribution: str, module: str) -> ModuleType:
    """A module of a client; skips the test, with the reason, where that is not installed.

    The packages' own imports, which bring CLIP, wandb and data sets, are left out, and an empty
    module stands for a torchvision that cannot be imported: samplers use none of it.
    """
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: make integrations installs and tests it")
    package = module.split(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if distribution in ("k-diffusion", "smalldiffusion"):
            if package not in sys.modules:
                spec = importlib.util.find_spec(package)
                assert spec is not None and spec.submodule_search_locations is not None
                bare = ModuleType(package)
                bare.__path__ = list(spec.submodule_search_locations)
                sys.modules[package] = bare
            with _stand_in_for_pictures():
                return importlib.import_module(module)
        return importlib.import_module(module)


@contextlib.contextmanager
def _stand_in_for_pictures() -> Iterator[None]:
    stand_ins = {}
    try:
        importlib.import_module(PICTURES[-1])
    except (ImportError, RuntimeError):  # RuntimeError of a build for another torch
        stand_ins = {name: ModuleType(name) for name in PICTURES}
        for name in PICTURES[1:]:
            parent, _, own = name.rpartition(".")
            setattr(stand_ins[parent], own, stand_ins[name])
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


class Problem(NamedTuple):
    """Rows [N, *shape] with labels 0, 1, 2, and their closed form by the oracle."""

    rows: Tensor
    labels: Tensor

    @property
    def data(self) -> TrainingSet:
        return TrainingSet(self.rows, labels=self.labels)

    def x0(
        self, x: Tensor, sigma: Tensor | float, alpha: Tensor | float = 1.0, label: int = -1
    ) -> Tensor:
        """The posterior mean [B, *shape] float64 by its definition; label -1 is all rows."""
        rows = self.rows if label == -1 else self.rows[self.labels == label]
        levels = [
            torch.as_tensor(v).to(F64).reshape(-1).expand(len(x)) for v in (sigma, alpha, 1.0)
        ]
        query = Query(x.to(F64).reshape(len(x), -1), *levels)
        return oracle.sums(query, Rows(rows.reshape(len(rows), -1))).mean.reshape(x.shape)

    def eps(
        self, x: Tensor, sigma: Tensor | float, alpha: Tensor | float = 1.0, label: int = -1
    ) -> Tensor:
        """(x - alpha x0) / sigma."""
        s, a = (
            torch.as_tensor(v).to(F64).reshape(-1, *[1] * (x.dim() - 1)) for v in (sigma, alpha)
        )
        return (x.to(F64) - a * self.x0(x, sigma, alpha, label)) / s

    def distance(self, x: Tensor, label: int | None = None) -> float:
        """The largest distance of an x to the nearest row (with this label)."""
        rows = self.rows if label is None else self.rows[self.labels == label]
        return float(oracle.squares(x.flatten(1), rows.flatten(1)).amin(1).sqrt().max())


def problem() -> Problem:
    return Problem(normal(20, 2, 3, 3, seed=1), torch.arange(20) % 3)
