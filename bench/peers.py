"""What memokern is compared with.

`MEAN`: each prepares, untimed, what may be kept between calls, and returns a function
(x [B, D], sigma) -> mean [B, D]. `NEAREST`: the same, returning (x, k) -> distances [B, k].
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import memokern

Mean = Callable[[Tensor, Any], Tensor]  # sigma: a float; for some of them, also [B, 1]


def _memokern(rows: Tensor) -> Mean:
    data = memokern.TrainingSet(rows)
    _ = data.sq_norms, data.center  # cached once, as `cached` and `sdpa` cache their norms
    return lambda x, sigma: memokern.denoise(x, data, sigma)


def _cached(rows: Tensor) -> Mean:
    half = rows.square().sum(1) / 2
    return lambda x, s: torch.softmax((x @ rows.T - half) / s**2, 1) @ rows


def naive(x: Tensor, rows: Tensor, sigma: float) -> Tensor:
    """Products, norms on each call: what most code does."""
    r2 = x.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * x @ rows.T
    return torch.softmax(-r2 / (2 * sigma**2), 1) @ rows


def _cdist(rows: Tensor) -> Mean:
    return lambda x, s: torch.softmax(-torch.cdist(x, rows).square() / (2 * s**2), 1) @ rows


def _sdpa(rows: Tensor) -> Mean:
    half = rows.square().sum(1) / 2

    def run(x: Tensor, s: float | Tensor) -> Tensor:
        mask = (-half / s**2).expand(1, 1, len(x), -1)
        if isinstance(s, Tensor):  # [B, 1]: the scale is one for all
            x, s = x / s**2, 1.0
        y = rows[None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            x[None, None], y, y, attn_mask=mask, scale=1 / s**2
        )[0, 0]

    return run


def _compiled(rows: Tensor) -> Mean:
    run = torch.compile(naive)
    return lambda x, s: run(x, rows, s)


def _smalldiffusion() -> ModuleType:
    """smalldiffusion/model.py by itself: the package's own import wants torchvision, which would
    bring another torch, and the denoiser uses none of it."""
    package = importlib.util.find_spec("smalldiffusion")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'smalldiffusion'")
    path = Path(package.submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location("smalldiffusion_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ideal(rows: Tensor) -> Mean:
    model = _smalldiffusion().IdealDenoiser(rows)  # it asks a data set for len() and items only
    return lambda x, s: x - s * model(x, torch.tensor(s, dtype=x.dtype))


def _keops(rows: Tensor) -> Mean:
    lazy = importlib.import_module("pykeops.torch").LazyTensor
    y = lazy(rows[None].contiguous())

    def run(x: Tensor, s: float) -> Tensor:
        r2 = ((lazy(x[:, None].contiguous()) - y) ** 2).sum(-1)
        return (-r2 / (2 * s**2)).sumsoftmaxweight(y, dim=1)

    return run


def _memokern_nearest(rows: Tensor) -> Callable[[Tensor, int], Tensor]:
    data = memokern.TrainingSet(rows)
    _ = data.sq_norms, data.center
    return lambda x, k: memokern.nearest(x, data, k).distance


def _faiss(rows: Tensor) -> Callable[[Tensor, int], Tensor]:
    faiss = importlib.import_module("faiss")
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows.numpy())

    def run(x: Tensor, k: int) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return torch.from_numpy(index.search(x.numpy(), k)[0]).sqrt()

    return run


MEAN: dict[str, Callable[[Tensor], Mean]] = {
    "memokern": _memokern,
    "cached": _cached,
    "naive": lambda rows: lambda x, s: naive(x, rows, s),
    "cdist": _cdist,
    "sdpa": _sdpa,
    "compile": _compiled,
    "ideal": _ideal,
    "keops": _keops,
}
NEAREST = {"memokern": _memokern_nearest, "faiss": _faiss}
ALL = {*MEAN, *NEAREST, "in torch"}
LIBRARY: dict[str, Callable[[], object]] = {
    "ideal": _smalldiffusion,
    "keops": lambda: importlib.import_module("pykeops.torch"),
    "faiss": lambda: importlib.import_module("faiss"),
}


@functools.cache
def missing(name: str) -> str | None:
    """None, or one line: why this peer cannot run here (`make peers` installs them)."""
    try:
        LIBRARY.get(name, lambda: None)()
    except Exception as error:  # an optional library may fail at import in any way
        return reason(error)
    return None


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


def squares(x: Tensor, rows: Tensor, chunk: int = 2048) -> Tensor:
    """[B, N] float64 squared distances by direct differences, a chunk of rows at a time."""
    x = x.double()
    mode = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(x, y.double(), compute_mode=mode).square() for y in rows.split(chunk)]
    return torch.cat(parts, 1)


def reference(
    x: Tensor, rows: Tensor, sigma: Any, grad: Tensor | None = None, chunk: int = 2048
) -> Tensor:
    """The mean in float64 by direct differences (sigma a float, or [B, 1]); with grad [B, D], the
    gradient for x of <grad, mean>: sum w (y - mean) <y - mean, grad> / sigma^2."""
    w = torch.softmax(-squares(x, rows, chunk) / (2 * sigma**2), 1).split(chunk, 1)
    parts = list(zip(w, rows.split(chunk), strict=True))
    zero = torch.zeros(x.shape, dtype=torch.float64)
    mean = sum((a @ y.double() for a, y in parts), zero)
    if grad is None:
        return mean
    for a, y in parts:
        along = (grad.double()[:, None] * (y.double() - mean[:, None])).sum(2)
        zero += (a * along) @ y.double() - (a * along).sum(1, keepdim=True) * mean
    return zero / sigma**2
