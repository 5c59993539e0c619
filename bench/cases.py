"""What is measured: the cases, what is timed in each, and the targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import memokern

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "uint8": torch.uint8,
}
MEAN_PEERS = ("cached", "naive", "cdist", "sdpa", "compile")
# Of queries that have a condition each: the sweep without, a call for each, and the formula.
CONDITIONAL_PEERS = ("unconditional", "one by one", "in torch")
KEOPS_DIM = 64  # KeOps is made for D below 100, its documentation says
K = 2  # neighbours in the `nearest` case
OURS = "memokern"
TINY = 10_000  # numbers (B N D) in a case that is all overhead


@dataclass(frozen=True)
class Target:
    """What a figure should be. kind says which figure of the case:

    "sgemm": rate as a share of a 2048^3 sgemm; "floor": time over the floor; "ratio": time of
    `slow` over time of `fast`; "fastest": time of the fastest peer over ours; "error": ours.
    """

    kind: str
    goal: float
    slow: str = ""
    fast: str = OURS
    at_most: bool = False  # else at least


@dataclass(frozen=True)
class Case:
    """B queries, N rows of D features, timed on each of `runs`, in turns."""

    op: str  # see runs.py; those in PRUNED: pruned.py
    b: int
    d: int
    runs: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    n: int = 0  # 0: as many as the run says
    sigma: float = 0.0  # 0: wide, see noise
    quick: bool = False

    @property
    def name(self) -> str:
        n = f" N={self.n}" if self.n else ""
        sigma = f" sigma={self.sigma:g}" if self.sigma else ""
        dim = "" if self.op in PRUNED else f" D={self.d}"
        return f"{self.op} B={self.b}{n}{dim}{sigma}"

    @property
    def id(self) -> str:
        """The name as -k takes it."""
        return self.name.replace(" ", "-").replace("=", "")

    @property
    def noise(self) -> float:
        """Noise at which thousands of rows share the weight: none can be skipped, and no peer's
        result is lost to cancellation."""
        return self.sigma or math.sqrt(self.d) / 2


FASTEST = Target("fastest", 1)
# Cases of certified pruning, on images: queries from rows, from images that are not among them, or
# on a reverse trajectory; its noise levels, EDM's training levels, all in one; the index itself.
PRUNED = ("pruned-rows", "pruned", "pruned-path", "trajectory", "training", "index")


def _dense(d: int) -> list[Case]:
    cases = []
    for b in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if b >= 64:
            target = Target("sgemm", 0.9)
        else:
            target = Target("floor", 1.3 if b >= 16 else 1.4, at_most=True)
        ideal = ("ideal",) if d == 3072 and b in (1, 8, 64) else ()
        quick = (b, d) in ((1, 3072), (64, 3072), (8, 784))
        runs = (OURS, *MEAN_PEERS, *ideal)
        cases.append(Case("mean", b, d, runs, (target, FASTEST), quick=quick))
    return cases


def _types() -> list[Case]:
    def faster(fast: str, goal: float) -> Target:
        return Target("ratio", goal, "float32", fast)

    one = (faster("uint8", 1.8), faster("bf16", 1.4), faster("fp16", 1.4))
    float64 = Target("ratio", 2.2, "float64", "float32", at_most=True)
    half = ("float32", "uint8", "bf16", "fp16")
    return [
        Case("types", 1, 3072, half, one, quick=True),
        Case("types", 16, 3072, half, (faster("uint8", 1),)),
        Case("types", 64, 3072, (*half, "float64"), (faster("uint8", 1), float64)),
    ]


def _other(threads: int) -> list[Case]:
    backward = Target("ratio", 1.8, OURS, "forward", at_most=True)
    nearest = (Target("ratio", 1, "faiss"), Target("error", 1e-6, at_most=True))
    conditional = (
        Target("ratio", 1.3, OURS, "unconditional", at_most=True),
        Target("ratio", 5, "one by one"),
        Target("ratio", 1, "in torch"),
    )
    cases = [
        Case("mean", 64, 3072, (OURS, *MEAN_PEERS), sigma=0.002),
        Case("backward", 64, 3072, (OURS, "forward", "cached", "naive", "sdpa"), (backward,)),
        Case("nearest", 64, 3072, (OURS, "faiss"), nearest, quick=True),
        Case("condition", 64, 3072, (OURS, *CONDITIONAL_PEERS), conditional),
    ]
    if threads > 1:
        second = (Target("ratio", 1.85, "1 thread", "2 threads"),)
        for b in (16, 64, 256):
            cases.append(Case("threads", b, 3072, ("1 thread", "2 threads"), second, quick=b == 16))
    return cases


def _few_features() -> list[Case]:
    low = []
    for d, goal in ((2, 4), (3, 4), (16, 2.5), (64, 1.3)):
        runs = (OURS, *MEAN_PEERS, *(("keops",) if d <= KEOPS_DIM else ()))
        targets = (Target("ratio", goal, "sdpa"), FASTEST)
        low.append(Case("mean", 4096, d, runs, targets, quick=d == 2))
    runs = (OURS, *MEAN_PEERS, "ideal", "keops")
    small = [(100_000, 20), (1, 100)]
    low += [Case("mean", b, 2, runs, (FASTEST,), n=n, quick=True) for b, n in small]
    # The smallest call again, which shows what a call costs however little it computes.
    return [*low, Case("posterior", 1, 2, (OURS, "denoise"), n=100, quick=True)]


def _pruned() -> list[Case]:
    runs = (OURS, "dense", "pruned", "cached", "sdpa")

    def goals(dense: float, peer: float | None) -> tuple[Target, ...]:
        found = (Target("ratio", dense, "dense"),)
        return found if peer is None else (*found, Target("fastest", peer))

    found = []
    for sigma, peer in ((0.14, 80), (0.3, 80), (0.6, 60), (1.1, 25), (1.9, 8)):
        target = (Target("fastest", peer),)
        found.append(Case("pruned-rows", 64, 3072, runs, target, n=50_000, sigma=sigma))
    for op in ("pruned", "pruned-path"):
        for sigma, dense, peer in (
            (0.05, 60, 80), (0.3, 60, 80), (0.6, 40, 50), (1.1, 15, 20), (1.9, 5, None),
            (3.3, 1.8, None),
        ):  # fmt: skip
            quick = op == "pruned-path" and sigma == 0.3
            found.append(Case(op, 64, 3072, runs, goals(dense, peer), sigma=sigma, quick=quick))
        found.append(Case(op, 1, 3072, runs, goals(20, None), sigma=0.3))
    found.append(Case("trajectory", 64, 3072, runs, goals(2, 2.5)))
    found.append(Case("training", 64, 3072, runs, goals(20, 25)))
    # less than 20 dense evaluations
    found.append(Case("index", 64, 3072, (OURS, "dense"), goals(1 / 20, None), sigma=0.3))
    return found


def select(quick: bool = False, dim: int | None = None) -> list[Case]:
    """All cases, or those of --quick; dim: those that a file of such rows stands in for."""
    if dim is not None:
        return [c for c in _dense(dim) if not quick or c.b in (1, 8, 64)]
    cases = [*_dense(3072), *_other(torch.get_num_threads()), *_types(), *_dense(784)]
    cases += [*_few_features(), *_pruned()]
    return [c for c in cases if c.quick] if quick else cases


@lru_cache(maxsize=1)  # only the latest set is kept
def rows(n: int, d: int, kind: str = "float32") -> Tensor:
    """[N, D] random rows: standard normal float32, or uint8."""
    torch.manual_seed(0)
    if kind == "uint8":
        return torch.randint(0, 256, (n, d), dtype=torch.uint8)
    return torch.empty(n, d).normal_()


@lru_cache(maxsize=1)
def read(path: str) -> Tensor:
    """[N, D] float32: a file's rows, as the numbers that they stand for."""
    data = memokern.TrainingSet(path)
    return data.dequantize(data.rows).float()


def near_duplicates(n: int = 1024, d: int = 3072) -> Tensor:
    """[N, D] rows in families of four, 0.001, 0.005 and 0.02 apart: only right distances tell
    them apart."""
    base = rows(n // 4, d)
    move = torch.nn.functional.normalize(torch.randn(3, n // 4, d), dim=2)
    apart = (0.001, 0.005, 0.02)
    family = [base, *(base + r * m for r, m in zip(apart, move, strict=True))]
    return torch.stack(family, 1).flatten(0, 1)  # neighbours in the file too


def queries(values: Tensor, b: int, sigma: float) -> Tensor:
    """[B, D] rows with noise, in the rows' type (at least float32)."""
    torch.manual_seed(1)
    picks = torch.arange(b) * 7 % len(values)
    x = values[picks].double()
    return (x + sigma * torch.randn_like(x)).to(values.dtype)
