"""Every kernel compiles for every target, spills nothing and fits: the page in the documents says
so for all of them, and belongs to the kernels as they are; a few are compiled again here.

Compiled in a process of its own: in this one Triton interprets.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_interpreter import DEVICE

from memokern.backends.triton import variants as listing
from memokern.backends.triton.core.variant import Variant
from memokern.backends.triton.posterior import fused
from tools import aot, resources

ROOT = Path(__file__).resolve().parents[3]
PAGE = resources.read(resources.PAGE.read_text())
VARIANTS = {v.name: v for v in listing.variants()}


def compiling(code: str) -> str:
    """What a process prints whose Triton compiles."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_page_is_that_of_the_kernels_as_they_are() -> None:
    """If this fails, `make kernels` writes the page anew."""
    assert len(VARIANTS) == len(listing.variants())  # names are unique
    assert PAGE.options == {name: resources.words(v) for name, v in VARIANTS.items()}
    of_each = {(v.name, t) for v in VARIANTS.values() for t in aot.TARGETS if v.is_for(t)}
    assert PAGE.cells.keys() == of_each
    assert PAGE.digest == resources.digest(listing.variants())


def test_a_page_of_other_kernels_is_noticed(monkeypatch, tmp_path) -> None:
    """By another tile, alignment or signature, another constant, another line of code."""
    known, variants = PAGE.digest, listing.variants()
    i = next(i for i, v in enumerate(variants) if v.kernel.fn.__name__ == "accumulate_kernel")
    v = variants[i]
    for other in (
        v._replace(constexprs={**v.constexprs, "BLOCK_N": 2 * v.constexprs["BLOCK_N"]}),
        v._replace(aligned=v.aligned[:-1]),
        v._replace(signature={**v.signature, "n": "i64"}),
        v._replace(registers=128),
    ):
        assert resources.digest([*variants[:i], other, *variants[i + 1 :]]) != known
    assert resources.digest(variants[:-1]) != known
    with monkeypatch.context() as patch:
        patch.setattr(fused, "WORD", tl.constexpr(2 * fused.WORD.value))
        assert resources.digest(variants) != known
    shutil.copytree(resources.SOURCES, tmp_path / "triton")
    monkeypatch.setattr(resources, "SOURCES", tmp_path / "triton")
    assert resources.digest(variants) == known
    products = tmp_path / "triton" / "posterior" / "products.py"
    changed = products.read_text().replace("tl.zeros(", "tl.zeros_like(", 1)
    assert changed != products.read_text()
    products.write_text(changed)
    assert resources.digest(variants) != known


def test_a_page_of_other_options_is_noticed(monkeypatch) -> None:
    """What a vendor's compiler is given, where no field of a variant says it."""
    variants = listing.variants()
    options, on = Variant.options, Variant.on

    def fewer_stages(self: Variant, vendor: str) -> dict[str, int]:
        given = options(self, vendor)
        return {**given, "num_stages": min(given["num_stages"], 2)} if vendor == "hip" else given

    def unfused(self: Variant, vendor: str) -> dict[str, int]:
        return {**options(self, vendor), "enable_fp_fusion": False}

    def as_nvidia(self: Variant, vendor: str) -> Variant:
        return on(self, "cuda")

    for name, other in (("options", fewer_stages), ("options", unfused), ("on", as_nvidia)):
        with monkeypatch.context() as patch:
            patch.setattr(Variant, name, other)
            assert resources.digest(variants) != PAGE.digest
    assert resources.digest(variants) == PAGE.digest


def test_rows_are_told_as_they_are_there(monkeypatch) -> None:
    """One row is compiled only once the other was told; the table keeps its order."""
    a, b = [(name, "sm_80") for name in list(VARIANTS)[:2]]
    first = threading.Event()

    def one(name: str, target: str) -> dict[str, str]:
        if (name, target) == a:  # so the last of the table is the first to be there
            assert first.wait(60), "nothing is told until all are there"
        return {"variant": name, "target": target}

    told = []

    def tell(row: dict[str, str]) -> None:
        told.append((row["variant"], row["target"]))
        first.set()

    monkeypatch.setattr(aot, "_one", one)
    monkeypatch.setattr(aot, "_key", lambda variant, target: variant.name)
    # Threads, since processes would not see the event.
    pool = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", pool)
    rows = aot.table([a, b], 2, tell=tell)
    assert told == [b, a] and [row["variant"] for row in rows] == [a[0], b[0]]


def test_all_fit_and_multiply_on_the_matrix_cores() -> None:
    for (name, target), cell in PAGE.cells.items():
        limit = aot.TARGETS[target]
        assert cell.shared <= limit.shared / 1024 + 0.05, (name, target)
        assert cell.occupancy > 0 and 0 < cell.registers <= (512 if target == "gfx942" else 255)
        assert cell.matrix or not VARIANTS[name].matrix, (name, target)
    instructions = {
        t: {c.matrix for (n, where), c in PAGE.cells.items() if where == t and VARIANTS[n].matrix}
        for t in aot.TARGETS
    }
    assert instructions["sm_80"] == {"HMMA"} and "HGMMA" in instructions["sm_90"]
    # A warp group multiplies tiles of 64 queries and more.
    of_groups = [
        cell.matrix for (name, target), cell in PAGE.cells.items()
        if target == "sm_90" and VARIANTS[name].matrix
        and VARIANTS[name].constexprs.get("BLOCK_B", 0) >= 64
    ]  # fmt: skip
    assert len(of_groups) > 50 and set(of_groups) == {"HGMMA"}
    assert any(m.startswith("UTC") for m in instructions["sm_100"])


