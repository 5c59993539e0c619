"""From a case to what is timed in it: for each name a call, and how wrong its result is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import memokern
from bench import peers
from bench.cases import DTYPES, OURS, Case, K, queries
from memokern.data.storage import UINT8_SCALE, UINT8_SHIFT

CHECKED = 4  # queries compared with the float64 reference, which is slow


@dataclass
class Run:
    """before() is called, untimed, ahead of each call."""

    call: Callable[[], Tensor]
    truth: Tensor  # of the checked queries
    before: Callable[[], object] = lambda: None
    itemsize: int = 4  # bytes of a stored number
    checked: int = CHECKED  # results that the truth is of, spread evenly

    def error(self, got: Tensor) -> float:
        """The largest difference from the truth over the largest true value; inf for NaN."""
        difference = float((_checked(got, self.checked).double() - self.truth).abs().max())
        return difference / float(self.truth.abs().max()) if math.isfinite(difference) else math.inf


Make = Callable[[str], Run]


def _checked(x: Tensor, count: int = CHECKED) -> Tensor:
    return x[torch.linspace(0, len(x) - 1, min(len(x), count)).long()]


def _mean(case: Case, rows: Tensor) -> Make:
    x = queries(rows, case.b, case.noise)
    truth = peers.reference(_checked(x), rows, case.noise)

    def make(name: str) -> Run:
        mean = peers.MEAN[name](rows)
        return Run(lambda: mean(x, case.noise), truth)

    return make


def _posterior(case: Case, rows: Tensor) -> Make:
    """All the sums of a sweep; beside it the call that returns the mean alone."""
    x = queries(rows, case.b, case.noise)
    truth = peers.reference(_checked(x), rows, case.noise)
    data = memokern.TrainingSet(rows)
    _ = data.sq_norms

    def make(name: str) -> Run:
        if name == "denoise":
            return Run(lambda: memokern.denoise(x, data, case.noise), truth)
        return Run(lambda: memokern.posterior(x, data, case.noise).mean, truth)

    return make


def _condition(case: Case, rows: Tensor) -> Make:
    """Queries that each have a condition of 4 numbers, which thousands of rows share; beside it the
    sweep without conditions, a call for each query, and the formula with its N x B matrices."""
    x, h, sigma = queries(rows, case.b, case.noise), 1.0, case.noise
    conditions = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(1))
    data = memokern.TrainingSet(rows, conditions=conditions)
    c, norms = conditions[: case.b] + 0.1, rows.square().sum(1)
    _ = data.sq_norms
    gaps = peers.squares(_checked(c), conditions) / (2 * h**2)
    weights = (-peers.squares(_checked(x), rows) / (2 * sigma**2) - gaps).softmax(1)
    truth = sum(
        w @ y.double() for w, y in zip(weights.split(2048, 1), rows.split(2048), strict=True)
    )

    def mean(at: slice) -> Tensor:
        return memokern.posterior(x[at], data, sigma, condition=c[at], bandwidth=h).mean

    def in_torch() -> Tensor:
        distance = x.square().sum(1, keepdim=True) + norms - 2 * x @ rows.T
        gap = torch.cdist(c, conditions).square()
        return (-distance / (2 * sigma**2) - gap / (2 * h**2)).softmax(1) @ rows

    def make(name: str) -> Run:
        if name == "unconditional":
            plain = peers.reference(_checked(x), rows, sigma)
            return Run(lambda: memokern.posterior(x, data, sigma).mean, plain)
        each = [slice(i, i + 1) for i in range(case.b)]
        calls = {
            OURS: lambda: mean(slice(None)),
            "one by one": lambda: torch.cat([mean(at) for at in each]),
            "in torch": in_torch,
        }
        return Run(calls[name], truth)

    return make


def _threads(case: Case, rows: Tensor) -> Make:
    x = queries(rows, case.b, case.noise)
    truth = peers.reference(_checked(x), rows, case.noise)
    mean = peers.MEAN[OURS](rows)

    def make(name: str) -> Run:
        count = int(name.split()[0])
        return Run(lambda: mean(x, case.noise), truth, lambda: torch.set_num_threads(count))

    return make


def _types(case: Case, rows: Tensor) -> Make:
    """rows: uint8; the same values in other types."""

    def make(name: str) -> Run:
        stored = rows
        if name != "uint8":
            stored = torch.empty(rows.shape, dtype=DTYPES[name])
            for out, part in zip(stored.split(4096), rows.split(4096), strict=True):
                out.copy_(part.float().mul_(UINT8_SCALE).add_(UINT8_SHIFT))
        data = memokern.TrainingSet(stored)
        _ = data.sq_norms
        values = data.dequantize(data.rows)
        x = queries(values, case.b, case.noise)
        truth = peers.reference(_checked(x), values, case.noise)
        return Run(lambda: memokern.denoise(x, data, case.noise), truth, itemsize=stored.itemsize)

    return make


def _backward(case: Case, rows: Tensor) -> Make:
    """The backward alone, through autograd; beside it our forward."""
    x = queries(rows, case.b, case.noise)
    grad = torch.randn_like(x)

    def make(name: str) -> Run:
        if name == "forward":
            mean = peers.MEAN[OURS](rows)
            truth = peers.reference(_checked(x), rows, case.noise)
            return Run(lambda: mean(x, case.noise), truth)
        leaf = x.clone().requires_grad_()
        value = peers.MEAN[name](rows)(leaf, case.noise)
        truth = peers.reference(_checked(x), rows, case.noise, _checked(grad))
        return Run(lambda: torch.autograd.grad(value, leaf, grad, retain_graph=True)[0], truth)

    return make


def _nearest(case: Case, rows: Tensor) -> Make:
    x = queries(rows, case.b, case.noise)
    truth = peers.squares(_checked(x), rows).topk(K, largest=False).values.sqrt()

    def make(name: str) -> Run:
        search = peers.NEAREST[name](rows)
        return Run(lambda: search(x, K), truth)

    return make


_MAKERS = {
    "mean": _mean,
    "posterior": _posterior,
    "threads": _threads,
    "types": _types,
    "backward": _backward,
    "condition": _condition,
    "nearest": _nearest,
}


def maker(case: Case, rows: Tensor) -> Make:
    """What makes the runs of a case on such rows."""
    return _MAKERS[case.op](case, rows)


def build(case: Case, make: Make, skipped: dict[str, str]) -> tuple[dict[str, Run], dict]:
    """The runs of a case that can run here, each called once: (runs, errors). The reasons of the
    others go to `skipped`."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name in case.runs:
        why = peers.missing(name)
        if why:
            skipped[name] = why
            continue
        try:
            run = make(name)
            run.before()
            errors[name] = run.error(run.call())
            runs[name] = run
        except Exception as error:  # a peer's failure is a finding, ours is not
            if name not in peers.ALL or name == OURS:
                raise
            skipped[f"{name} in {case.name}"] = peers.reason(error)
    return runs, errors
