"""The cases of certified pruning: what is timed in each, beside the dense sweep and the peers.

Queries are x = y + sigma z from rows or from images that are not among them, or the states of a
reverse trajectory. Ours reads the rows as they are stored, uint8, and chooses by itself
(method="auto"); the peers have them as float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

import memokern
from bench import images, peers
from bench.cases import OURS, Case
from bench.images import Images
from bench.runs import Make, Run

STEPS = 18  # of the trajectory, by Heun's method
TRAINING = (-1.2, 1.2)  # mean and standard deviation of ln sigma in EDM's training
BATCHES = 8
CHECKED = 3  # queries of a batch compared with float64
METHODS = {OURS: "auto", "pruned": "pruned", "dense": "dense"}

Batch = tuple[Tensor, float | Tensor]  # x [B, D], sigma: a number, or [B]
enlarged = lru_cache(maxsize=1)(images.enlarged)


@lru_cache(maxsize=2)
def prepared(data: Images) -> memokern.TrainingSet:
    """The rows with an index, and what is cached once."""
    found = memokern.TrainingSet(data.rows)
    found.build_index(progress=False)
    return found


@lru_cache(maxsize=2)
def trajectory(data: Images, b: int) -> list[Batch]:
    """What Heun's method asks of the denoiser on EDM's noise levels from 80 to 0.002: 35 batches.

    dx / dsigma = (x - denoised) / sigma.
    """
    rows = prepared(data)
    ratio = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    levels = ((1 - ratio) * 80 ** (1 / 7) + ratio * 0.002 ** (1 / 7)) ** 7
    sigmas = [*levels.tolist(), 0.0]
    torch.manual_seed(2)
    x = sigmas[0] * torch.randn(b, *data.rows.shape[1:])
    asked: list[Batch] = []

    def slope(x: Tensor, sigma: float) -> Tensor:
        asked.append((x.flatten(1), sigma))
        return (x - memokern.denoise(x, rows, sigma, method="dense")) / sigma

    for now, after in pairwise(sigmas):
        first = slope(x, now)
        ahead = x + (after - now) * first
        if after > 0:
            ahead = x + (after - now) * 0.5 * (first + slope(ahead, after))
        x = ahead
    return asked


def held_out(data: Images, b: int, sigma: float | Tensor, seed: int = 1) -> Batch:
    """Images that are not among the rows, with noise; sigma a number, or [b]."""
    g = torch.Generator().manual_seed(seed)
    y = images.values(data.held_out[torch.randperm(len(data.held_out), generator=g)[:b]])
    scale = sigma[:, None].float() if isinstance(sigma, Tensor) else sigma
    return y + scale * torch.randn(y.shape, generator=g), sigma


def noisy_rows(data: Images, b: int, sigma: float) -> Tensor:
    """[b, *shape]: some of the rows, with noise."""
    g = torch.Generator().manual_seed(4)
    y = data.rows[torch.randperm(len(data.rows), generator=g)[:b]]
    x = images.values(y)
    return (x + sigma * torch.randn(x.shape, generator=g)).reshape(y.shape)


def training(data: Images, b: int) -> list[Batch]:
    """Batches as EDM trains on, each query with its own noise level."""
    g = torch.Generator().manual_seed(3)
    mean, std = TRAINING
    draws = [torch.exp(mean + std * torch.randn(b, generator=g)).double() for _ in range(BATCHES)]
    return [held_out(data, b, sigma, seed) for seed, sigma in enumerate(draws)]


def batches(case: Case, data: Images) -> list[Batch]:
    if case.op == "training":
        return training(data, case.b)
    if case.op == "pruned-rows":
        return [(noisy_rows(data, case.b, case.sigma).flatten(1), case.sigma)]
    path = trajectory(data, case.b) if case.op in ("trajectory", "pruned-path") else []
    if case.op == "trajectory":
        return path
    if case.op == "pruned-path":  # the level next to the one asked for
        return [min(path, key=lambda q: abs(math.log(float(q[1]) / case.sigma)))]
    return [held_out(data, case.b, case.sigma)]


def truth(batch: Batch, rows: Tensor) -> Tensor:
    """The mean in float64 for some of the queries."""
    x, sigma = (some(v) if isinstance(v, Tensor) else v for v in batch)
    assert isinstance(x, Tensor)
    s = sigma.unsqueeze(1) if isinstance(sigma, Tensor) else sigma
    return peers.reference(x, rows, s)


def some(x: Tensor) -> Tensor:
    return x[torch.linspace(0, len(x) - 1, min(len(x), CHECKED)).long()]


def maker(case: Case, data: Images) -> Make:
    """What makes the runs of a case on these images."""
    data = enlarged(data, case.n) if case.n else data
    asked = batches(case, data)
    values = images.values(data.rows)
    right = torch.cat([truth(batch, values) for batch in asked])
    shape = data.rows.shape[1:]

    def ours(rows: memokern.TrainingSet, method: str) -> Tensor:
        found = [memokern.denoise(x.reshape(-1, *shape), rows, s, method=method) for x, s in asked]
        return torch.cat([some(mean).flatten(1) for mean in found])

    def build() -> Tensor:
        return ours(memokern.TrainingSet(data.rows).build_index(progress=False), "pruned")

    def make(name: str) -> Run:
        if name == OURS and case.op == "index":
            return Run(build, right, checked=len(right))
        if name in METHODS:
            rows, method = prepared(data), METHODS[name]
            return Run(lambda: ours(rows, method), right, checked=len(right))
        mean = peers.MEAN[name](values)
        called = [(x, s[:, None].float() if isinstance(s, Tensor) else s) for x, s in asked]
        return Run(
            lambda: torch.cat([some(mean(x, s)) for x, s in called]), right, checked=len(right)
        )

    return make
