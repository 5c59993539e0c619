"""`--nproc`: a command on several processes, each with a part of the rows. They are started here,
or by torchrun; the first one speaks and writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
import torch.distributed as dist

from memokern import TrainingSet
from memokern.apps.cli import common, room
from memokern.distributed import ShardedSet, shard

T = TypeVar("T")
# How long a process waits for another one.
PATIENCE = timedelta(minutes=10)
# What torch.distributed, and torchrun, tell each process.
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this process is one of several."""
    return all(name in os.environ for name in TOLD) and int(os.environ["WORLD_SIZE"]) > 1


def nproc_option(command: Any) -> Any:
    """--nproc, of the commands whose rows may be shared."""
    return click.option(
        "--nproc",
        type=click.IntRange(min=1),
        is_eager=True,
        expose_value=False,
        callback=_launch,
        metavar="N",
        help="Share the rows over so many processes, of which each reads its own. torchrun"
        " --nproc-per-node N -m memokern does the same, on several machines too.",
    )(command)


def _launch(context: click.Context, parameter: click.Parameter, count: int | None) -> None:
    """Runs the command in `count` processes instead, and ends as the first of them does."""
    if count in (None, 1) or launched():
        return
    assert count is not None
    root: Any = context.find_root().command
    given = list(root.given)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    processes = []
    for rank in range(count):
        told = {
            "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        silent = subprocess.DEVNULL if rank else None
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "memokern", *given],
                env={**os.environ, **{k: str(v) for k, v in told.items()}},
                stdout=silent, stderr=silent, stdin=subprocess.DEVNULL,
            )
        )  # fmt: skip
    try:
        code = processes[0].wait()
        for process in processes[1:]:
            try:
                code = code or process.wait(10)
            except subprocess.TimeoutExpired:
                code = code or 1
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    sys.exit(code)


def shared(data: TrainingSet) -> TrainingSet:
    """The rows, of which this process keeps its part where it is one of several."""
    if not launched() or isinstance(data, ShardedSet):
        return data
    join()
    with common.failure("sharing the rows", (RuntimeError, ValueError, MemoryError)):
        share = room.sharers() / int(os.environ["WORLD_SIZE"])
        return shard(data, stream=room.too_large(data, share))


def join() -> None:
    """Finds the other processes."""
    if not dist.is_initialized():
        with common.failure("finding the other processes", (RuntimeError, ValueError)):
            dist.init_process_group("gloo", timeout=PATIENCE)
        torch.manual_seed(0)  # what is drawn without a seed is the same everywhere


def first() -> bool:
    """Whether this process speaks and writes."""
    return not launched() or os.environ["RANK"] == "0"


def check_folder(option: str, path: Path, force: bool) -> None:
    """Refuses an output of several processes that is no folder, or is there already."""
    if path.suffix:
        raise common.WrongInput(
            f"{option}: several processes write a folder of files: leave out {path.suffix!r}"
        )
    if path.exists() and not force:
        raise common.WrongInput(f"{option}: {path} exists; give --force to replace it")


def written_here(path: Path | None) -> Path | None:
    """An output that this process writes, or None."""
    return path if first() else None


def progress() -> bool:
    """Whether this process shows progress bars."""
    return first() and common.progress_wanted()


def say(text: str) -> None:
    """Prints, once for all processes."""
    if first():
        click.echo(text)
