"""Each operation once, against float64. What is allowed is the contract of the kernels' tests: a
mean right to 1e-5 of the largest value, other sums and gradients to 1e-4."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import memokern
from memokern import ops
from memokern.backends import protocol
from memokern.backends.protocol import Call
from memokern.calls import LogitBounds, Query, RowLists, Rows, Sums
from memokern.util import env
from tools.gpu_check import truth
from tools.gpu_check.steps import Smoke
from tools.gpu_check.truth import Compared, Given, compare

F64 = torch.float64
MEAN, STATISTICS, GRADIENT, DISTANCE = 1e-5, 1e-4, 1e-4, 1e-9
K = 3  # neighbours
EPS = 1e-6  # weight that a scan may leave out
FIELDS = Sums._fields


class Made:
    """A case's rows and queries, with the truth's view of both."""

    def __init__(self, case: Smoke, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.case = case
        kind = getattr(torch, case.rows)
        self.rows = _laid_out(_random(case, kind, g, device), case.layout)
        self.scale, self.shift = (2 / 255, -1.0) if kind == torch.uint8 else (1.0, 0.0)
        limit = case.sigma == 0
        sigma = math.sqrt(case.d) / 2 if case.sigma is None else case.sigma
        plain = limit or case.layout == "far"

        def column(value: float) -> Tensor:
            return torch.full((case.b,), value, dtype=F64, device=device)

        self.sigma = column(sigma)
        self.alpha, self.temperature = column(1.0 if plain else 0.9), column(1.0 if plain else 1.3)
        self.bias = torch.randn(case.n, dtype=F64, generator=g, device=device)
        # The last rows are those that a wrong offset misses.
        picks = case.n - 1 - torch.arange(case.b, device=device) * 7 % case.n
        y = self.rows[picks].to(F64) * self.scale + self.shift
        noise = torch.randn(case.b, case.d, dtype=F64, generator=g, device=device)
        self.x = (self.alpha[:, None] * y + (0.1 if limit else sigma) * noise).float()
        self.largest = float((self.rows[:4096].to(F64) * self.scale + self.shift).abs().max())

    def given(self) -> Given:
        """For the truth."""
        return Given(
            self.x.to(F64), self.rows, self.scale, self.shift, self.sigma, self.alpha,
            self.temperature, self.bias, self.case.weighting,
        )  # fmt: skip

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sigma, self.alpha, self.temperature

    def data(self) -> Any:
        """The rows as a data set, or as they lie in memory."""
        plain = self.case.layout != "strided"
        return memokern.TrainingSet(self.rows, check=False) if plain else self.rows

    def call(self) -> tuple[Query, Rows]:
        """For an operation."""
        query = Query(self.x, *self.columns, self.bias, self.case.weighting)
        return query, memokern.TrainingSet(self.rows, check=False).as_rows()

    def compared(self, got: Any, want: Any, names: tuple[str, ...] = FIELDS) -> list[Compared]:
        """Sums, with what each may be off by."""
        allowed = [
            MEAN * self.largest if not i or name == "residual" else STATISTICS * (1 + v.abs())
            for i, (name, v) in enumerate(zip(names, want, strict=True))
        ]
        rows = zip(names, got, want, allowed, strict=True)
        # At sigma = 0 logits are infinite, but for those of a row that is hit.
        skipped = ("log_z", "mean_logit") if self.case.sigma == 0 else ()
        return [compare(*row) for row in rows if row[0] not in skipped]


def _random(case: Smoke, kind: torch.dtype, g: torch.Generator, device: torch.device) -> Tensor:
    size = (case.n, case.d)
    if kind == torch.uint8:
        rows = torch.randint(0, 256, size, dtype=kind, generator=g, device=device)
    else:
        rows = torch.randn(size, generator=g, device=device).to(kind)
    if case.sigma is not None and case.layout == "plain" and case.n > 3:
        half = case.n // 2
        rows[half : 2 * half] = rows[:half].clone()  # ties
    return rows


def _laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same rows at an odd address, an odd number of numbers apart."""
    if layout != "strided":
        return rows
    n, d = rows.shape
    wide = torch.empty(n, d + 3 - d % 2, dtype=rows.dtype, device=rows.device)
    return wide[:, 1 : d + 1].copy_(rows)


def _sums(p: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(p, name) for name in FIELDS)


def _posterior(made: Made, precision: str = "auto") -> list[Compared]:
    weighting = made.case.weighting
    got = memokern.posterior(
        made.x, made.data(), *made.columns, bias=made.bias, weighting=weighting, method="dense",
        precision=precision,
    )  # fmt: skip
    return made.compared(_sums(got), truth.sums(made.given()))


