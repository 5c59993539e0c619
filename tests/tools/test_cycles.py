"""The loops found are the right ones, in a listing and in the build; simulations are read right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools import cycles

ROOT = Path(__file__).resolve().parents[2]

# As objdump writes it, shortened: an outer loop with a loop in it, two loops with as many
# multiply-adds, one with a call, and functions with more of them that are not asked for.
LISTING = """
avx2.o:     file format elf64-x86-64

Disassembly of section .text:

0000000000000010 <void ns::micro_kernel<float, 12, 1, 1, 16>(float const*, long)>:
  10:\tvfmadd231ps %ymm0,%ymm1,%ymm2
  14:\tvfmadd231ps %ymm0,%ymm1,%ymm3
  18:\tvfmadd231ps %ymm0,%ymm1,%ymm4
  1c:\tjne    10 <void ns::micro_kernel<float, 12, 1, 1, 16>(float const*, long)>

0000000000000020 <void ns::micro_kernel<float, 6, 2, 1, 16>(float const*, long) [clone .isra.0]>:
  20:\tmov    %rdi,%rax
  24:\tvxorps %xmm2,%xmm2,%xmm2
  28:\tnopl   0x0(%rax)
  2c:\tvbroadcastss (%rax),%ymm1
  30:\tvmulps 0x0(%rip),%ymm1,%ymm0        # 38 <void ns::micro_kernel<float, 6, 2, 1, 16>+0x18>
  38:\tvfmadd231ps (%rdx),%ymm1,%ymm2
  3c:\tvfmadd231ps %ymm0,%ymm1,%ymm3
  40:\tadd    $0x4,%rax
  44:\tcmp    %rax,%rcx
  48:\tjne    2c <void ns::micro_kernel<float, 6, 2, 1, 16>+0xc>
  4c:\tvfmadd231ps %ymm0,%ymm1,%ymm2
  50:\tje     5c <void ns::micro_kernel<float, 6, 2, 1, 16>+0x3c>
  54:\tvfmadd231ps %ymm0,%ymm1,%ymm2
  58:\tvfmadd231ps %ymm0,%ymm1,%ymm3
  5c:\tdec    %r8
  60:\tjne    24 <void ns::micro_kernel<float, 6, 2, 1, 16>+0x4>
  64:\tvmovups (%rdx),%ymm0
  68:\tvfmadd213ps %ymm0,%ymm1,%ymm2
  6c:\tvfnmadd231ps %ymm0,%ymm1,%ymm3
  70:\tadd    $0x20,%rdx
  74:\tcmp    %rdx,%rcx
  78:\tja     64 <void ns::micro_kernel<float, 6, 2, 1, 16>+0x44>
  7c:\tvfmadd231ps %ymm0,%ymm1,%ymm2
  80:\tvfmadd231ps %ymm0,%ymm1,%ymm3
  84:\tvfmadd231ps %ymm0,%ymm1,%ymm4
  88:\tcall   10 <void ns::micro_kernel<float, 12, 1, 1, 16>(float const*, long)>
  8c:\tjmp    7c <void ns::micro_kernel<float, 6, 2, 1, 16>+0x5c>

Disassembly of section .text._ZN2ns5block:

0000000000000000 <ns::PairQueries<float>::block<ns::Plain, 6, 2>(int const*) const>:
   0:\tvpmaddwd %ymm0,%ymm4,%ymm4
   4:\tvpaddd %ymm4,%ymm2,%ymm2
   8:\tsub    $0x1,%rsi
   c:\tjne    0 <ns::PairQueries<float>::block<ns::Plain, 6, 2>(int const*) const>

Disassembly of section .text._ZN2ns6block2:

0000000000000000 <ns::PairQueries<float>::block<ns::Vnni, 6, 2>(int const*) const>:
   0:\t{vex} vpdpwssd %ymm0,%ymm4,%ymm1
   6:\t{vex} vpdpwssd %ymm0,%ymm4,%ymm2
   c:\tjne    0 <ns::PairQueries<float>::block<ns::Vnni, 6, 2>(int const*) const>
