"""How long a sweep takes on many processes: the schedule of sharded and streamed rows, simulated.

    python -m tools.scale             # the sizes and machines of docs/scale.md
    python -m tools.scale --measure   # this machine, 1, 2 and 4 processes, and what is predicted

A rank reads a chunk of its rows, sweeps it, and, after its last chunk, takes part in two
collectives. Reading, sweeping and exchanging overlap: the next chunk is read while one is swept,
the next block of queries is swept while one is exchanged. :func:`simulate` plays that out step by
step; a :class:`Machine` has the few rates that it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace

BLOCK = 256  # queries that are exchanged together, as memokern.strategies.sharded has it
MESSAGE = 1536  # bytes with which calls are compared
COLUMNS = 49  # bytes per query that each rank tells each other one: six numbers, and a flag's share


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, in bytes or operations per second.

    flops: of the products. memory: at which a sweep reads rows. disk: at which they come from where
    they are stored, None where they stay in memory. wire: of the slowest link in a ring. latency:
    of one step of a collective, in seconds. sharers: how many ranks share flops and memory, as
    processes on fewer cores do.
    """

    name: str
    flops: float
    memory: float
    wire: float
    latency: float
    disk: float | None = None
    sharers: float = 1.0


@dataclass(frozen=True)
class Problem:
    """n rows of dim numbers of so many bytes, b queries, accumulators of acc bytes a number."""

    n: float
    dim: float
    bytes: float
    b: float
    acc: float = 4.0

    @property
    def row_bytes(self) -> float:
        return self.n * self.dim * self.bytes


def sweep_seconds(machine: Machine, rows: float, problem: Problem, b: float) -> float:
    """A sweep of some rows: as long as its products, or as reading the rows."""
    products = 4 * b * rows * problem.dim / machine.flops
    return max(products, rows * problem.dim * problem.bytes / machine.memory) * machine.sharers


def exchange_seconds(
    machine: Machine, ranks: int, problem: Problem, b: float
) -> tuple[float, float]:
    """The all-gather of the columns and the all-reduce of the accumulators, both in rings."""
    if ranks == 1:
        return 0.0, 0.0
    steps = ranks - 1
    gather = steps * (machine.latency + COLUMNS * b / machine.wire)
    total = 2 * b * problem.dim * problem.acc
    reduce = 2 * steps * (machine.latency + total / ranks / machine.wire)
    return gather, reduce