def _state(made: Made) -> list[Compared]:
    """Two parts, swept on their own and merged."""
    cut, case = made.case.n // 3, made.case
    parts = [
        memokern.posterior_state(
            made.x, made.rows[part], *made.columns, bias=made.bias[part], weighting=case.weighting
        )
        for part in (slice(0, cut), slice(cut, None))
    ]
    got = memokern.merge(*parts).posterior()
    return made.compared(_sums(got), truth.sums(made.given()))


def _weighted(values: Any, seed: int) -> Tensor:
    """A sum over all outputs, of which gradients are taken."""
    g = torch.Generator(values[0].device).manual_seed(seed)
    total = values[0].new_zeros((), dtype=F64)
    for v in values:
        r = torch.randn(v.shape, dtype=F64, generator=g, device=v.device)
        total = total + (v.to(F64) * r).sum()
    return total


NAMES = ("x", "sigma", "alpha", "temperature", "bias")


def _leaves(made: Made) -> list[Tensor]:
    found = (made.x, made.sigma, made.alpha, made.temperature, made.bias)
    return [v.clone().requires_grad_() for v in found]


def _true_leaves(made: Made) -> tuple[list[Tensor], Given]:
    leaves = [v.detach().to(F64).requires_grad_() for v in _leaves(made)]
    x, sigma, alpha, temperature, bias = leaves
    given = made.given()._replace(x=x, sigma=sigma, alpha=alpha, temperature=temperature, bias=bias)
    return leaves, given


def _compared_gradients(got: Any, want: Any) -> list[Compared]:
    return [
        compare(f"gradient of {name}", g, w, GRADIENT * (float(w.abs().max()) + 1e-2))
        for name, g, w in zip(NAMES, got, want, strict=True)
    ]


def _gradients(made: Made) -> list[Compared]:
    leaves, (true, given) = _leaves(made), _true_leaves(made)
    x, *columns, bias = leaves
    got = memokern.posterior(
        x, made.data(), *columns, bias=bias, weighting=made.case.weighting, method="dense"
    )
    found = torch.autograd.grad(_weighted(_sums(got), 1), leaves)
    want = torch.autograd.grad(
        _weighted(truth.sums(given), 1), true, allow_unused=True, materialize_grads=True
    )  # the log weighting does not know sigma
    return _compared_gradients(found, want)


def _rows_gradient(made: Made) -> list[Compared]:
    rows = made.rows.clone().requires_grad_()
    wide = made.rows.to(F64).requires_grad_()
    got = memokern.posterior(
        made.x, rows, *made.columns, bias=made.bias, weighting=made.case.weighting
    )
    (found,) = torch.autograd.grad(_weighted(_sums(got), 2), rows)
    want = truth.sums(made.given()._replace(rows=wide))
    (true,) = torch.autograd.grad(_weighted(want, 2), wide)
    # As for the other gradients, and what a row's own type rounds.
    allowed = GRADIENT * true.abs().max() + torch.finfo(rows.dtype).eps * true.abs()
    return [compare("gradient of the rows", found, true, allowed)]


def _nearest(made: Made) -> list[Compared]:
    k = min(K, made.case.n)
    got = memokern.nearest(made.x, made.data(), k, method="dense")
    one = torch.ones_like(made.alpha)
    r = truth.squares(made.given()._replace(alpha=one)).sqrt()
    want = r.topk(k, largest=False, sorted=True).values
    # The rows that are named are at the distances that are named: ties may be in any order.
    named = r.gather(1, got.index)
    allowed = DISTANCE * (1 + want)
    return [
        compare("distance", got.distance, want, allowed),
        compare("distance of the rows named", named, want, allowed),
    ]


def _lists(made: Made) -> RowLists:
    """Ascending lists of several lengths, one of a single row."""
    n, b = made.case.n, made.case.b
    g = torch.Generator().manual_seed(3)
    counts = [1 + (37 * i) % max(1, min(n, 200)) for i in range(b)]
    picks = [torch.randperm(n, generator=g)[:count].sort().values for count in counts]
    device = made.x.device
    start = torch.tensor([0, *counts]).cumsum(0).to(device)
    return RowLists(start, torch.cat(picks).to(device))


def _listed(made: Made) -> list[Compared]:
    query, rows = made.call()
    lists = _lists(made)
    got = ops.posterior_listed(query, rows, lists)
    return made.compared(got, truth.listed_sums(made.given(), *lists))


def _listed_gradients(made: Made) -> list[Compared]:
    _, rows = made.call()
    lists, leaves, (true, given) = _lists(made), _leaves(made), _true_leaves(made)
    got = ops.posterior_listed(Query(*leaves), rows, lists)
    found = torch.autograd.grad(_weighted(got, 1), leaves)
    want = _weighted(truth.listed_sums(given, *lists), 1)
    return _compared_gradients(found, torch.autograd.grad(want, true))


