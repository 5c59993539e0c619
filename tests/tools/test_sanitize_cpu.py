"""The kernels are clean under sanitizers, and the sanitizers see what they are there for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import sanitize_cpu

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]

# A fault, what the sanitizer must say of it, and which one.
PLANTED = {
    "an array one query too short": (
        "csrc/cpu/posterior/sweep-inl.h",
        "q = arena.take<Query<R>>(pl.Bp);",
        "q = arena.take<Query<R>>(pl.B - 1);",
        "address",
        "use-after-poison",
    ),
    "a call that does not wait for other threads": (
        "csrc/cpu/runtime/threads.cpp",
        "[&] { return job.inside.load() == 0; }",
        "[&] { return true; }",
        "thread",
        "data race",
    ),
}


def test_a_slice_is_clean(tmp_path, capfd) -> None:
    status = sanitize_cpu.main(["--isa", "baseline", "--every", "3", "--out", str(tmp_path)])
    assert status == 0, capfd.readouterr()


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, tmp_path, capfd) -> None:
    file, right, wrong, sanitizer, word = PLANTED[fault]
    tree = tmp_path / "tree"
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(sanitize_cpu.ROOT / part, tree / part)
    shutil.copy(sanitize_cpu.ROOT / "setup.py", tree)
    text = (tree / file).read_text()
    assert text.count(right) == 1
    Path(tree / file).write_text(text.replace(right, wrong))
    status = sanitize_cpu.main(
        ["--isa", "baseline", "--only", sanitizer, "--source", str(tree), "--out", str(tmp_path)]
    )
    assert status == 1
    assert word in capfd.readouterr().err
