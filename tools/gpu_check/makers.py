"""From a problem to what is timed in it: our calls, and the truth for some of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import memokern
from bench import images
from bench.cases import queries
from memokern.backends import protocol
from memokern.backends.protocol import Call as Asked
from memokern.calls import Query
from tools.gpu_check import truth
from tools.gpu_check.steps import Problem
from tools.gpu_check.truth import Given

F64 = torch.float64
OURS = "memokern"
CUDA = "memokern, CUDA"  # beside Triton's, where the CUDA backend takes the call
CHECKED = 4  # queries compared with float64
ROWS_CHECKED = 64  # rows of a gradient for the rows
K = 2  # neighbours
# Errors of ours that are allowed, relative to the largest true number.
TOLERANCE = {
    "mean": 1e-5,
    "pruned": 1e-5,
    "nearest": 1e-6,
    "backward": 1e-4,
    "rows' gradient": 1e-4,
}

Call = Callable[[], Tensor]


@dataclasses.dataclass
class Made:
    """calls: ours, by name. truth: of the first results. data, x, sigma, grad: for the peers."""

    problem: Problem
    calls: dict[str, Call]
    truth: Tensor
    data: memokern.TrainingSet
    x: Tensor
    sigma: float
    grad: Tensor
    tolerance: float

    @property
    def bytes(self) -> int:
        """Of the rows as they are stored."""
        return self.data.rows.numel() * self.data.rows.element_size()

    @property
    def operations(self) -> float:
        """Of the formula: two products, or one for the nearest rows; a gradient counts as much."""
        p = self.problem
        return (2.0 if p.operation == "nearest" else 4.0) * p.b * p.n * p.d

    def error(self, got: Tensor) -> float:
        """Relative to the largest true number; inf for NaN."""
        off = (got[: len(self.truth)].to(F64) - self.truth).abs().max() / self.truth.abs().max()
        return float(off) if math.isfinite(off) else math.inf

    def values(self) -> Tensor:
        """The rows as float32, which is what the peers know."""
        return self.data.dequantize(self.data.rows).float()


def _stored(p: Problem, device: torch.device) -> memokern.TrainingSet:
    """Random rows of a type, made on the device."""
    torch.manual_seed(0)
    kind = getattr(torch, p.rows)
    if kind == torch.uint8:
        rows = torch.randint(0, 256, (p.n, p.d), dtype=kind, device=device)
    else:
        rows = torch.randn(p.n, p.d, device=device).to(kind)
    return memokern.TrainingSet(rows, check=False)


def _photos(p: Problem, device: torch.device) -> tuple[memokern.TrainingSet, Tensor]:
    """Images with an index, and noisy ones that are not among them."""
    step = images.SIDE // math.isqrt(p.d // 3)
    found = images.load(None, quick=p.n < 3000)
    rows = images.augmented(found.rows, p.n)[:, :, ::step, ::step].contiguous().to(device)
    data = memokern.TrainingSet(rows, check=False).build_index(progress=False)
    y = images.values(found.held_out[: p.b, :, ::step, ::step])
    g = torch.Generator().manual_seed(1)
    sigma = p.sigma or 1.0
    return data, (y + sigma * torch.randn(y.shape, generator=g)).to(device)


def _given(x: Tensor, data: memokern.TrainingSet, sigma: float) -> Given:
    one = torch.ones(len(x), dtype=F64, device=x.device)
    bias = torch.zeros(data.n, dtype=F64, device=x.device)
    return Given(x.to(F64), data.rows, data.scale, data.shift, sigma * one, one, one, bias)


def make(p: Problem, device: torch.device) -> Made:
    """The rows, the queries, the truth and our calls."""
    if p.operation == "pruned":
        data, x = _photos(p, device)
        sigma = p.sigma or 1.0
    else:
        data = _stored(p, device)
        # At this noise thousands of rows share the weight, and no peer's result is lost.
        sigma = p.sigma or math.sqrt(p.d) / 2
        head = data.dequantize(data.rows[: max(p.b, 1000)]).float().cpu()
        x = queries(head, p.b, sigma).to(device)
    _ = data.sq_norms, data.center  # kept between calls
    grad = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(2), device=device)
    tolerance = TOLERANCE[p.operation]
    if p.operation == "rows' gradient":
        tolerance += torch.finfo(data.rows.dtype).eps
    made = Made(p, {}, x, data, x, sigma, grad, tolerance)
    made.calls, made.truth = _MAKERS[p.operation](made)
    return made


Ours = tuple[dict[str, Call], Tensor]


def _mean(made: Made) -> Ours:
    x, data, sigma = made.x, made.data, made.sigma
    given = _given(x[:CHECKED], data, sigma)
    calls: dict[str, Call] = {OURS: lambda: memokern.denoise(x, data, sigma)}
    cuda = protocol.get("cuda")
    if cuda.refusal("posterior", Asked.of(x, data.rows)) is None:
        one = torch.ones(len(x), dtype=F64, device=x.device)
        query, rows = Query(x, sigma * one, one, one), data.as_rows()
        calls[CUDA] = lambda: cuda.posterior(query, rows).mean
    return calls, truth.sums(given)[0]


def _nearest(made: Made) -> Ours:
    x, data = made.x, made.data
    r = truth.squares(_given(x[:CHECKED], data, 1.0)).sqrt()
    want = r.topk(K, largest=False, sorted=True).values
    return {OURS: lambda: memokern.nearest(x, data, K).distance}, want


def _pruned(made: Made) -> Ours:
    """Ours as it chooses by itself, and told which way."""
    data, sigma = made.data, made.sigma
    x = made.x.reshape(-1, *data.shape)
    calls: dict[str, Call] = {
        name: lambda method=method: memokern.denoise(x, data, sigma, method=method).flatten(1)
        for name, method in ((OURS, "auto"), ("pruned", "pruned"), ("dense", "dense"))
    }
    return calls, truth.sums(_given(made.x[:CHECKED], data, sigma))[0]


def _backward(made: Made) -> Ours:
    """The gradient for the queries alone; beside it our forward."""
    data, sigma, grad = made.data, made.sigma, made.grad
    leaf = made.x.clone().requires_grad_()
    value = memokern.denoise(leaf, data, sigma)
    some = made.x[:CHECKED].to(F64).requires_grad_()
    mean = truth.sums(_given(some, data, sigma)._replace(x=some))[0]
    (want,) = torch.autograd.grad(mean, some, grad[:CHECKED].to(F64))
    calls: dict[str, Call] = {
        OURS: lambda: torch.autograd.grad(value, leaf, grad, retain_graph=True)[0]
    }
    return calls, want


def _rows_gradient(made: Made) -> Ours:
    """The gradient for the rows alone."""
    leaf = made.data.rows.clone().requires_grad_()
    value = memokern.denoise(made.x, leaf, made.sigma)
    given = _given(made.x, made.data, made.sigma)
    want = truth.rows_gradient(given, made.grad.to(F64), ROWS_CHECKED)
    calls: dict[str, Call] = {
        OURS: lambda: torch.autograd.grad(value, leaf, made.grad, retain_graph=True)[0]
    }
    return calls, want


_MAKERS: dict[str, Callable[[Made], Ours]] = {
    "mean": _mean,
    "nearest": _nearest,
    "pruned": _pruned,
    "backward": _backward,
    "rows' gradient": _rows_gradient,
}


def graph(call: Call) -> Call:
    """The same in a CUDA graph, whose launches cost nothing."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    captured: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = call()

    def replay() -> Tensor:
        captured.replay()
        return out

    return replay
