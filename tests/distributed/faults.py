"""What the ranks run in the tests of what goes wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import memokern
from memokern import memorization
from memokern.distributed import shard
from memokern.strategies import sharded
from tests.distributed.programs import problem

# What rank 1 does otherwise, by name: the call's changed arguments.
CHANGED: dict[str, dict[str, Any]] = {
    "x": {"x": torch.ones(6, 5)},
    "shape": {"x": torch.ones(5, 5)},
    "type": {"x": problem(kind=torch.float64)[1]},
    "sigma": {"sigma": 0.51},
    "weighting": {"weighting": "log"},
    "gradient": {"x": problem()[1].requires_grad_()},
    "bias": {"bias": True},
    "label": {"label": 3},
    "leave_out": {"leave_out": 7},
    "condition": {"condition": torch.ones(2)},
    "bandwidth": {"bandwidth": 0.25},
    "certificate": {"certificate": True},
    "tol": {"tol": 0.1},
    "vmap": {"transform": "vmap"},
    "jvp": {"transform": "jvp"},
}
# What all ranks ask for where rank 1 asks for something else.
ASKED: dict[str, dict[str, Any]] = {
    "label": {"label": 2},
    "leave_out": {"leave_out": 8},
    "condition": {"condition": torch.zeros(2), "bandwidth": 0.5},
    "bandwidth": {"condition": torch.zeros(2), "bandwidth": 0.5},
}


def disagreeing(group: Any, name: str) -> list[Any]:
    """What a call raises on which rank 1 asks something else; and how the next call fares."""
    rows, x = problem()
    data = shard(
        memokern.TrainingSet(
            rows, labels=torch.arange(37) % 4, conditions=torch.linspace(0, 1, 74).reshape(37, 2)
        ),
        group,
    )
    call: dict[str, Any] = {"x": x, "data": data, "sigma": 0.5}
    expected = memokern.posterior(**call).mean
    call |= ASKED.get(name, {})
    if dist.get_rank() == 1:
        call |= CHANGED[name]
        if call.get("bias"):
            call["bias"] = torch.zeros(data.n_here, dtype=torch.float64)
    transform = call.pop("transform", "")

    def asked(x: torch.Tensor) -> torch.Tensor:
        return memokern.posterior(**call | {"x": x}).mean

    try:
        if transform == "vmap":
            torch.func.vmap(asked)(x[:, None])
        elif transform == "jvp":
            torch.func.jvp(asked, (x,), (x,))
        else:
            asked(call["x"])
    except Exception as error:
        said = [type(error).__name__, str(error)]
    else:
        said = ["nothing", ""]
    again = memokern.posterior(x, data, 0.5).mean
    return [*said, bool(torch.equal(again, expected))]


def compiled(group: Any) -> list[Any]:
    """What a compiled call raises on every rank, and whether the ranks can go on."""
    rows, x = problem()
    data = shard(rows, group)
    try:
        torch.compile(lambda x: memokern.posterior(x, data, 0.5).mean, backend="eager")(x)
    except Exception as error:
        said = [type(error).__name__, str(error)]
    else:
        said = ["nothing", ""]
    again = memokern.posterior(x, data, 0.5).mean
    return [*said, bool(torch.allclose(again, memokern.posterior(x, rows, 0.5).mean, atol=1e-5))]


def no_samples(group: Any) -> list[str]:
    """What a metric says where one of the ranks has no samples."""
    rows, x = problem()
    data = shard(rows, group, queries="split")
    try:
        memorization.ratio(x[: 0 if dist.get_rank() == 1 else 3], data)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def raising(group: Any, where: str) -> list[Any]:
    """The same where rank 1 raises: in its arguments, or in its sweep; or calls something else, or
    has another version."""
    rows, x = problem()
    data = shard(rows, group)
    odd = dist.get_rank() == 1
    patch: Any = mock.patch.object(sharded, "BLOCK", 2)  # several blocks, of which one fails
    try:
        with patch:
            if where == "arguments":
                memokern.posterior(x, data, -1.0 if odd else 0.5)
            elif where == "sweep":
                state = memokern.ops.posterior_state

                def broken(query: Any, rows: Any) -> Any:
                    if odd and bool((query.x == x[2]).all(1).any()):
                        raise MemoryError("no memory for this")
                    return state(query, rows)

                with mock.patch.object(memokern.ops, "posterior_state", broken):
                    memokern.posterior(x, data, 0.5)
            elif where == "operation":
                if odd:
                    memokern.nearest(x, data)
                else:
                    memokern.posterior(x, data, 0.5)
            elif where == "version":
                with mock.patch.object(sharded, "VERSION", "9" if odd else "0.1.0"):
                    memokern.posterior(x, data, 0.5)
    except Exception as error:
        said = [type(error).__name__, str(error)]
    else:
        said = ["nothing", ""]
    again = memokern.posterior(x, data, 0.5).mean
    whole = memokern.posterior(x, rows, 0.5).mean
    return [*said, bool(torch.allclose(again, whole, atol=1e-5))]


def sharding(group: Any, name: str) -> list[Any]:
    """What sharding raises where rank 1 has other rows."""
    rows, _ = problem()
    odd = dist.get_rank() == 1
    options: dict[str, Any] = {"apart": True}
    if name == "nan" and odd:
        rows[3, 2] = torch.nan
    if name == "type" and odd:
        rows = rows.double()
    if name == "shape" and odd:
        rows = rows[:, :4]
    if name == "labels" and odd:
        options["labels"] = torch.arange(len(rows))
    try:
        shard(rows, group, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def killed(group: Any, when: str) -> list[Any]:
    """What happens to the others when rank 1 is killed, or is late: how soon, and what the next
    call says."""
    rows, x = problem()
    data = shard(rows, group, timeout=3.0)
    memokern.posterior(x, data, 0.5)
    odd = dist.get_rank() == 1
    if odd and when == "late":
        time.sleep(8)
        return []
    start = time.monotonic()
    try:
        if when == "backward":
            y = x.clone().requires_grad_()
            loss = memokern.posterior(y, data, 0.5).mean.sum()
            if odd:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
        elif odd and when == "sweep":
            with mock.patch.object(
                memokern.ops, "posterior_state", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            ):
                memokern.posterior(x, data, 0.5)
        else:
            for _ in range(3):
                memokern.posterior(x, data, 0.5)
    except RuntimeError as error:
        said = [time.monotonic() - start, str(error)]
    else:
        said = [time.monotonic() - start, "nothing"]
    try:
        memokern.posterior(x, data, 0.5)
    except RuntimeError as error:
        return [*said, str(error)]
    return [*said, "nothing"]