def _indexed(made: Made) -> memokern.TrainingSet:
    """The rows with an index of each kind: that of images, or for float32 rows that of any rows."""
    n, d = made.rows.shape
    is_image = d % 30 == 0 and made.case.rows != "float32"
    rows = made.rows.reshape(n, 3, 10, d // 30) if is_image else made.rows
    return memokern.TrainingSet(rows, check=False).build_index(progress=False)


def _near(made: Made) -> Made:
    """The same with so little noise that few rows have weight."""
    made.sigma = torch.full_like(made.sigma, 0.3)
    g = torch.Generator(made.x.device).manual_seed(4)
    y = made.rows[: made.case.b].to(F64) * made.scale + made.shift
    noise = torch.randn(y.shape, dtype=F64, generator=g, device=y.device)
    made.x = (made.alpha[:, None] * y + 0.3 * noise).float()
    return made


def _bound_scan(made: Made) -> list[Compared]:
    """What is left out is below the threshold, and weighs together less than was allowed."""
    made = _near(made)
    data = _indexed(made)
    index = data.index
    assert index is not None
    query = Query(made.x, *made.columns, made.bias)
    p = index.project(query.x, query.alpha)
    bounds = LogitBounds(
        index.coarse, index.fine, p.z, p.norms, p.margin, p.sq, index.dims, index.first_band, EPS,
        made.case.n,
    )  # fmt: skip
    scan = ops.bound_scan(query, data.as_rows(), bounds)
    t = truth.logits(made.given()) / made.temperature[:, None]
    left = t.clone()
    counts = scan.lists.start.diff()
    queries = torch.arange(len(counts), device=t.device).repeat_interleave(counts)
    left[queries, scan.lists.index] = -torch.inf
    over = (left.amax(1) - scan.threshold).clamp(min=0.0)
    weight = made.case.n * torch.exp(scan.threshold - torch.logsumexp(t, 1))
    none = torch.zeros_like(over)
    useless = ((scan.level == 0) | (counts >= made.case.n)).double()
    return [
        compare("logit above the threshold", over, none, 1e-9 * (1 + t.abs().amax(1))),
        compare("weight left out", weight.clamp(max=EPS), weight, 1e-3 * EPS),
        compare("queries of which no row was left out", useless, none, 0.0),
    ]


def _pruned(made: Made) -> list[Compared]:
    made = _near(made)
    data = _indexed(made)
    got = memokern.posterior(
        made.x.reshape(-1, *data.shape), data, *made.columns, bias=made.bias, method="pruned",
        certificate=True,
    )  # fmt: skip
    assert got.certificate is not None
    kept = got.certificate.rows_kept.double()
    everything = (kept >= made.case.n).double()
    mean, *rest = _sums(got)
    return [
        *made.compared((mean.flatten(1), *rest), truth.sums(made.given())),
        compare("queries of which no row was left out", everything, torch.zeros_like(kept), 0.0),
    ]


CHECKS: dict[str, Callable[[Made], list[Compared]]] = {
    "posterior": _posterior,
    "posterior ieee": lambda made: _posterior(made, "ieee"),
    "state": _state,
    "gradients": _gradients,
    "rows' gradient": _rows_gradient,
    "nearest": _nearest,
    "listed": _listed,
    "listed gradients": _listed_gradients,
    "bound_scan": _bound_scan,
    "pruned": _pruned,
}


# What each check asks a backend for.
ASKED = {
    "posterior": ("posterior",),
    "state": ("posterior_state",),
    "gradients": ("posterior", "posterior_backward"),
    "nearest": ("nearest",),
    "listed": ("posterior_listed",),
    "listed gradients": ("posterior_listed", "posterior_listed_backward"),
    "bound_scan": ("bound_scan",),
}


def skipped(case: Smoke, device: torch.device) -> str | None:
    """Why the backend that the case names does not run it here, or None."""
    if not case.backend:
        return None
    kind = getattr(torch, case.rows)
    call = Call(device.type, torch.float32, kind, case.b, case.n, case.d)
    asked = (protocol.get(case.backend).refusal(name, call) for name in ASKED[case.operation])
    return next((reason for reason in asked if reason is not None), None)


@contextlib.contextmanager
def named(backend: str) -> Iterator[None]:
    """The backend is asked for, if there is one named."""
    if not backend:
        yield
        return
    with mock.patch.dict(os.environ, {env.BACKEND: backend}):
        yield


def check(case: Smoke, device: torch.device) -> Compared:
    """What is furthest off."""
    grad = torch.no_grad() if "gradient" not in case.operation else torch.enable_grad()
    with grad, named(case.backend):
        return truth.worst(CHECKS[case.operation](Made(case, device)))
