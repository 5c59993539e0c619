"""How much memory this process may still take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
ENDLESS = 1 << 62


def available(proc: Path = Path("/proc"), groups: Path = GROUPS) -> int:
    """Bytes: what the system has left, or less where a control group or its like allows less. Pages
    of files do not count as taken, since they make room. Very many where nobody tells."""
    found = [ENDLESS]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        said = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * int(said.split()[1]))
    found += _left_by_groups(proc, groups)
    return max(0, min(found))


def _left_by_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What the control groups of this process leave, of either version of them."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            root, limit, taken = groups, "memory.max", "anon"
        elif "memory" in kinds.split(","):
            root, limit, taken = groups / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        own = root / path.lstrip("/")
        # In a container the path may be that of the host: its own group is the root there.
        for group in (own, *own.parents) if own.is_dir() else (root,):
            with contextlib.suppress(OSError, ValueError, KeyError):
                most = int((group / limit).read_text())  # "max" where there is none
                stat = dict(v.split() for v in (group / "memory.stat").read_text().splitlines())
                yield most - int(stat[taken])
            if group == root:
                break
