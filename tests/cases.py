"""The problems that operations are tested on: one table, sized for what runs it.

A :class:`Case` says everything about a problem and makes it from a seed. The tables below are
functions of the backend's name: all of them have the same kinds of cases, and Triton's are smaller,
because its interpreter takes some 5 ms for each step of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memokern.calls import BasicSums, Condition, Gradients, Query, RowLists, Rows, Sums
from tests import oracle

F32, F64 = torch.float32, torch.float64
BF16, F16, U8 = torch.bfloat16, torch.float16, torch.uint8
ROW_TYPES = (F64, F32, BF16, F16, U8)
UINT8_UNIT = (2 / 255, -1.0)
# One lane more and one less than every width of vectors and tiles, and single ones.
TAILS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63)
# Of features, where cheap: one column, one block and one more, many.
WIDTHS = (2, 64, 257, 3072)

# Whose kernels run on an interpreter or an emulator, step by step.
EMULATED = ("triton", "cuda")


def row_types(backend: str) -> tuple[torch.dtype, ...]:
    """Those that the backend has kernels for, with float32 queries."""
    return ROW_TYPES[1:] if backend in EMULATED else ROW_TYPES


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers, drawn in this type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(value: float | Tensor, b: int) -> Tensor:
    """A number for each query."""
    return torch.as_tensor(value, dtype=F64).expand(b).clone()


def query_of(
    x: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    weighting: str = "gaussian",
) -> Query:
    """Queries that share these numbers, or have one each."""
    columns = (column(v, len(x)) for v in (sigma, alpha, temperature))
    return Query(x, *columns, bias, weighting)


def with_norms(rows: Rows) -> Rows:
    """The rows with their center and the squared norms about it, as a training set keeps them."""
    y = oracle.values(rows)
    center = y.mean(0).to(F64 if rows.data.dtype == F64 else F32)
    return rows._replace(center=center, sq_norms=(y - center.to(F64)).square().sum(1))


def far_apart(rows: Rows, device: torch.device | str = "cpu") -> Rows:
    """The same rows, 2^30 elements apart: memory of which a page for each is touched. The fourth
    lies beyond 2^31."""
    (n, d), stride = rows.data.shape, 1 << 30
    memory = torch.empty(stride * (n - 1) + d, dtype=rows.data.dtype, device=device)
    return rows._replace(data=memory.as_strided((n, d), (stride, 1)).copy_(rows.data))


@dataclass(frozen=True)
class Case:
    """Queries alpha y + sigma z around some of the rows.

    offset: added to every row. repeat: the second half are copies of the first row, off by that
    much. bias: None; "normal"; "holes": every third row is left out; "hole": one is. known: the
    center and norms are given. own: what differs from query to query: None; "condition", of 3
    numbers and bandwidth h; "left-out", a row, and none for every fourth query; "both".
    """

    b: int
    n: int
    d: int
    rows: torch.dtype = F32
    x: torch.dtype = F32
    sigma: float = 0.5
    alpha: float = 1.0
    temperature: float = 1.0
    bias: str | None = None
    weighting: str = "gaussian"
    known: bool = False
    offset: float = 0.0
    repeat: float | None = None
    own: str | None = None
    h: float = 0.8
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.b}x{self.n}x{self.d}", name_of(self.rows)]
        words += ["x64"] if self.x == F64 else []
        words += [f"sigma{self.sigma:g}", f"alpha{self.alpha:g}"]
        words += [f"T{self.temperature:g}"] if self.temperature != 1 else []
        words += [self.bias] if self.bias else []
        words += [self.weighting] if self.weighting != "gaussian" else []
        words += ["known"] if self.known else []
        words += [f"offset{self.offset:g}"] if self.offset else []
        words += [f"repeat{self.repeat:g}"] if self.repeat is not None else []
        words += [f"{self.own}-h{self.h:g}"] if self.own else []
        return "-".join(words)

    def row_values(self, g: torch.Generator) -> Rows:
        n, d = self.n, self.d
        if self.rows == U8:
            return Rows(torch.randint(0, 256, (n, d), dtype=U8, generator=g), *UINT8_UNIT)
        data = torch.randn(n, d, dtype=F64, generator=g) + self.offset
        if self.repeat is not None:
            noise = torch.randn(n - n // 2, d, dtype=F64, generator=g)
            data[n // 2 :] = data[0] + self.repeat * noise
        return Rows(data.to(self.rows))

    def bias_of(self) -> Tensor | None:
        if self.bias is None:
            return None
        bias = normal(self.n, seed=5)
        if self.bias == "holes":
            bias[::3] = -math.inf
        if self.bias == "hole":
            bias[self.n // 2] = -math.inf
        return bias

    def problem(self) -> tuple[Query, Rows]:
        g = torch.Generator().manual_seed(self.seed)
        rows = self.row_values(g)
        y = oracle.values(rows)
        noise = torch.randn(self.b, self.d, dtype=F64, generator=g)
        x = self.alpha * y[torch.arange(self.b) % self.n] + self.sigma * noise
        query = query_of(
            x.to(self.x), self.sigma, self.alpha, self.temperature, self.bias_of(), self.weighting
        )
        query, rows = self.with_own_bias(query, rows)
        return query, with_norms(rows) if self.known else rows

    def with_own_bias(self, query: Query, rows: Rows) -> tuple[Query, Rows]:
        at = torch.arange(self.b) % self.n
        if self.own in ("left-out", "both"):
            query = query._replace(leave_out=torch.where(at % 4 == 3, -1, at))
        if self.own in ("condition", "both"):
            rows = rows._replace(conditions=normal(self.n, 3, seed=6) + self.offset)
            c = rows.conditions[at] + 0.4 * normal(self.b, 3, seed=7)
            query = query._replace(condition=conditioned(c, self.h, rows))
        return query, rows


def conditioned(c: Tensor, h: float | Tensor, rows: Rows) -> Condition:
    """The condition [B, K] of bandwidth h, counted from the nearest row's."""
    a = rows.conditions[oracle.squares(c, rows.conditions).argmin(1)]
    return Condition(c, column(h, len(c)), a)


