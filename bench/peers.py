"""What memokern is compared with: each a function (x [B, D], rows [N, D], sigma) -> mean [B, D]."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import memokern


class Peer(NamedTuple):
    """`prepare(rows)` does, untimed, what may be kept between calls; None where it can't run."""

    prepare: Callable[[Tensor], Callable[[Tensor, float], Tensor]]
    skip: str | None = None


def _memokern(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    data = memokern.TrainingSet(rows)
    _ = data.sq_norms, data.center  # cached once, as `cached` and `sdpa` cache their norms
    return lambda x, sigma: memokern.denoise(x, data, sigma)


def _cached(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    half = rows.square().sum(1) / 2
    return lambda x, s: torch.softmax((x @ rows.T - half) / s**2, 1) @ rows


def naive(x: Tensor, rows: Tensor, sigma: float) -> Tensor:
    """Products, norms on each call: what most code does."""
    r2 = x.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * x @ rows.T
    return torch.softmax(-r2 / (2 * sigma**2), 1) @ rows


def _cdist(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    return lambda x, s: torch.softmax(-torch.cdist(x, rows).square() / (2 * s**2), 1) @ rows


def _sdpa(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    half = rows.square().sum(1) / 2

    def run(x: Tensor, s: float) -> Tensor:
        mask = (-half / s**2).expand(1, 1, len(x), -1)
        y = rows[None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            x[None, None], y, y, attn_mask=mask, scale=1 / s**2
        )[0, 0]

    return run


def _compiled(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    run = torch.compile(naive)
    return lambda x, s: run(x, rows, s)


def _ideal(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    # it asks its data set for len() and items only
    model = importlib.import_module("smalldiffusion").IdealDenoiser(list(rows))
    return lambda x, s: x - s * model(x, torch.tensor(s, dtype=x.dtype))


def _keops(rows: Tensor) -> Callable[[Tensor, float], Tensor]:
    lazy = importlib.import_module("pykeops.torch").LazyTensor
    y = lazy(rows[None].contiguous())

    def run(x: Tensor, s: float) -> Tensor:
        r2 = ((lazy(x[:, None].contiguous()) - y) ** 2).sum(-1)
        return (-r2 / (2 * s**2)).sumsoftmaxweight(y, dim=1)

    return run


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # an optional library may fail at import in any way
        return f"{module}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


PREPARE: dict[str, Callable[[Tensor], Callable[[Tensor, float], Tensor]]] = {
    "memokern": _memokern,
    "cached": _cached,
    "naive": lambda rows: lambda x, s: naive(x, rows, s),
    "cdist": _cdist,
    "sdpa": _sdpa,
    "compile": _compiled,
    "ideal": _ideal,
    "keops": _keops,
}
LIBRARY = {"ideal": "smalldiffusion", "keops": "pykeops.torch"}


@functools.cache
def available() -> dict[str, Peer]:
    """All of them, with the one-line reason where one cannot run here."""
    return {
        name: Peer(prepare, _missing(LIBRARY[name]) if name in LIBRARY else None)
        for name, prepare in PREPARE.items()
    }


def reference(x: Tensor, rows: Tensor, sigma: float, chunk: int = 2048) -> Tensor:
    """The mean in float64 by direct differences, a chunk of rows at a time."""
    x = x.double()
    top = torch.full((len(x), 1), -torch.inf, dtype=torch.float64)
    total, mean = torch.zeros_like(top), torch.zeros_like(x)
    for y in rows.split(chunk):
        y = y.double()
        r2 = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        logits = -r2 / (2 * sigma**2)
        new = torch.maximum(top, logits.amax(1, keepdim=True))
        w, keep = torch.exp(logits - new), torch.exp(top - new)
        total, mean, top = total * keep + w.sum(1, keepdim=True), mean * keep + w @ y, new
    return mean / total
