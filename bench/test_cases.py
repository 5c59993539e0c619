"""Each case: errors first, then times taken in turns; then memory, and accuracy at small sigma."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import cases, images, isas, machine, memory, peers, pruned, runs, timing
from bench.cases import OURS, Case

TOLERANCE = 1e-5  # of our error, relative
BUDGET, QUICK_BUDGET = 6.0, 1.5  # seconds of rounds for a case, if three rounds take no longer
ROUNDS, MOST = 3, 300
SLOW = 2.0  # seconds: a peer that takes longer has two rounds
BATCH = 50  # calls of a tiny case that are timed together
LARGE = 1e8  # operations from which the limits of the machine are measured beside a case
NOT_QUICK = ("compile", "keops")  # they compile for many seconds


def test_speed(
    case: Case,
    result: dict[str, Any],
    clock: timing.Clock,
    request: pytest.FixtureRequest,
    benchmark: Any,
) -> None:
    option = request.config.getoption
    quick, path, skipped = option("quick"), option("data"), result["skipped"]
    if quick and any(name in NOT_QUICK for name in case.runs):
        case = Case(**{**vars(case), "runs": tuple(r for r in case.runs if r not in NOT_QUICK)})
        skipped.update(dict.fromkeys(NOT_QUICK, "left out by --quick"))
    threads = torch.get_num_threads()
    if case.op in cases.PRUNED:
        data = images.load(option("images"), option("quick"))
        rows, make = images.values(data.rows), pruned.maker(case, data)
    else:
        kind = "uint8" if case.op == "types" else "float32"
        n = case.n or option("rows")
        rows = cases.read(path) if path else cases.rows(n, case.d, kind)
        case, make = isas.with_others(case, runs.maker(case, rows), isas.beside(option("isa")))
    built, errors = runs.build(case, make, skipped)
    for name, error in errors.items():
        assert name in peers.ALL - {OURS} or error < TOLERANCE, (case.name, errors)

    operations = 4 * case.b * len(rows) * case.d
    whole = operations >= LARGE and case.op not in cases.PRUNED
    limits = machine.limits() if whole else {}
    first, *others = built
    batch = BATCH if case.b * len(rows) * case.d < cases.TINY else 1
    run = {name: timing.repeated(built[name].call, batch) for name in built}
    calls = {name: (run[name], built[name].before) for name in others}
    calls |= {name: (call, lambda: None) for name, call in limits.items()}
    times: dict[str, list[tuple[float, bool]]] = {name: [] for name in [first, *calls]}
    once = {name: clock.time(*call)[0] for name, call in calls.items()}
    mine = (run[first], built[first].before)
    total = sum(once.values()) + clock.time(*mine)[0]
    rounds = int(min(MOST, max(ROUNDS, (QUICK_BUDGET if quick else BUDGET) / total)))

    def turn() -> None:
        """Everyone else's round, then what goes ahead of ours: a busy moment meets them all."""
        torch.set_num_threads(threads)
        for name, call in calls.items():
            if once[name] < SLOW or len(times[name]) < 2 or name not in peers.ALL:
                times[name].append(clock.time(*call))
        mine[1]()
        clock.start()

    alone: list[bool] = []
    benchmark.pedantic(
        mine[0], setup=turn, teardown=lambda: alone.append(clock.alone()), rounds=rounds
    )
    times[first] = list(zip(benchmark.stats.stats.data, alone, strict=True))
    if not any(alone):
        times[first].append(clock.time(*mine))
    torch.set_num_threads(threads)
    found = {
        name: {**timing.best(times[name], batch), "error": errors[name], "itemsize": of.itemsize}
        for name, of in built.items()
    }
    entry = {"name": case.name, "op": case.op, "b": case.b, "n": len(rows), "d": case.d}
    entry |= {"runs": found, "targets": [asdict(t) for t in case.targets]}
    if limits:
        best = {name: timing.best(times[name]) for name in limits}
        entry |= machine.rates({name: limit["seconds"] for name, limit in best.items()})
        entry["quiet"] = all(limit["quiet"] for limit in best.values())
    result["cases"].append(entry)


@pytest.fixture(scope="module")
def clock(request: pytest.FixtureRequest) -> timing.Clock:
    return timing.Clock(0) if request.config.getoption("quick") else timing.Clock()


def _put(entries: list[dict[str, Any]], entry: dict[str, Any], key: str) -> None:
    """In place of what was kept of an earlier run."""
    entries[:] = [*(old for old in entries if old[key] != entry[key]), entry]


@pytest.mark.parametrize("op", ["mean", "backward", "nearest"])
def test_memory(op: str, result: dict[str, Any], request: pytest.FixtureRequest) -> None:
    b, n, d = 64, request.config.getoption("rows"), 3072
    threads = torch.get_num_threads()
    names = {"mean": (OURS, "cached", "naive", "cdist", "sdpa", "ideal"),
             "backward": (OURS, "cached", "sdpa"), "nearest": (OURS, "faiss")}[op]  # fmt: skip
    found = {}
    for name in names[:1] if request.config.getoption("quick") else names:
        why = peers.missing(name)
        if why:
            result["skipped"][name] = why
        else:
            found[name] = memory.measure(op, name, b, n, d, threads)["bytes"]
    allowed = memory.allowed(b, d, threads)
    entry = {"op": op, "b": b, "n": n, "d": d, "allowed": allowed, "bytes": found}
    _put(result["memory"], entry, "op")


@pytest.mark.parametrize("sigma", [80.0, 1.0, 0.1, 0.01, 0.002])
def test_accuracy(sigma: float, result: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Rows with near-duplicates; the error of each peer beside ours."""
    rows = cases.near_duplicates()
    x = cases.queries(rows, 8, sigma)
    truth = peers.reference(x, rows, sigma)
    size, residual = truth.norm(dim=1), (truth - x).norm(dim=1)  # score = (mean - x) / sigma^2
    entry: dict[str, Any] = {"sigma": sigma, "n": len(rows), "d": rows.shape[1]}
    entry |= {"mean": {}, "score": {}}
    for name, prepare in peers.MEAN.items():
        too_many = name == "keops" and rows.shape[1] > cases.KEOPS_DIM
        left_out = name == "compile" and request.config.getoption("quick")
        if peers.missing(name) or too_many or left_out:
            continue
        wrong = (prepare(rows)(x, sigma) - truth).norm(dim=1)
        for what, scale in (("mean", size), ("score", residual)):
            entry[what][name] = float((wrong / scale).max())  # NaN stays NaN
    _put(result["accuracy"], entry, "sigma")
    assert entry["mean"][OURS] < TOLERANCE, entry
    # a float32 mean is rounded by 2^-24 of its size, which the score sees over a small residual
    assert entry["score"][OURS] < TOLERANCE + float(4 * 2**-24 * (size / residual).max()), entry