"""


def test_the_shortest_of_the_loops_with_most_multiply_adds_is_found() -> None:
    assert cycles.find(cycles.FIRST, "avx2", LISTING) == [
        "vmovups (%rdx),%ymm0",
        "vfmadd213ps %ymm0,%ymm1,%ymm2",
        "vfnmadd231ps %ymm0,%ymm1,%ymm3",
        "add    $0x20,%rdx",
        "cmp    %rdx,%rcx",
        "ja loop",
    ]
    assert len(cycles.find(cycles.INTEGERS, "avx2", LISTING)) == 4
    for isa in ("avx2 with VNNI", "avx512"):
        loop = cycles.find(cycles.INTEGERS, isa, LISTING)
        assert len(loop) == 3 and cycles.multiplies(loop) == 2


def test_comments_and_names_of_the_disassembler_are_left_out() -> None:
    code = LISTING.partition("[clone .isra.0]>:\n")[2]
    first = next(cycles.straight_loops(code))
    assert first[1] == "vmulps 0x0(%rip),%ymm1,%ymm0" and first[-1] == "jne loop"


def test_a_kernel_without_a_loop_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"No loop with multiply-adds in .*scan_block"):
        cycles.find(cycles.SCAN, "avx2", LISTING)


@pytest.mark.parametrize("isa", cycles.LANES)
def test_the_loops_of_the_build_are_whole_blocks_in_registers(isa: str) -> None:
    """A block of M x 2 vectors: 2 M multiply-adds, loads of M numbers and 2 vectors, no store."""
    built = list(ROOT.glob(f"build/temp*/csrc/cpu/isa/{isa.split()[0]}.o"))
    if not shutil.which("objdump") or not built:
        pytest.skip("no objdump, or no objects of a build for x86-64")
    listing = cycles.disassembly(isa, ROOT / "build")
    rows = 12 if isa == "avx512" else 6
    for kernel in (cycles.FIRST, cycles.SECOND, cycles.INTEGERS, cycles.SCAN):
        loop = cycles.find(kernel, isa, listing)
        of_memory = [text for text in loop if text.startswith(("v", "{vex} v")) and "(" in text]
        assert cycles.multiplies(loop) == 2 * rows, kernel
        assert len(of_memory) == rows + 2, kernel
        assert not any(text.endswith(")") for text in of_memory), kernel
    # Six of the polynomial, two of the reduction, two sums.
    assert cycles.multiplies(cycles.find(cycles.WEIGH, isa, listing)) == 10
    loop = cycles.find(cycles.INTEGERS, isa, listing)
    instruction = "vpmaddwd" if isa == "avx2" else "vpdpwssd"
    assert sum(instruction in text for text in loop) == 2 * rows
    assert ("vpaddd" in " ".join(loop)) == (isa == "avx2")  # the sums of the two instructions


@pytest.mark.skipif(not shutil.which("llvm-mca"), reason="llvm-mca is not installed")
def test_the_simulator_is_read_right() -> None:
    """Cascade Lake runs multiply-adds on two ports, with a latency of four cycles."""
    apart = [f"vfmadd231ps %zmm0,%zmm1,%zmm{i}" for i in range(2, 18)]
    found = cycles.simulate([*apart, "jne loop"], "cascadelake", "llvm-mca")
    assert found.cycles == pytest.approx(8, rel=0.02)
    assert found._replace(cycles=8) == (8, 16, 2, "Port0, Port5", "SKX")
    chain = cycles.simulate(["vfmadd231ps %zmm0,%zmm1,%zmm2"], "cascadelake", "llvm-mca")
    assert chain.cycles == pytest.approx(4, rel=0.02) and chain.bound == "waiting"


def test_ratios_are_left_out_where_a_model_is_wrong() -> None:
    cpu = cycles.Cpu("a", "b", "avx512", 2)
    floats = cycles.Count(24, 24, 1, "Port0", "X")
    counts = dict.fromkeys(cycles.KERNELS, floats)
    cells = cycles.column(cpu, counts)
    # 64 x 3072 multiply-adds at 16 a cycle, or 32 of pairs: 12288 cycles, or 6144; 1010 beside.
    assert (
        cells[cycles.FIRST] == "24.0; 16.0 (Port0)" and cells["sweep, the same"] == "1.32 to 1.86"
    )
    assert cells["products in floats, share of the peak"] == "1.00"
    cells = cycles.column(cpu, counts | {cycles.INTEGERS: floats._replace(units=2)})
    assert cells["sweep, the same"] == cells["first product, floats / integers"] == "–"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no avx2\.o in .*setup\.py"):
        cycles.disassembly("avx2", tmp_path)
    with pytest.raises(SystemExit, match="There is no no-such-mca"):
        cycles.table("no-such-mca", tmp_path)


def test_the_page_has_a_row_for_each_loop() -> None:
    """If this fails: python -m tools.cycles --markdown docs/performance.md"""
    page = (ROOT / "docs" / "performance.md").read_text()
    said = page.split(cycles.BEGIN)[1].split(cycles.END)[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", said, re.MULTILINE))
    assert rows.keys() >= cycles.KERNELS.keys() and "never timed" in said
    columns = said.partition("\n| | ")[2].partition(" |\n")[0].split(" | ")
    # No loop of whole blocks can beat the units that the maker counts.
    units = [
        int(x) for x in re.findall(r"\((\d)\)", rows["vectors a cycle: floats, pairs (maker)"])
    ]
    for kernel in (cycles.FIRST, cycles.SECOND, cycles.INTEGERS, cycles.SCAN):
        for cpu, cell, most in zip(columns, rows[kernel].split(" | "), units, strict=True):
            assert float(cell.split(";")[0]) >= (24 if "avx512" in cpu else 12) / most, cpu
