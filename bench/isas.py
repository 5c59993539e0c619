"""The same kernels in other instruction sets than the one in use, as further runs of a case."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import OURS, Case
from bench.runs import Make, Run
from memokern.backends.cpu import native

OPS = ("mean", "nearest")  # in which they are timed
_BESIDE = {"avx512": ("avx2",)}  # unless others are asked for


def name_of(isa: str) -> str:
    """Of a run in this instruction set."""
    return f"{OURS} {isa}"


def beside(asked: str | None) -> tuple[str, ...]:
    """The instruction sets to time beside the one in use: those asked for, separated by commas, or
    AVX2 where AVX-512 is in use. None without compiled kernels.

    Raises: ValueError for one that was not built or that this machine does not run.
    """
    try:
        module = native.module()
    except ImportError:
        return ()
    usable = [name for name, supported in module.isas() if supported]
    if asked is None:
        return tuple(name for name in _BESIDE.get(module.isa(), ()) if name in usable)
    chosen = [name for name in asked.split(",") if name]
    for name in chosen:
        if name not in usable:
            raise ValueError(f"expected --isa as some of {', '.join(usable)}, got {name}")
    return tuple(name for name in chosen if name != module.isa())


def with_others(case: Case, make: Make, isas: tuple[str, ...]) -> tuple[Case, Make]:
    """The case with a run of ours in each of these instruction sets, and what makes its runs. Every
    run sets its instruction set ahead of itself, ours the one that is in use now."""
    if not isas or case.op not in OPS:
        return case, make
    module = native.module()
    mine, other = module.isa(), {name_of(isa): isa for isa in isas}

    def on_each(name: str) -> Run:
        run, isa = make(OURS if name in other else name), other.get(name, mine)

        def select() -> None:
            run.before()
            module.select_isa(isa)

        return replace(run, before=select)

    return replace(case, runs=(*case.runs, *other)), on_each
