"""The CUDA kernels are clean under sanitizers on the emulator, and planted faults are found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import sanitize_cuda

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


class Fault(NamedTuple):
    """In a file of csrc/cuda, what is right and what is wrong; the build that finds it, a word of
    what it says, and the program that is run."""

    file: str
    right: str
    wrong: str
    build: str
    word: str
    main: str = "sanitize"


PLANTED = {
    "copies of other bytes than are expected": Fault(
        "sweep/fetch.h", "rows * bytes)", "rows * bytes - 16)", "plain", "more bytes came"
    ),
    "a copy that never comes": Fault(
        "sweep/fetch.h", "rows * bytes)", "rows * bytes + 16)", "plain", "no thread can go on"
    ),
    "a barrier that some threads do not reach": Fault(
        "sweep/loop.h",
        "marked = block_any(marked);",
        "if (warp) marked = block_any(marked);",
        "plain",
        "different barriers",
    ),
    "a block that goes while others read from it": Fault(
        "sweep/loop.h",
        "    cluster_wait();\n  }\n",
        "    if (i + 1 < tiles.count || cluster_rank()) cluster_wait();\n    else return;\n  }\n",
        "plain",
        "left after it arrived",
    ),
    "a missing barrier between warps": Fault(
        "sweep/exact.h",
        "  block_sync();\n  for (int i = thread_index(); i < count",
        "  for (int i = thread_index(); i < count",
        "thread",
        "data race",
    ),
    "a missing barrier between blocks": Fault(
        "sweep/loop.h",
        "    cluster_wait();\n    bool marked = false;",
        "    bool marked = false;",
        "plain",
        "arrives twice",
    ),
    "a block's own barrier in the place of the cluster's": Fault(
        "sweep/loop.h",
        "    cluster_wait();\n    bool marked = false;",
        "    block_sync();\n    bool marked = false;",
        "plain",
        "arrives twice",
    ),
    "an array of shared memory that is too short": Fault(
        "sweep/variant.h",
        "next_array<float>(next, kSplits * kVectors * kPartPitch)",
        "next_array<float>(next, kSplits * kVectors * kPartPitch - 16)",
        "address",
        "use-after-poison",
    ),
    "lanes that are left out where all come together": Fault(
        "sweep/queries.cu",
        "shared[i * kQueryWarps + warp] = all[i]",
        "shared[i * kQueryWarps + warp_index()] = all[i]",
        "plain",
        "no thread can go on",
    ),
    "a list that is overwritten before all have read it": Fault(
        "scan/scan_settle.cu",
        "    block_sync();  // all have read, and know",
        "    // all have read, and know",
        "thread",
        "data race",
        "sanitize_lists",
    ),
    "coordinates beyond the tile": Fault(
        "scan/scan_bounds.cu",
        "next_array<float>(next, kTileRows * kRowPitch)",
        "next_array<float>(next, kTileRows * kRowPitch - 2)",
        "address",
        "use-after-poison",
        "sanitize_lists",
    ),
    "neighbours that take places while others read them": Fault(
        "nearest/neighbours.h",
        "  block_sync();\n  MK_UNROLL\n  for (int j = 0; j < kEach; j++)\n    if (rank",
        "  MK_UNROLL\n  for (int j = 0; j < kEach; j++)\n    if (rank",
        "thread",
        "data race",
        "sanitize_lists",
    ),
    "sums of a block that the next ones overwrite": Fault(
        "common/block.h",
        "sum += shared[w];\n  block_sync();",
        "sum += shared[w];",
        "thread",
        "data race",
        "sanitize_lists",
    ),
    "a row that does not exist": Fault(
        "listed/listed_pairs.cu",
        "const i64 b = query_of(p, i), n = p.index[i];",
        "const i64 b = query_of(p, i), n = p.index[i + 1];",
        "address",
        "heap-buffer-overflow",
        "sanitize_lists",
    ),
}


@pytest.mark.parametrize("build", ["address", "thread"])
def test_a_slice_is_clean(build: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = sanitize_cuda.main(["--only", build, "--every", "3", "--out", str(tmp_path)])
    assert status == 0, capfd.readouterr()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault, tree = PLANTED[name], tmp_path / "tree"
    shutil.copytree(sanitize_cuda.ROOT / "csrc", tree / "csrc")
    path = tree / "csrc" / "cuda" / fault.file
    text = path.read_text()
    assert text.count(fault.right) == 1
    path.write_text(text.replace(fault.right, fault.wrong))
    asked = ["--only", fault.build, "--main", fault.main, "--every", "10"]
    status = sanitize_cuda.main([*asked, "--source", str(tree), "--out", str(tmp_path)])
    assert status == 1
    assert fault.word in capfd.readouterr().err
