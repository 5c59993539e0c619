"""The peers on a GPU: what else computes the same in PyTorch. They know float32 rows only."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from bench import peers
from tools.gpu_check.makers import Call, K, Made
from tools.gpu_check.rates import tf32
from tools.gpu_check.stand_in import is_gpu

KEOPS_DIM, FLEX_DIM = 100, 256  # features that they are made for
# A peer's rows in float32, with what it makes of them, may take this share of the memory.
SHARE = 1 / 8


def names_of(operation: str, d: int, compiled: bool) -> tuple[str, ...]:
    """The peers that such a problem is for, of those that are installed. compiled: those that
    PyTorch's compiler makes."""
    names: tuple[str, ...] = ("cached", "cached tf32", "sdpa")
    if compiled:
        names = ("compile", "flex") if d <= FLEX_DIM else ("compile",)
    elif operation == "nearest":
        names = ("cdist", "products", "faiss")
    elif operation == "rows' gradient":
        names = ("naive",)
    elif operation == "mean" and d <= KEOPS_DIM:
        names += ("keops",)
    return tuple(name for name in names if peers.missing(name) is None)


def flex(rows: Tensor) -> peers.Mean:
    """flex_attention, with the norms as a change of the scores."""
    attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    half, run = rows.square().sum(1) / 2, torch.compile(attention)
    keys = rows[None, None]

    def mean(x: Tensor, s: float) -> Tensor:
        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
            return score - half[n] / s**2

        return run(x[None, None], keys, keys, score_mod=change, scale=1 / s**2)[0, 0]

    return mean


def _mean_of(name: str, rows: Tensor) -> peers.Mean:
    if name == "flex":
        return flex(rows)
    if name != "cached tf32":
        return peers.MEAN[name](rows)
    mean = peers.MEAN["cached"](rows)

    def rounded(x: Tensor, s: float) -> Tensor:
        with tf32(True):
            return mean(x, s)

    return rounded


def _faiss(rows: Tensor) -> Callable[[Tensor], Tensor]:
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "GpuIndexFlatL2"):
        raise RuntimeError("this faiss is built for the CPU only")
    importlib.import_module("faiss.contrib.torch_utils")
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), rows.shape[1])
    index.add(rows)
    return lambda x: index.search(x, K)[0].clamp(min=0.0).sqrt()


def _nearest_of(name: str, rows: Tensor) -> Callable[[Tensor], Tensor]:
    if name == "faiss":
        return _faiss(rows)
    if name == "cdist":
        return lambda x: torch.cdist(x, rows).topk(K, largest=False).values
    sq = rows.square().sum(1)

    def products(x: Tensor) -> Tensor:
        least = (sq - 2 * x @ rows.T).topk(K, largest=False).values
        return (least + x.square().sum(1, keepdim=True)).clamp(min=0.0).sqrt()

    return products


def call_of(name: str, made: Made, values: Tensor) -> Call:
    """A peer's call on the same problem; raises where it cannot run here."""
    operation, x, sigma, grad = made.problem.operation, made.x, made.sigma, made.grad
    if operation == "nearest":
        search = _nearest_of(name, values)
        return lambda: search(x)
    if operation == "rows' gradient":
        leaf = values.clone().requires_grad_()
        value = peers.naive(x, leaf, sigma)
        return lambda: torch.autograd.grad(value, leaf, grad, retain_graph=True)[0]
    mean = _mean_of(name, values)
    if operation != "backward":
        return lambda: mean(x, sigma)
    leaf = x.clone().requires_grad_()
    value = mean(leaf, sigma)

    def back() -> Tensor:
        with tf32(name == "cached tf32"):
            return torch.autograd.grad(value, leaf, grad, retain_graph=True)[0]

    return back


def too_large(made: Made, device: torch.device) -> str | None:
    """Why the peers' rows would not fit, or None."""
    if not is_gpu(device):
        return None
    size = 4 * made.data.rows.numel()
    if size <= SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    return f"its float32 rows would take {size / 2**30:.0f} GiB"