@functools.lru_cache(maxsize=64)
def answered(case: Case) -> tuple[Query, Rows, Sums]:
    """A case and its sums; not to be written to."""
    query, rows = case.problem()
    return query, rows, oracle.sums(query, rows)


@functools.lru_cache(maxsize=64)
def with_gradients(case: Case) -> tuple[Query, Rows, Sums, Gradients]:
    """A case, gradients for its sums, and those for the query; not to be written to."""
    query, rows = case.problem()
    grads = random_like(BasicSums(query.x, *[query.sigma] * 4), case.b)
    return query, rows, grads, oracle.gradients(query, rows, grads)


Table = dict[str, list[Case]]


def _grouped(cases: list[Case], label: Callable[[Case], str]) -> Table:
    table: Table = {}
    for case in cases:
        table.setdefault(label(case), []).append(case)
    return table


# --- posterior ----------------------------------------------------------------------------------


def feature_tails(backend: str) -> Table:
    """Every row type at every tail of the features, given norms and without."""
    if backend == "triton":
        each = [(3, 33, d) for d in (1, 63, 100, 256)]
    else:
        each = [s for d in TAILS for s in ((1, 33, d), (5, 17, d), (13, 63, d))]
        each += [(3, 33, d) for d in WIDTHS]
    cases = [
        Case(b, n, d, t, known=d == 63 or b == 5) for b, n, d in each for t in row_types(backend)
    ]
    return _grouped(cases, lambda c: f"features-{name_of(c.rows)}")