@pytest.mark.long
def test_a_few_compiled_again() -> None:
    """One variant of each kernel, the targets in turn."""
    of_kernel: dict[str, list[str]] = {}
    for name, v in VARIANTS.items():
        of_kernel.setdefault(v.kernel.fn.__name__, []).append(name)
    pairs = []
    for i, names in enumerate(of_kernel.values()):
        name = names[len(names) // 2]
        targets = [t for t in aot.TARGETS if VARIANTS[name].is_for(t)]
        pairs.append((name, targets[i % len(targets)]))
    rows = json.loads(compiling(
        f"import json; from tools import aot; print(json.dumps(aot.table({pairs!r}, 2)))"
    ))  # fmt: skip
    for row in rows:
        assert aot.problem(row, list(VARIANTS.values())) is None, row
        if triton.__version__ == PAGE.triton:
            cell = PAGE.cells[row["variant"], row["target"]]
            assert (row["registers"], round(row["shared"] / 1024, 1)) == (
                cell.registers,
                cell.shared,
            )


@pytest.mark.long
def test_described_rows_are_copied_by_the_device() -> None:
    """Whole tiles, not row by row; and the result of it still goes to the tensor cores."""
    counts = json.loads(compiling(
        "import json, torch\n"
        "from tools import aot\n"
        "from memokern.backends.triton.posterior import products\n"
        "found = []\n"
        "for described in (False, True):\n"
        "    v = products.dot_products_variant(torch.bfloat16, False, 'tf32x3', described)\n"
        "    text = aot.compiled(v, aot.TARGETS['sm_90']).asm['ptx']\n"
        "    found.append([text.count(s) for s in ('cp.async.bulk.tensor', 'wgmma.mma_async')])\n"
        "print(json.dumps(found))"
    ))  # fmt: skip
    (copies, products), (described_copies, described_products) = counts
    assert copies == 0 and described_copies > 0
    assert products == described_products > 0


@pytest.mark.long
def test_what_is_no_good_is_noticed() -> None:
    """A product of float32 in too few threads spills, and is not on the matrix cores."""
    row = json.loads(compiling(
        "import dataclasses, json\n"
        "from tools import aot\n"
        "from memokern.backends.triton.scan import kernels\n"
        "v = kernels.first_level_variant(kernels.LIST, True, False)._replace(num_warps=2)\n"
        "print(json.dumps(dataclasses.asdict(aot.resources(v, aot.TARGETS['sm_80']))))"
    ))  # fmt: skip
    variant = VARIANTS[row["variant"]]
    assert "bytes spilled" in aot.problem(row, [variant])
    whole = {**row, "spills": 0}
    assert aot.problem(whole, [variant]) is None
    assert "matrix" in aot.problem(whole, [variant._replace(matrix=True)])
    wide = variant._replace(matrix=True, constexprs={**variant.constexprs, "BLOCK_B": 64})
    hopper = {**whole, "target": "sm_90", "matrix": "HMMA.16816.F32"}
    assert "warp group" in aot.problem(hopper, [wide])
    assert aot.problem({**hopper, "matrix": "HGMMA.64x64x8.F32"}, [wide]) is None
    assert "shared memory" in aot.problem({**whole, "shared": 200 << 10}, [variant])


def test_occupancy() -> None:
    a100, mi300 = aot.TARGETS["sm_80"], aot.TARGETS["gfx942"]
    # 65,536 registers, 128 a thread: 16 warps of 64; 33 KiB of 164: four blocks of four warps.
    assert aot.occupancy(a100, 128, 0, 4) == 0.25
    assert aot.occupancy(a100, 32, 33 * 1024, 4) == 0.25
    assert aot.occupancy(a100, 16, 0, 1) == 0.5  # 32 blocks at most
    # 512 registers a lane: 128 leave room for four waves on each unit.
    assert aot.occupancy(mi300, 128, 0, 4) == 0.5
    assert aot.occupancy(mi300, 64, 40 * 1024, 4) == 0.125  # one block


@pytest.mark.gpu
def test_the_gpu_takes_what_was_said() -> None:
    """A launch on the machine's own GPU takes the registers that were foretold."""
    import torch

    name = "sm_{}{}".format(*torch.cuda.get_device_capability(DEVICE))
    if name not in aot.TARGETS or triton.__version__ != PAGE.triton:
        pytest.skip(f"there is no page with a column for {name} and Triton {triton.__version__}")
    variant = VARIANTS["listed_weights plain"]
    code = aot.compiled(variant, aot.TARGETS[name])
    code._init_handles()
    assert code.n_regs == PAGE.cells[variant.name, name].registers and code.n_spills == 0