def simulate(
    machine: Machine, ranks: int, problem: Problem, chunk_bytes: float = 64 << 20
) -> dict[str, float]:
    """Seconds of one call: in all, and how long sweeping, reading and exchanging each take.

    Rows in memory are swept once for each block of queries, rows from a disk once for all, chunk by
    chunk, with two buffers.
    """
    rows = problem.n / ranks
    link = agree = exchanged = read = swept = 0.0
    if ranks > 1:
        agree = (ranks - 1) * (machine.latency + MESSAGE / machine.wire)
    if machine.disk is not None:
        chunk = min(rows, max(1.0, chunk_bytes / (problem.dim * problem.bytes)))
        count = int(-(-rows // chunk))
        each = (
            min(chunk * problem.dim * problem.bytes, rows * problem.dim * problem.bytes)
            / machine.disk
        )
        work = sweep_seconds(machine, rows / count, problem, problem.b)
        freed = [0.0, 0.0]  # when each buffer may be filled again
        ready = done = 0.0
        for i in range(min(count, 4096)):
            ready = max(ready, freed[i % 2]) + each
            done = max(done, ready) + work
            freed[i % 2] = done
        if count > 4096:  # it goes on as it did
            done += (count - 4096) * max(each, work)
        read, swept = count * each, count * work
        gather, reduce = exchange_seconds(machine, ranks, problem, problem.b)
        exchanged = gather + reduce
        total = max(done, agree) + exchanged
    else:
        clock = 0.0
        blocks = [min(BLOCK, problem.b - start) for start in range(0, int(problem.b), BLOCK)]
        for i, b in enumerate(blocks):
            work = sweep_seconds(machine, rows, problem, b)
            gather, reduce = exchange_seconds(machine, ranks, problem, b)
            clock, swept, exchanged = clock + work, swept + work, exchanged + gather + reduce
            # The link is free once what came before has gone; ranks wait for it at the end only.
            link = max(link, clock, agree if i == 0 else 0.0) + gather + reduce
        total = max(clock, link)
    return {"total": total, "sweep": swept, "read": read, "exchange": exchanged}


H200 = Machine("H200", flops=4e14, memory=4.0e12, wire=4e11, latency=1e-5)
H200_FAR = replace(H200, name="H200, 8 a node", wire=4e10, latency=2e-5)
CPU_NODE = Machine("CPU node, 64 cores", flops=4e12, memory=3e11, wire=2.5e9, latency=5e-5)
CPU_DISK = replace(CPU_NODE, name="CPU node, NVMe", disk=6e9)
H200_HOST = replace(H200, name="H200, rows in host memory", disk=5e10)
IMAGES = Problem(1.28e6, 196608, 1, 256)
LATENTS = Problem(1e9, 4096, 2, 256)
CASES = [
    ("ImageNet, 252 GB", IMAGES, H200, [8]),
    ("ImageNet, 252 GB", IMAGES, H200_HOST, [1, 8]),
    ("ImageNet, 252 GB", IMAGES, H200_FAR, [64]),
    ("ImageNet, 252 GB", IMAGES, CPU_NODE, [4, 16, 64]),
    ("ImageNet, 252 GB", IMAGES, CPU_DISK, [1, 4, 16]),
    ("latents, 8.2 TB", LATENTS, H200_HOST, [1, 8]),
    ("latents, 8.2 TB", LATENTS, H200_FAR, [64]),
    ("latents, 8.2 TB", LATENTS, CPU_DISK, [1, 16, 64]),
]


def table() -> str:
    """The predictions, as a table in Markdown."""
    lines = [
        "| data | machine | ranks | GB per rank | queries | seconds | sweep | read | exchange |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, problem, machine, counts in CASES:
        for ranks in counts:
            for b in (1, 256, 4096):
                mine = replace(problem, b=b)
                t = simulate(machine, ranks, mine)
                numbers = " | ".join(f"{t[k]:.3g}" for k in ("total", "sweep", "read", "exchange"))
                share = problem.row_bytes / ranks / 1e9
                lines.append(
                    f"| {name} | {machine.name} | {ranks} | {share:.3g} | {b} | {numbers} |"
                )
    return "\n".join(lines)


# --- this machine -------------------------------------------------------------------------------


def _rank(n: int, dim: int, b: int, repeats: int) -> None:
    """One process of a measurement: the first prints the seconds of a call, and of its parts."""
    import torch
    import torch.distributed as dist

    import memokern
    from memokern.distributed import shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = n // size
    rows = torch.randn(mine, dim, generator=torch.Generator().manual_seed(rank))
    x = torch.randn(b, dim)
    data = shard(rows, apart=True, check=False)
    columns, sums = torch.zeros(6 * b + 1, dtype=torch.float64), torch.zeros(2 * b * dim)
    parts = [torch.empty_like(columns) for _ in range(size)]

    timed = {
        "call": lambda: memokern.posterior(x, data, 5.0),
        "sweep": lambda: memokern.posterior_state(x, data.part, 5.0),
        "gather": lambda: dist.all_gather(parts, columns),
        "reduce": lambda: dist.all_reduce(sums),
    }
    found = dict.fromkeys(timed, float("inf"))
    for _ in range(repeats):  # in turn: what else the machine does meets all alike
        for name, call in timed.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            found[name] = min(found[name], time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def measure(n: int, dim: int, b: int, ranks: int, threads: int = 1) -> dict[str, float]:
    """Seconds of a call on so many processes of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks}
    told |= {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
    env = {**os.environ, **{k: str(v) for k, v in told.items()}}
    command = [sys.executable, "-m", "tools.scale", "--rank", str(n), str(dim), str(b)]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(command, env={**env, "RANK": str(r)}, stdout=pipe, text=True)
        for r in range(ranks)
    ]
    said = [process.communicate()[0] for process in running]
    return json.loads(next(text for text in said if text.strip()))


def compared(n: int, dim: int, b: int, cores: float) -> str:
    """What is measured with 1, 2 and 4 processes, and what is predicted from the sweep of one and
    the wire of two."""
    lines = [
        "| processes | threads | rows each | measured | predicted | sweep | gather | reduce |",
        "|" + " --- |" * 8,
    ]
    # Strong scaling, then weak: twice the rows for two.
    runs = [(1, 1, n), (1, 2, n), (2, 1, n), (4, 1, n), (1, 2, 2 * n), (2, 1, 2 * n)]
    every = [measure(rows, dim, b, ranks, threads) for ranks, threads, rows in runs]
    one, threaded, two = every[:3]
    # Others may use the machine: as many cores are here as a second thread is worth.
    cores = min(cores, max(1.0, one["sweep"] / threaded["sweep"]))
    wire = 2 * b * dim * 4 / max(two["reduce"] - 2 * two["gather"], 1e-4)
    alone = Machine("here", 4 * b * n * dim / one["sweep"], 1e18, wire, two["gather"])
    for (ranks, threads, rows), found in zip(runs, every, strict=True):
        sharers = max(1.0, ranks / cores) / min(threads, cores)
        told = simulate(replace(alone, sharers=sharers), ranks, Problem(rows, dim, 4, b))["total"]
        numbers = [
            f"{1e3 * v:.4g} ms"
            for v in (found["call"], told, *(found[k] for k in ("sweep", "gather", "reduce")))
        ]
        lines.append(f"| {ranks} | {threads} | {rows // ranks} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine too")
    parser.add_argument(
        "--size", type=int, nargs=3, default=[48000, 1024, 64], metavar=("N", "D", "B")
    )
    parser.add_argument("--rank", type=int, nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        _rank(*given.rank, repeats=24)
    elif given.measure:
        print(compared(*given.size, cores=os.cpu_count() or 1))
    else:
        print(table())
