"""Images for the cases of pruning: a file's, or ones made with the statistics of photos.

Random rows would not do: bounds separate rows that lie far apart in few directions, as photos do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import memokern
from memokern.data.storage import UINT8_SCALE, UINT8_SHIFT

HELD_OUT = 500  # images that are not among the rows: the last ones
SIDE = 32
COUNT, QUICK_COUNT = 10_000, 3_000  # of synthetic ones


class Images(NamedTuple):
    rows: Tensor  # [N, *shape] uint8
    held_out: Tensor  # [HELD_OUT, *shape] uint8


def values(images: Tensor) -> Tensor:
    """[N, D] float32, as the numbers that uint8 stands for."""
    return images.flatten(1).float().mul_(UINT8_SCALE).add_(UINT8_SHIFT)


@lru_cache(maxsize=1)
def load(path: str | None, quick: bool = False) -> Images:
    """The images of a file; without one, those of `synthetic`. ValueError for other rows."""
    if path is None:
        every = synthetic(QUICK_COUNT if quick else COUNT)
    else:
        data = memokern.TrainingSet(path)
        if data.dtype != torch.uint8 or len(data.shape) != 3:
            raise ValueError(f"expected uint8 images [N, C, H, W], got {data!r}")
        every = data.rows.reshape(-1, *data.shape)
    if len(every) <= 2 * HELD_OUT:
        raise ValueError(f"expected more than {2 * HELD_OUT} images, got {len(every)}: {path}")
    return Images(every[:-HELD_OUT], every[-HELD_OUT:])


def synthetic(n: int) -> Tensor:
    """[N, 3, 32, 32] uint8: random phases, an amplitude of 1 / frequency, mostly grey, with a
    contrast and a brightness of their own, as photos have."""
    g = torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(SIDE) * SIDE
    amplitude = 1 / (f[:, None].square() + f[: SIDE // 2 + 1].square()).sqrt().clamp(min=1)
    noise = torch.randn(n, 3, SIDE, SIDE, generator=g)
    pattern = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(SIDE, SIDE))
    colours = torch.tensor([[1.0, 1.0, 1.0], [0.25, 0.0, -0.25], [-0.08, 0.16, -0.08]])
    colour = torch.einsum("nkhw,kc->nchw", pattern, colours)
    contrast = torch.empty(n, 1, 1, 1).uniform_(0.3, 1.2, generator=g)
    light = torch.empty(n, 1, 1, 1).normal_(0, 0.3, generator=g)
    x = colour / colour.std() * 0.45 * contrast + light
    return ((x + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def augmented(images: Tensor, n: int) -> Tensor:
    """[n, C, H, W] uint8: the images, their mirror images, and both moved by some pixels in a
    circle, as many as asked for."""
    moves = [(0, 0), *((i, j) for i in (-2, -1, 1, 2) for j in (-2, -1, 1, 2))]
    moves += [(i, j) for i in range(-4, 5) for j in range(-4, 5) if (i, j) not in moves]
    parts: list[Tensor] = []
    for move in moves:
        for image in (images, images.flip(-1)):
            left = n - sum(map(len, parts))
            if left > 0:
                parts.append(image[:left].roll(move, (-2, -1)))
    return torch.cat(parts)


def enlarged(data: Images, n: int) -> Images:
    """With n rows, by `augmented`."""
    return Images(augmented(data.rows, n), data.held_out)
