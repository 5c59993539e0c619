"""Two small networks: the perceptron of the paper, and a U-Net for images. Any module will do that
takes x [B, *shape] and a number per query [B], and gives [B, *shape]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memokern.util import checks

FREQUENCIES = 8


def fourier(c: Tensor, count: int = FREQUENCIES) -> Tensor:
    """c, sin(pi k c) and cos(pi k c), k = 1..count, [B, 2 count + 1] of numbers c [B] about as
    large as 1.

    Example:
        >>> import torch
        >>> from memokern.training.networks import fourier
        >>> [round(v, 6) for v in fourier(torch.tensor([0.5]), 1)[0].tolist()]
        [0.5, 1.0, -0.0]
    """
    k = torch.arange(1, count + 1, dtype=c.dtype, device=c.device) * math.pi
    angle = c[:, None] * k
    return torch.cat([c[:, None], torch.sin(angle), torch.cos(angle)], 1)


class MLP(nn.Module):
    """A perceptron on [x, Fourier features of the time, class]: `depth` hidden layers of `width`.

    Args:
        shape: of one row. width, depth: >= 1; the paper's 256 and 2.
        frequencies: of the time's Fourier features. classes: number of labels, 0 for none.

    Raises: TypeError, ValueError for sizes out of range.

    Source: arXiv 2501.15785, section 6.

    Example:
        >>> import torch
        >>> from memokern.training import MLP
        >>> network = MLP((2,), width=16)
        >>> network(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        depth: int = 2,
        frequencies: int = FREQUENCIES,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape = tuple(checks.integer("shape", n, 1) for n in shape)
        self.width = checks.integer("width", width, 1)
        self.depth = checks.integer("depth", depth, 1)
        self.frequencies = checks.integer("frequencies", frequencies, 0)
        self.classes = checks.integer("classes", classes, 0)
        dim = math.prod(self.shape)
        sizes = [dim + 2 * self.frequencies + 1 + self.classes] + [self.width] * self.depth
        hidden: list[nn.Module] = []
        for before, after in pairwise(sizes):
            hidden += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(self.width, dim))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make this network again."""
        return {
            "shape": list(self.shape), "width": self.width, "depth": self.depth,
            "frequencies": self.frequencies, "classes": self.classes,
        }  # fmt: skip

    def forward(self, x: Tensor, c: Tensor, label: Tensor | None = None) -> Tensor:
        parts = [x.flatten(1), fourier(c, self.frequencies)]
        if self.classes:
            parts.append(one_hot(label, self.classes, x))
        out: Tensor = self.layers(torch.cat(parts, 1))
        return out.reshape(x.shape)


def one_hot(label: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Labels as rows [B, classes] in the type of `like`: zeros for none, or -1."""
    out = like.new_zeros(len(like), classes)
    if label is not None:
        label = label.expand(len(like))
        if bool((label >= classes).any()):
            raise ValueError(f"expected labels below {classes}, got {int(label.max())}")
        known = label >= 0
        out[known, label[known]] = 1.0
    return out


class _Block(nn.Module):
    """Two convolutions with a shift and a scale from the time between them, beside a shortcut."""

    def __init__(self, inside: int, outside: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, 1, 1))
        self.turn = nn.Linear(embedding, 2 * outside)
        self.norm = _norm(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.first(x)
        scale, shift = self.turn(e)[:, :, None, None].chunk(2, 1)
        h = self.second(F.silu(self.norm(h) * (1 + scale) + shift))
        out: Tensor = h + self.shortcut(x)
        return out


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 4), channels)


class UNet(nn.Module):
    """A small U-Net: residual blocks at each of the resolutions, halved from one to the next.

    Args:
        shape: of one row, [H, W] or [C, H, W]; H and W multiples of patch * 2^(levels - 1).
        width: channels of the finest level; doubled at the others. levels: >= 1.
        patch: the image is cut into patches of patch x patch pixels, which become channels; 1 for
            none. The network is then patch^2 times cheaper.
        classes: number of labels, 0 for none.

    Raises: TypeError, ValueError for sizes out of range.

    Example:
        >>> import torch
        >>> from memokern.training import UNet
        >>> network = UNet((8, 8), width=8, levels=2)
        >>> network(torch.zeros(3, 8, 8), torch.zeros(3)).shape
        torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        levels: int = 3,
        patch: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape = tuple(checks.integer("shape", n, 1) for n in shape)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"expected shape [H, W] or [C, H, W], got {list(self.shape)}")
        self.width = checks.integer("width", width, 1)
        self.levels = checks.integer("levels", levels, 1)
        self.patch = checks.integer("patch", patch, 1)
        self.classes = checks.integer("classes", classes, 0)
        fits = self.patch * 2 ** (self.levels - 1)
        if any(n % fits for n in self.shape[-2:]):
            raise ValueError(
                f"expected H and W that {fits} = patch * 2^(levels - 1) divides, got"
                f" {list(self.shape[-2:])}"
            )
        channels = (self.shape[0] if len(self.shape) == 3 else 1) * self.patch**2
        embedding = 4 * self.width
        self.embed = nn.Sequential(
            nn.Linear(2 * FREQUENCIES + 1 + self.classes, embedding), nn.SiLU(),
            nn.Linear(embedding, embedding), nn.SiLU(),
        )  # fmt: skip
        sizes = [self.width] + [2 * self.width] * (self.levels - 1)
        self.enter = nn.Conv2d(channels, self.width, 3, 1, 1)
        self.down, self.halve = nn.ModuleList(), nn.ModuleList()
        self.up, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for before, size in zip([self.width, *sizes[:-1]], sizes, strict=True):
            self.down.append(_Block(before, size, embedding))
        for size in sizes[:-1]:
            self.halve.append(nn.Conv2d(size, size, 3, 2, 1))
        self.middle = _Block(sizes[-1], sizes[-1], embedding)
        for fine, coarse in reversed(list(pairwise(sizes))):
            self.enlarge.append(nn.Conv2d(coarse, fine, 3, 1, 1))
            self.up.append(_Block(2 * fine, fine, embedding))
        self.leave = nn.Sequential(_norm(self.width), nn.SiLU(),
                                   nn.Conv2d(self.width, channels, 3, 1, 1))  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make this network again."""
        return {
            "shape": list(self.shape), "width": self.width, "levels": self.levels,
            "patch": self.patch, "classes": self.classes,
        }  # fmt: skip

    def forward(self, x: Tensor, c: Tensor, label: Tensor | None = None) -> Tensor:
        features = [fourier(c)]
        if self.classes:
            features.append(one_hot(label, self.classes, x))
        e = self.embed(torch.cat(features, 1))
        image = x.reshape(len(x), -1, *self.shape[-2:])
        h = self.enter(F.pixel_unshuffle(image, self.patch))
        kept = []
        for level, block in enumerate(self.down):
            h = block(h, e)
            if level < len(self.halve):
                kept.append(h)
                h = self.halve[level](h)
        h = self.middle(h, e)
        for block, enlarge in zip(self.up, self.enlarge, strict=True):
            h = enlarge(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = block(torch.cat([h, kept.pop()], 1), e)
        return F.pixel_shuffle(self.leave(h), self.patch).reshape(x.shape)


NETWORKS: dict[str, type[MLP] | type[UNet]] = {"mlp": MLP, "unet": UNet}


def parameter_count(network: nn.Module) -> int:
    """How many numbers a network learns.

    Example:
        >>> from memokern.training.networks import MLP, parameter_count
        >>> parameter_count(MLP((2,), width=4, depth=1, frequencies=0))  # 3 x 4 + 4 + 4 x 2 + 2
        26
    """
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
