"""Files that are larger than the memory that a process may have: made, streamed, audited.

    python -m tools.stream_file make rows.npy --gb 12 --samples samples.npy --count 10000
    python -m tools.stream_file limit --gb 2 -- python -m memokern memorization samples.npy rows.npy
    python -m tools.stream_file limit --gb 2 -- python -m tools.stream_file stream rows.npy

`limit` runs a command in a memory control group of its own (as root, cgroup 1 or 2), in which the
pages that were read of a file count too, and tells how long it took, on the clock and of the cores,
how much it read from the disk, and what it had in memory.
Where no group can be made, nothing is limited, and it says so: `systemd-run --scope -p
MemoryMax=2G` makes one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import memokern

# A group's folder, and the files of its limit and its peak; what it calls memory that is no file's.
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes", "rss"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak", "anon"),
)
BLOCK = 10_000  # images that are made together


# --- make ---------------------------------------------------------------------------------------


def images(n: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """[n, 3, side, side] uint8 as hard to tell apart as CIFAR-10's: spectrum, contrast and colours
    were chosen so that as many rows are left of 10,000, at each level of an index, as of those."""
    at = torch.arange(side, dtype=torch.float32)
    waves = torch.cos((at[:, None] + 0.5) * at * torch.pi / side)
    frequency = (at[:, None].square() + at.square() + 1).sqrt() ** 1.2
    frequency[0, 0] = 2.0
    colours = torch.tensor([[0.9, 0.3, 0.1], [0.9, -0.1, -0.3], [0.9, -0.2, 0.2]])
    coefficients = torch.randn(n, 3, side * side, generator=generator)
    coefficients = (colours @ coefficients).reshape(n, 3, side, side) / frequency
    contrast = 32 * (0.4 * torch.randn(n, 1, 1, 1, generator=generator)).exp()
    return (128 + contrast * (waves @ coefficients @ waves.T)).clamp_(0, 255).to(torch.uint8)


def make(
    path: Path, n: int, side: int, samples: Path | None, count: int, floats: bool = False
) -> None:
    """A file of n images, and one of samples, of which every other one is a row and a little noise:
    what a sampler gives that memorises half the time. floats: float32 in [-1, 1], for bytes."""
    generator = torch.Generator().manual_seed(0)
    head = np.lib.format.open_memmap(
        path, "w+", np.float32 if floats else np.uint8, (n, 3, side, side)
    )

    def scaled(pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 127.5 - 1

    values = scaled(images(count, side, generator))
    copied = np.linspace(0, n - 1, -(-count // 2)).astype(np.int64)
    for start in range(0, n, BLOCK):
        made = images(min(BLOCK, n - start), side, generator)
        head[start : start + BLOCK] = (scaled(made) if floats else made).numpy()
        head.flush()
    if samples is not None:
        found = torch.from_numpy(head[copied])
        values[::2] = found if floats else scaled(found)
        values[::2] += 0.02 * torch.randn(values[::2].shape, generator=generator)
        np.save(samples, values.numpy())
    del head
    forget_pages(path)


def forget_pages(path: str | Path) -> None:
    """Takes a file out of the system's memory, so that who reads it next has it in theirs."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- limit --------------------------------------------------------------------------------------


@contextlib.contextmanager
def group(limit: int) -> Iterator[tuple[Path, str, str] | None]:
    """A control group of this limit, its file of the peak, and the name of its own memory; None
    where none can be made."""
    for root, limit_name, peak, own in GROUPS:
        folder = root / f"memokern-{os.getpid()}"
        if not (root / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
            (folder / limit_name).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield folder, peak, own
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    yield None


def limited(command: list[str], limit: int) -> tuple[int, dict[str, float]]:
    """Runs the command with this much memory: its exit status, its seconds, and in gigabytes the
    most that it had at a time, with the file's pages and without."""

    def used() -> tuple[float, float]:
        """Of all processes that were started here so far: seconds of cores, gigabytes read."""
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime, 512 * found.ru_inblock / 1e9

    began, before = time.monotonic(), used()

    def took() -> dict[str, float]:
        now = used()
        return {
            "seconds": time.monotonic() - began,
            "of cores": now[0] - before[0],
            "GB read": now[1] - before[1],
        }

    with group(limit) as made:
        if made is None:
            print("no control group could be made: nothing limits the memory", file=sys.stderr)
            return subprocess.run(command, check=False).returncode, took()
        folder, peak, own = made
        most, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                said = (folder / "memory.stat").read_text()
                lines = dict(line.split() for line in said.splitlines())
                most[0] = max(most[0], int(lines[own]))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        # The shell enters the group, and becomes the command.
        entered = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh", *command]
        try:
            status = subprocess.run(entered, check=False).returncode
        finally:
            ended.set()
            watcher.join()
        found = {**took(), "GB of its own": most[0] / 1e9}
        with contextlib.suppress(OSError):  # of an older system
            found["GB with pages"] = int((folder / peak).read_text()) / 1e9
        return status, found


# --- stream -------------------------------------------------------------------------------------


def stream(path: str, queries: int, index: bool) -> dict[str, float]:
    """Seconds of what is asked of the rows of a file, whose answers are checked."""
    found: dict[str, float] = {}

    def timed(name: str, call):
        start = time.perf_counter()
        value = call()
        found[name] = time.perf_counter() - start
        return value

    data = memokern.StreamedSet(path, progress=False)
    picked = torch.linspace(0, data.n - 1, queries).long()
    x = data.gather(picked)
    x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    timed("norms", lambda: data.center)
    p = timed("posterior", lambda: memokern.posterior(x, data, 5.0))
    assert bool(torch.isfinite(p.mean).all())
    near = timed("nearest", lambda: memokern.nearest(x, data, 2))
    assert torch.equal(near.index[:, 0], picked)
    if index:
        timed("index", lambda: data.build_index(dims=(32, 64)))
        p = timed("pruned", lambda: memokern.posterior(x, data, 0.2, method="pruned"))
        assert bool((p.ess < 1 + 1e-6).all())
        found["index, GB"] = data.index.nbytes / 1e9
    return found


def said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    does = parser.add_subparsers(dest="does", required=True)
    one = does.add_parser("make", help="images, as a .npy")
    one.add_argument("path", type=Path)
    one.add_argument("--gb", type=float, default=12.0)
    one.add_argument("--side", type=int, default=32, help="pixels of an image's side")
    one.add_argument("--floats", action="store_true", help="float32 in [-1, 1], not bytes")
    one.add_argument("--samples", type=Path, help="a .npy of samples to look for, too")
    one.add_argument("--count", type=int, default=10_000, help="how many samples")
    one = does.add_parser("limit", help="a command with so much memory")
    one.add_argument("--gb", type=float, default=2.0)
    one.add_argument("command", nargs=argparse.REMAINDER)
    one = does.add_parser("stream", help="posterior and nearest of a file's rows")
    one.add_argument("path")
    one.add_argument("--queries", type=int, default=64)
    one.add_argument("--index", action="store_true", help="build an index too")
    given = parser.parse_args()
    if given.does == "make":
        n = int(given.gb * 1e9 / (3 * given.side**2 * (4 if given.floats else 1)))
        make(given.path, n, given.side, given.samples, given.count, given.floats)
        print(f"{n} images in {given.path}")
    elif given.does == "stream":
        print(f"seconds: {said(stream(given.path, given.queries, given.index))}")
    else:
        command = given.command[given.command[:1] == ["--"] :]
        status, found = limited(command, int(given.gb * 1e9))
        print(f"exit status {status}; {said(found)}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
