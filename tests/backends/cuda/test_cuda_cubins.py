"""Every CUDA kernel compiles for every target, has no local memory and fits: the page in the
documents says so for all of them, and belongs to the kernels as they are; a few are compiled again
here."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from memokern.backends.cuda import variants as listing
from memokern.backends.cuda.core import sources
from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.posterior import planner
from memokern.backends.cuda.posterior.variants import (
    finish_variant,
    queries_variant,
    sweep_variant,
)
from tools import cubins

VARIANTS = {v.name: v for v in listing.variants()}
needs_compiler = pytest.mark.skipif(
    cubins.unavailable() is not None, reason=cubins.unavailable() or "it is here"
)


def _check(variant: Variant, target: str, nvcc: bool = False) -> cubins.Resources:
    found = cubins.resources(variant, target, nvcc)
    assert cubins.problem(vars(found), variant) is None
    return found


@needs_compiler
def test_the_usual_sweep_and_what_goes_before_and_after() -> None:
    tile = planner.tile_of(torch.uint8, 8, 384, 16)
    assert tile is not None
    found = _check(sweep_variant(torch.uint8, tile, True, False), "sm_90a")
    assert found.found == ("HMMA", "UBLKCP") and found.spills == 0
    # Two blocks share the registers of a multiprocessor.
    assert tile.resident == 2 and found.registers <= 128
    _check(queries_variant(torch.uint8), "sm_80")
    _check(finish_variant(), "sm_90a")


@needs_compiler
@pytest.mark.long
def test_a_sample_of_all() -> None:
    for variant, target in random.Random(0).sample(cubins.pairs(list(VARIANTS.values())), 30):
        _check(variant, target)


@pytest.mark.long
@pytest.mark.skipif(not cubins.shutil.which("nvcc"), reason="there is no nvcc")
def test_nvcc_compiles_them_too() -> None:
    tile = planner.tile_of(torch.float32, 8, 256, 16)
    assert tile is not None
    for target in ("sm_90a", "sm_100a"):
        _check(sweep_variant(torch.float32, tile, True, True), target, nvcc=True)


@needs_compiler
def test_what_is_no_good_is_refused(tmp_path: Path, monkeypatch) -> None:
    """A kernel with an array that does not fit the registers, and without products."""
    (tmp_path / "bad.cu").write_text("""
extern "C" __global__ void bad(float* p, int n) {
  float kept[64] = {};
  for (int i = 0; i < n; i++) kept[i * 7 & 63] += p[i];
  p[0] = kept[n & 63];
}""")
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    variant = Variant("bad.cu", ("bad",), matrix=("HMMA",))
    row = vars(cubins.resources(variant, "sm_90a"))
    assert row["spills"] >= 256
    assert "in local memory" in str(cubins.problem(row, variant))
    if cubins.disassembler() is not None:
        said = cubins.problem({**row, "spills": 0}, variant)
        assert said == "its machine code has no HMMA"
    large = {**row, "spills": 0, "found": ("HMMA",), "shared": 228 << 10}
    assert "of shared memory" in str(cubins.problem(large, variant))
    assert cubins.problem({**row, "error": "no"}, variant) == "no"


def test_the_page_is_that_of_the_kernels_as_they_are() -> None:
    """If this fails, `make cubins` writes the page anew."""
    page = cubins.PAGE.read_text()
    assert f", kernels {cubins.digest(listing.variants())}." in page
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", page, re.MULTILINE)[2:]
    assert [name for name, _ in rows] == list(VARIANTS)
    for name, cells in rows:
        for target, cell in zip(cubins.TARGETS, cells.split(" | "), strict=True):
            assert VARIANTS[name].is_for(target) == bool(re.fullmatch(r"\d+ r, [\d.]+ K", cell))


def test_keys_are_of_the_code_alone(tmp_path: Path, monkeypatch) -> None:
    """Comments and layout change no key; a header, a macro and the compiler do."""
    (tmp_path / "one.h").write_text("int f(); // says so")
    (tmp_path / "one.cu").write_text('#include "one.h"\n#include "elsewhere.h"\nint g();\n')
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    variant = Variant("one.cu", ("g",))

    def key(by: str = "NVRTC 13.0", variant: Variant = variant) -> str:
        cubins.program.cache_clear()
        return cubins.key(variant, "sm_90a", by)

    first = key()
    (tmp_path / "one.h").write_text("/* says\n more */ int  f();\n\n")
    assert key() == first
    others = {key("NVRTC 13.1"), key(variant=variant._replace(macros=(("MK_A", 1),)))}
    (tmp_path / "one.h").write_text("int f(int);")
    others.add(key())
    assert len(others) == 3 and first not in others
    cubins.program.cache_clear()


def test_a_run_goes_on_where_one_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cubins, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(cubins, "compiler_name", lambda nvcc=False: "a compiler")
    made: list[str] = []

    def one(variant: Variant, target: str, nvcc: bool) -> dict:
        made.append(variant.name)
        row = {"variant": variant.name, "target": target, "registers": 40, "spills": 0}
        return {**row, "shared": 512, "found": variant.matrix}

    monkeypatch.setattr(cubins, "_one", one)
    asked = cubins.pairs(list(VARIANTS.values()))[:6]
    assert cubins.table(asked, 1, -1.0) == [] and made == []
    assert len(cubins.table(asked[:4], 1, 60.0)) == len(made) == 4
    rows = cubins.table(asked, 1, 60.0)
    assert len(made) == 6 and [(r["variant"], r["target"]) for r in rows] == [
        (v.name, t) for v, t in asked
    ]
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 6
    text = cubins.page(rows, [asked[0][0]], "a compiler")
    assert f"| {asked[0][0].name} | 40 r, 0.5 K | 40 r, 0.5 K | 40 r, 0.5 K |" in text
    monkeypatch.setattr(
        cubins, "_one", lambda v, t, nvcc: {"error": "no", "variant": v.name, "target": t}
    )
    more = cubins.pairs(list(VARIANTS.values()))[6:7]
    assert [row["error"] for row in cubins.table(more, 1, 60.0)] == ["no"]
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 6