def row_and_query_tails(backend: str) -> Table:
    """Fewer and more queries and rows than a block has."""
    if backend == "triton":
        cases = [Case(b, n, 5, sigma=0.7, seed=n) for b, n in ((1, 65), (17, 32), (65, 9))]
        # In one pass, whose first product streams the features.
        cases += [Case(17, 40, 200, t, sigma=0.7, bias="normal") for t in row_types(backend)]
    else:
        cases = [
            Case(b, n, 5, t, t, sigma=0.7, seed=n)
            for n in TAILS
            for b in (1, 2, 7, 9, 63, *([260] if n in (1, 9, 33) else []))
            for t in (F32, F64)
        ]
    return _grouped(cases, lambda c: f"rows-{name_of(c.x)}-{name_of(c.rows)}")


def fields(backend: str) -> Table:
    """Bias with rows left out, temperature, alpha of every kind, both weightings, all types."""
    if backend == "triton":
        sizes, alphas, x_types = (2,), (-1.3, 0.0), (F32,)
    else:
        sizes, alphas, x_types = (3, 40), (1.0, 0.7, -1.3, 0.0), (F32, F64)
    cases = [
        Case(b, 70, 19, t, x, 0.8, alpha, 1.7, "holes", weighting)
        for b in sizes
        for alpha in alphas
        for t in row_types(backend)
        for x in x_types
        for weighting in ("gaussian", "log")
    ]
    return _grouped(cases, lambda c: f"{c.weighting}-{name_of(c.x)}-{name_of(c.rows)}")


def own_biases(backend: str) -> Table:
    """Conditions and rows left out that differ from query to query: few and many queries, few
    features and many, wide and narrow bandwidths, a large common offset, every type."""
    if backend == "triton":
        return {}
    sizes = [(1, 70, 19, 0.5), (3, 70, 2, 0.5), (3, 70, 300, 0.5), (40, 70, 17, 0.5)]
    sizes += [(265, 33, 5, 0.5), (9, 1, 4, 0.5), (20, 140, 19, 1e-3)]
    sizes += [(40, 300, 1, 0.1), (65, 300, 3, 0.5), (33, 70, 8, 2.0)]
    cases = [
        Case(b, n, d, t, F64 if t == F64 else F32, sigma, 0.9, 1.3, bias, own=own)
        for b, n, d, sigma in sizes
        for t in (row_types(backend) if d == 17 else (F32,))
        for own, bias in (("condition", None), ("left-out", "hole"), ("both", "holes"))
        if n > 1 or own == "condition"
    ]
    cases += [Case(33, 300, d, F64, F64, bias="holes", own="both") for d in (2, 7)]
    many = Case(17, 70, 19, sigma=0.5, own="condition")
    cases += [replace(many, h=h) for h in (0.0, 1e-200, 1e-6, 0.01, 1e3, 1e150)]
    cases += [replace(many, offset=1e6), replace(many, own="both", weighting="log")]
    cases += [replace(many, own="both", weighting="log", x=F64)]
    return _grouped(cases, lambda c: f"{c.own}-{name_of(c.rows)}")


SIGMAS = (1e-3, 2e-3, 0.01, 0.1, 1.0, 5.0, 80.0, 1e3)


def noise_levels(backend: str) -> Table:
    """Near-duplicates, a large common offset, few features and uint8, at every sigma."""
    if backend == "triton":
        sizes = [(2, 20, 40, s) for s in (1e-3, 0.1, 1.0, 80.0, 1e3)]
        sizes += [(2, 20, 300, s) for s in (1e-3, 1.0, 80.0)]
    else:
        sizes = [(b, 150, 300, s) for b in (4, 24) for s in SIGMAS]
    cases = []
    for b, n, d, sigma in sizes:
        plain = Case(b, n, d, sigma=sigma)
        cases += [replace(plain, known=True), replace(plain, repeat=sigma / 30)]
        cases += [replace(plain, offset=1000.0), replace(plain, d=2), replace(plain, rows=U8)]
    return _grouped(cases, lambda c: f"sigma{c.sigma:g}")


