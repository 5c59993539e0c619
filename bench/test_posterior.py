"""The denoiser against its peers: errors first, then times taken in turns."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

import memokern
from bench import peers, table
from memokern.data import UINT8_SCALE, UINT8_SHIFT

DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "bf16": torch.bfloat16,
          "fp16": torch.float16, "float64": torch.float64}  # fmt: skip
CASES = [(b, None, d, "float32") for d in (3072, 784) for b in (1, 8, 64, 256)]
CASES += [(b, None, 3072, t) for b in (1, 64) for t in ("uint8", "bf16", "fp16", "float64")]
CASES += [(4096, None, d, "float32") for d in (2, 16, 64)]
CASES += [(1, 100, 2, "float32"), (100_000, 20, 2, "float32")]


def make(n: int, d: int, kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    if kind == "uint8":
        return torch.randint(0, 256, (n, d), dtype=torch.uint8)
    return torch.randn(n, d).to(DTYPES[kind])


def values(rows: torch.Tensor) -> torch.Tensor:
    """The rows as numbers: what a uint8 row stands for."""
    return rows.double() * UINT8_SCALE + UINT8_SHIFT if rows.dtype == torch.uint8 else rows


def ids(case: tuple[int, int | None, int, str]) -> str:
    b, n, d, kind = case
    return f"B{b}-" + (f"N{n}-" if n else "") + f"D{d}-{kind}"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_mean(
    case: tuple[int, int | None, int, str],
    result: dict[str, Any],
    request: pytest.FixtureRequest,
    benchmark: Any,
) -> None:
    b, fixed, d, kind = case
    path = request.config.getoption("--data")
    if path and not fixed and kind == "float32":
        data = memokern.TrainingSet(path)  # which knows its own scale and shift
        rows = data.dequantize(data.rows).float()
        d = rows.shape[1]
    else:
        rows = make(fixed or request.config.getoption("--rows"), d, kind)
    n = len(rows)
    # noise at which several rows share the weight, so that no peer's cancellation decides
    sigma = float(d) ** 0.5 / 4
    wide = torch.float64 if kind == "float64" else torch.float32
    picks = torch.arange(b) % n
    x = (values(rows[picks]).double() + sigma * torch.randn(b, d, dtype=torch.float64)).to(wide)
    check = slice(0, min(b, 16))  # the reference is slow
    truth = peers.reference(x[check], values(rows), sigma)
    size = truth.abs().max()

    runs, errors, skipped = {}, {}, result["skipped"]
    for name, peer in peers.available().items():
        if peer.skip or (kind != "float32" and name != "memokern"):
            continue
        try:
            run = peer.prepare(rows)
            got = run(x, sigma)
        except Exception as error:  # a peer's failure is a finding, ours is not
            if name == "memokern":
                raise
            skipped[f"{name} in {ids(case)}"] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        runs[name] = run
        errors[name] = float((got[check] - truth).abs().max() / size)
    assert errors["memokern"] < 1e-5, errors

    times: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 30 and time.perf_counter() - start < 1):
        for name, run in runs.items():  # in turns: a busy moment meets them all
            begin = time.perf_counter()
            run(x, sigma)
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    benchmark.pedantic(runs["memokern"], args=(x, sigma), rounds=3)
    found = {}
    for name, taken in times.items():
        found[name] = table.figures(
            b, n, d, rows.element_size(), median(taken), result["sgemm"], result["read"]
        )
        found[name]["error"] = errors[name]
    result["cases"].append({"name": ids(case), "rows": n, "peers": found})


@pytest.mark.parametrize("sigma", [80.0, 1.0, 0.1, 0.01, 0.002])
def test_accuracy(sigma: float, result: dict[str, Any]) -> None:
    """Each row has a twin about 0.001 away: only right distances tell them apart."""
    rows = make(500, 784, "float32")
    rows = torch.cat([rows, rows + 4e-5 * torch.randn_like(rows)])
    x = rows[:8] + sigma * torch.randn(8, 784)
    truth = peers.reference(x, rows, sigma)
    errors = {}
    for name, peer in peers.available().items():
        if not peer.skip and name not in ("compile", "keops"):
            errors[name] = float((peer.prepare(rows)(x, sigma) - truth).abs().max())
    result["accuracy"].append({"sigma": sigma, "errors": errors})
    assert errors["memokern"] < 1e-5 * float(truth.abs().max()), errors
