"""A file that is larger than the memory that a process may have: streamed, indexed, audited.

    python -m tools.stream_file --gb 12 --limit-gb 2              # makes a file, and removes it
    python -m tools.stream_file --file rows.npy --audit 10000     # one that is there

The work is done in a process of its own in a memory control group of that limit (as root,
with cgroup 1 or 2), in which pages that were read of the file count too. Where no group can be
made, start it under `systemd-run --scope -p MemoryMax=2G`; the peak is measured in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
BLOCK = 20_000  # rows that are made together


def make(path: Path, n: int, dim: int) -> None:
    """Images of a kind, of real pages: 48 levels spread over the features, and noise."""
    rng = np.random.default_rng(0)
    head = np.lib.format.open_memmap(path, "w+", np.uint8, (n, dim))
    offset = head.offset
    del head
    with open(path, "r+b") as file:
        file.seek(offset)
        for start in range(0, n, BLOCK):
            count = min(BLOCK, n - start)
            coarse = rng.integers(0, 16, (count, 48), dtype=np.uint8) * 15
            noise = np.frombuffer(rng.bytes(count * dim), np.uint8).reshape(count, dim) >> 4
            file.write((noise + np.repeat(coarse, -(-dim // 48), axis=1)[:, :dim]).tobytes())


@contextlib.contextmanager
def group(limit: int) -> Iterator[tuple[Path, str] | None]:
    """A control group of this limit, and where it tells its peak; None where none can be made."""
    for root, limit_name, peak in GROUPS:
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
            yield folder, peak
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    yield None


def limited(command: list[str], limit: int) -> tuple[int, int | None]:
    """Runs the command with this much memory: its exit status, and the group's peak."""
    with group(limit) as made:
        if made is None:
            print("no control group could be made: nothing limits the memory here")
            return subprocess.run(command, check=False).returncode, None
        folder, peak = made

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        status = subprocess.run(command, check=False, preexec_fn=enter).returncode
        most = int((folder / peak).read_text()) if (folder / peak).exists() else None
        return status, most


class Peak:
    """The most memory of this process's own (not the file's pages) while it watches."""

    def __init__(self) -> None:
        self.own = self.pages = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            with open("/proc/self/status") as status:
                lines = dict(line.split(":", 1) for line in status)
            self.own = max(self.own, 1024 * int(lines["RssAnon"].split()[0]))
            self.pages = max(self.pages, 1024 * int(lines["RssFile"].split()[0]))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def work(path: str, queries: int, audit: int, rows: int, index: bool) -> None:
    """What the limited process does: prints the seconds of each step, and its peak, as JSON."""
    import torch

    import memokern

    found: dict[str, object] = {"threads": torch.get_num_threads()}

    def timed(name: str, call):
        start = time.perf_counter()
        value = call()
        found[name] = round(time.perf_counter() - start, 3)
        return value

    with Peak() as peak:
        data = memokern.StreamedSet(path, progress=False)
        if rows and rows < data.n:
            data = data.subset(slice(0, rows))
        found |= {"rows": data.n, "dim": data.dim, "gigabytes": data.n * data.dim / 1e9}
        found["before, own bytes"] = peak.own
        picked = torch.linspace(0, data.n - 1, max(queries, audit)).long()
        x = data.gather(picked)
        x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        timed("norms", lambda: data.center)
        if queries:
            p = timed("posterior", lambda: memokern.posterior(x[:queries], data, 5.0))
            near = timed("nearest", lambda: memokern.nearest(x[:queries], data, 2))
            assert bool(torch.isfinite(p.mean).all())
            assert torch.equal(near.index[:, 0], picked[:queries])
        if index:
            timed("index", lambda: data.build_index("pca", dims=(32, 64)))
            found["index bytes"] = data.index.nbytes
            p = timed("pruned", lambda: memokern.posterior(x[:16], data, 0.2, method="pruned"))
            assert bool((p.ess < 1 + 1e-6).all())
        if audit:
            found["queries"] = audit
            ratio = timed("audit", lambda: memokern.memorization.ratio(x[:audit], data))
            found["memorised"] = float(ratio.fraction)
    found |= {"peak, own bytes": peak.own, "peak, file pages": peak.pages}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", help="a .npy of rows; else one is made, and removed")
    parser.add_argument("--gb", type=float, default=12.0, help="of the file that is made")
    parser.add_argument("--dim", type=int, default=3072, help="of the file that is made")
    parser.add_argument("--limit-gb", type=float, default=2.0, help="memory that is allowed")
    parser.add_argument("--queries", type=int, default=64, help="of a posterior, and of nearest")
    parser.add_argument("--audit", type=int, default=0, help="queries of a memorisation audit")
    parser.add_argument("--rows", type=int, default=0, help="only so many rows of the file")
    parser.add_argument("--index", action="store_true", help="build an index too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.file, given.queries, given.audit, given.rows, given.index)
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = given.file
        if path is None:
            path = str(Path(folder) / "rows.npy")
            make(Path(path), int(given.gb * 1e9 / given.dim), given.dim)
        command = [sys.executable, "-m", "tools.stream_file", "--work", "--file", path]
        for name in ("queries", "audit", "rows"):
            command += [f"--{name}", str(getattr(given, name))]
        command += ["--index"] if given.index else []
        status, most = limited(command, int(given.limit_gb * 1e9))
        print(f"exit status {status}; peak of the group {most} bytes, the file's pages with it")
    sys.exit(status)


if __name__ == "__main__":
    main()