def posterior(backend: str) -> Table:
    """All of the above."""
    tables = (feature_tails, row_and_query_tails, fields, own_biases, noise_levels)
    return {name: cases for table in tables for name, cases in table(backend).items()}


def states(backend: str) -> Table:
    """Every type, few features and many, every noise, rows left out, both weightings."""
    if backend == "triton":
        shapes = [(2, 40, 5, 0.7), (2, 40, 300, 0.7), (2, 20, 40, 1e-3), (2, 20, 40, 80.0)]
        types = [(t, F32) for t in (F32, U8)]
    else:
        shapes = [(2, 70, 3, 0.1), (24, 70, 3, 80.0), (2, 70, 300, 1e-3), (24, 70, 300, 1.0)]
        types = [*((t, F32) for t in ROW_TYPES), (F32, F64), (F64, F64)]
    cases = [
        Case(b, n, d, t, x, s, 0.9, 1.3, bias, weighting)
        for b, n, d, s in shapes
        for t, x in types
        for bias in (None, "holes")
        for weighting in ("gaussian", "log")
        if weighting == "gaussian" or s == 0.7 or s == 1.0
    ]
    if backend != "triton":
        cases += [Case(b, 70, 19, own="both", bias="holes") for b in (2, 24)]
    return _grouped(cases, lambda c: f"{c.weighting}-{name_of(c.x)}-{name_of(c.rows)}")


def contract(backend: str) -> dict[str, tuple[torch.dtype, float]]:
    """Row types that float32 queries are answered in float32 for, and every sigma."""
    sigmas = (1e-3, 2e-3, 0.05, 0.3, 1.0, 10.0, 80.0, 1e3)
    return {f"{name_of(t)}-{s:g}": (t, s) for t in ROW_TYPES[1:] for s in sigmas}


# --- gradients ----------------------------------------------------------------------------------


def gradients(backend: str) -> Table:
    """With a bias of which one row is left out and without, alpha of both signs, T."""
    if backend == "triton":
        shapes = [(1, 3, 0.5, 1.0, None), (3, 33, 2.0, -0.6, "hole"), (2, 300, 0.02, 1.0, "hole")]
        n = 30
    else:
        shapes = [
            (b, d, sigma, alpha, bias)
            for b, d, sigma, alpha in (
                (1, 3, 0.5, 1.0),
                (4, 33, 2.0, 0.6),
                (40, 17, 1.0, -0.8),
                (300, 2, 0.3, 1.0),
                (9, 300, 0.02, 1.0),
            )
            for bias in (None, "hole")
        ]
        n = 90
    cases = [
        Case(b, n, d, t, F64 if t == F64 else F32, sigma, alpha, 1.3, bias, weighting)
        for b, d, sigma, alpha, bias in shapes
        for t in row_types(backend)
        for weighting in ("gaussian", "log")
    ]
    if backend != "triton":
        cases += [
            Case(b, n, d, t, F64 if t == F64 else F32, sigma, 0.9, 1.3, bias, weighting, own=own)
            for b, d, sigma in ((4, 33, 2.0), (40, 17, 1.0), (9, 300, 0.3), (5, 3, 1e-3))
            for t in (F32, F64)
            for own, bias in (("condition", None), ("left-out", "hole"), ("both", "hole"))
            for weighting in ("gaussian", "log")
        ]
    return _grouped(cases, lambda c: f"{c.weighting}-{name_of(c.rows)}")


def row_gradients(backend: str) -> Table:
    """As for the query, for rows that have a gradient."""
    return {
        name: [case for case in group if case.b < 40 and case.d < 301]
        for name, group in gradients(backend).items()
        if group[0].rows != U8
    }


