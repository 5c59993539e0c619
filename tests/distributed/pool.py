"""Processes that stay for many small checks: importing torch takes longer than all of these.

A server process imports torch and memokern once and is forked for each rank. What a rank is told to
run is a function of a module, by its name, which gets the group; what it returns or raises comes
back.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = ["torch", "torch.distributed", "numpy", "memokern", "memokern.distributed"]
# How long a rank waits for another one, in seconds: short, but a machine may be busy.
PATIENCE = 30.0


class Raised(NamedTuple):
    """What a rank raised: the name of its type, and the message."""

    kind: str
    said: str


def _rank(rank: int, size: int, store: str, timeout: float, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    groups = {size: None}
    for n in range(2, size):
        groups[n] = dist.new_group(list(range(n)), timeout=timedelta(seconds=timeout))
    while True:
        told = pipe.recv()
        if told is None:
            return
        members, module, name, args = told
        try:
            found = getattr(importlib.import_module(module), name)(groups[members], *args)
        except Exception as error:
            found = Raised(type(error).__name__, str(error))
        pipe.send(found)


class Pool:
    """So many ranks. run: has the first `size` of them call a function, and returns what each
    returned or raised."""

    def __init__(self, size: int, timeout: float = PATIENCE) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, size, store, timeout, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def begin(self, size: int, function: Any, *args: Any) -> None:
        """Tells the ranks, and does not wait."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function.__module__, function.__name__, args))

    def result(self, rank: int, patience: float = 2 * PATIENCE) -> Any:
        """What a rank answered; TimeoutError where it hangs."""
        if not self.pipes[rank].poll(patience):
            raise TimeoutError(f"rank {rank} gave no answer within {patience} s")
        return self.pipes[rank].recv()

    def run(self, size: int, function: Any, *args: Any) -> list[Any]:
        self.begin(size, function, *args)
        return [self.result(rank) for rank in range(size)]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._folder.cleanup()
