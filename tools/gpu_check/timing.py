"""The time of a problem, beside the peers that are there.

Correctness comes first: each result is compared with float64 on the same device, and one that is
wrong is not timed. Times are medians over rounds in which everything takes its turn, by the
device's own clock, with nothing of the rows in the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.peers import reason
from tools.gpu_check import makers, rates, rivals
from tools.gpu_check.makers import OURS, Call, Made
from tools.gpu_check.stand_in import is_gpu
from tools.gpu_check.steps import Problem

IN_A_GRAPH = "memokern in a graph"
FLUSH = 256 << 20  # bytes, more than any L2 cache
SECONDS = 1.5  # of rounds for a problem, if the fewest rounds take no longer
ROUNDS = (3, 20)  # at least, at most
WRONG = 1e-2  # error of a peer that is not timed: products in tf32 are right to 1e-3

Lines = list[dict[str, Any]]


class Wrong(Exception):
    """A result of ours that is not right."""


class PeerLost(Exception):
    """A peer took the GPU's context with it."""


class Conditions(NamedTuple):
    """device; rates: what it can do, see :mod:`tools.gpu_check.rates`; compiled: whether the peers
    are those that PyTorch's compiler makes."""

    device: torch.device
    rates: dict[str, float]
    compiled: bool = False


def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call, by events on a GPU's stream, with nothing of it in the L2 cache."""
    if not is_gpu(device):

        def by_the_wall(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return by_the_wall
    size = FLUSH if device.type == "cuda" else 1
    flush = torch.empty(size, dtype=torch.uint8, device=device)

    def by_events(call: Callable[[], object]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000

    return by_events


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes beyond what is there, at most at a time."""
    if not is_gpu(device):
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def in_turns(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    """The median seconds of each, over rounds in which everything takes its turn."""
    timed = clock(device)
    times = {name: [timed(call)] for name, call in calls.items()}
    total = sum(first for (first,) in times.values())
    least = ROUNDS[0] if device.type == "cuda" else 1  # in a rehearsal no time means anything
    rounds = int(min(ROUNDS[1], max(least, SECONDS / max(total, 1e-9))))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _bound(p: Problem, device: torch.device) -> float | None:
    """The seconds that data sheets and the launches allow; None where they say nothing of it."""
    if not is_gpu(device) or p.operation not in ("mean", "nearest"):
        return None
    try:
        from tools import roofline

        name = torch.cuda.get_device_name(device)
        gpu = next((g for g in roofline.GPUS if g.name in name), None)
        case = roofline.Problem(p.operation, p.b, p.n, p.d, getattr(torch, p.rows))
        return None if gpu is None else case.on(gpu).seconds
    except Exception:  # a prediction that fails may not cost the measurement
        return None


def prepared(p: Problem, on: Conditions) -> tuple[Made, dict[str, float]]:
    """The problem, and the errors of our calls; Wrong where one is not right."""
    made = makers.make(p, on.device)
    errors = {name: made.error(call()) for name, call in made.calls.items()}
    for name, error in errors.items():
        if not error <= made.tolerance:
            raise Wrong(f"{name} has an error of {error:.1e}; nothing was timed")
    return made, errors


def measure(p: Problem, on: Conditions, tell: Callable[[Lines], object]) -> Lines:
    """A line for memokern and for each peer; "skipped" says why one was not timed. tell: is told
    our own times first, which a peer that fails badly cannot take away."""
    made, errors = prepared(p, on)
    bound = _bound(p, on.device)

    def lines(calls: dict[str, Call]) -> Lines:
        times = in_turns(calls, on.device)
        return [
            {
                "run": name,
                "seconds": seconds,
                "error": errors[name],
                **rates.shares(made.bytes, made.operations, seconds, p.rows, on.rates),
                "of_bound": None if bound is None or name != OURS else bound / seconds,
                "peak": peak(calls[name], on.device),
            }
            for name, seconds in times.items()
        ]

    calls, skipped = dict(made.calls), []
    tell(lines(calls))
    if is_gpu(on.device) and p.operation == "mean" and not on.compiled:
        calls[IN_A_GRAPH] = makers.graph(made.calls[OURS])
        errors[IN_A_GRAPH] = made.error(calls[IN_A_GRAPH]())
        if not errors[IN_A_GRAPH] <= made.tolerance:
            raise Wrong(f"in a CUDA graph an error of {errors[IN_A_GRAPH]:.1e}")
    for name, found in peers_of(made, on).items():
        if isinstance(found, str):
            skipped.append({"run": name, "skipped": found})
        else:
            calls[name], errors[name] = found
    return [*lines(calls), *skipped]


def is_lost(device: torch.device) -> bool:
    """Whether an error has taken the GPU's context with it, so that nothing runs there any more."""
    try:
        rates.wait(device)
    except Exception:  # torch has several types for it
        return True
    return False


def peers_of(made: Made, on: Conditions) -> dict[str, tuple[Call, float] | str]:
    """Each peer's call and its error, or why it is not timed."""
    p = made.problem
    names = rivals.names_of(p.operation, p.d, on.compiled)
    reason_for_all = rivals.too_large(made, on.device)
    if reason_for_all is not None:
        return dict.fromkeys(names, reason_for_all)
    if on.compiled:
        torch._dynamo.reset()  # else what was compiled for another shape is compiled for any
    values = made.values()
    return {name: _peer(name, made, values, on.device) for name in names}


def _peer(name: str, made: Made, values: Tensor, device: torch.device) -> tuple[Call, float] | str:
    try:
        call = rivals.call_of(name, made, values)
        error = made.error(call())
    except Exception as error:  # a peer's failure is a finding, ours is not
        if is_lost(device):
            raise PeerLost(name) from error
        return "left out: " + (str(error) if type(error) is RuntimeError else reason(error))[:160]
    return (call, error) if error <= WRONG else f"wrong: an error of {error:.1e}"