def second_derivatives(_: str) -> list[Case]:
    """Both weightings, no bias, one with every row and one with rows left out; alpha below 0."""
    return [
        Case(3, 7, 2, F64, F64, sigma, alpha, 0.7, bias, weighting, known=known)
        for weighting in ("gaussian", "log")
        for bias, known in ((None, False), ("normal", True), ("hole", False), ("holes", True))
        for sigma, alpha in ((0.6, 0.9), (1.1, -0.8))
    ] + [
        Case(3, 7, 2, F64, F64, 0.6, 0.9, 0.7, bias, weighting, own=own)
        for weighting in ("gaussian", "log")
        for own, bias in (("condition", None), ("both", "hole"))
    ]


def basic(sums: Sums) -> BasicSums:
    """The sums that a backward pass is given."""
    return BasicSums(*sums[:5])


def narrow(sums: Sums) -> Sums:
    """The sums with the vectors in float32."""
    return sums._replace(mean=sums.mean.float(), residual=sums.residual.float())


def random_like(values: Any, seed: int) -> Any:
    """Random numbers in the shape and type of each of a call object's tensors."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in values]
    return type(values)(*drawn) if hasattr(values, "_fields") else drawn


# --- nearest ------------------------------------------------------------------------------------


def nearest(backend: str) -> Table:
    """One row, few features, many, a large offset; float64 queries where they are taken."""
    shapes = ((1, 1, 0.0), (33, 7, 0.0), (300, 40, 0.0), (300, 40, 500.0))
    if backend == "triton":
        queries = [(1, t, F32) for t in row_types(backend)] + [(17, F32, F32), (17, U8, F32)]
    elif backend == "cuda":
        shapes = (*shapes[:2], (700, 40, 500.0), (129, 300, 0.0))
        queries = [(b, t, F32) for t in row_types(backend) for b in (1, 7)]
    else:
        shapes = (*shapes[:2], (700, 40, 0.0), (700, 40, 500.0), (129, 300, 0.0))
        queries = [(b, t, F32) for t in ROW_TYPES for b in (1, 7, 40)]
        queries += [(7, F32, F64), (7, U8, F64), (7, F64, F64)]
    cases = [
        Case(b, n, d, t, x, 0.3, offset=offset, known=b == 7)
        for b, t, x in queries
        for n, d, offset in shapes
    ]
    return _grouped(cases, lambda c: f"{c.b}-{name_of(c.x)}-{name_of(c.rows)}")


def neighbours(backend: str, case: Case) -> set[int]:
    """How many are asked for; at 50 nearly all groups of rows are candidates."""
    if backend != "triton":
        return {1, min(2, case.n), min(50, case.n)}
    return {1, min(2, case.n)} | ({50} if case.b == 1 and case.offset else set())


# --- lists of rows ------------------------------------------------------------------------------


def random_lists(n: int, b: int, seed: int) -> RowLists:
    """For each query some of n rows, ascending; at least one."""
    g = torch.Generator().manual_seed(seed)
    counts = [int(torch.randint(1, n + 1, (1,), generator=g)) for _ in range(b)]
    index = [torch.randperm(n, generator=g)[:c].sort().values for c in counts]
    return RowLists(torch.tensor([0, *counts]).cumsum(0), torch.cat(index))


def listed(backend: str) -> Table:
    """As for the gradients, with long rows too."""
    shapes = ((1, 3, 0.5, 1.0), (9, 33, 2.0, -0.6), (2, 700, 0.05, 0.0))
    if backend not in EMULATED:
        shapes = (*shapes, (4, 33, 2.0, 0.6), (40, 17, 1.0, -0.8), (9, 530, 3.0, 1.0))
    cases = [
        Case(b, 150, d, t, F64 if t == F64 else F32, sigma, alpha, 1.3, bias)
        for b, d, sigma, alpha in shapes
        for t in row_types(backend)
        for bias in (None, "hole")
    ]
    return _grouped(cases, lambda c: f"{name_of(c.rows)}-{c.bias or 'unbiased'}")
