"""The kernels of ``csrc/cuda`` on the emulator, one after the other as the host calls them."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import Query, Rows, State, Sums
from tests import cuda_emulator

F64 = torch.float64
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
TERMS = {1: 3, 2: 3, 3: 2, 4: 2}
TABLE, STATE = 10, 7


class Variant(NamedTuple):
    """What the sweep is compiled for. features 0: as few as hold D."""

    queries: int = 16
    cluster: int = 2
    tile: int = 32
    stages: int = 2
    bulk: bool = True
    features: int = 0


@functools.cache
def _fields(struct: str) -> list[str]:
    """The names of a struct's fields, each of 8 bytes, in their order, and what type they have."""
    text = (cuda_emulator.ROOT / "cuda" / "common" / "abi.h").read_text()
    found = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.DOTALL)
    assert found, struct
    out = []
    for line in re.sub(r"//.*", "", found[1]).replace("\n", " ").split(";"):
        if line.strip():
            pointer, kind, names = "*" in line, "f" if "double" in line else "i", line
            names = re.sub(r"\b(const|double|float|void|i64|u16)\b|\*", " ", names)
            out += [f"{'p' if pointer else kind}:{name.strip()}" for name in names.split(",")]
    return out


def params(struct: str, **values: Tensor | float | int | None) -> ctypes.Structure:
    """A filled struct of abi.h."""
    types = {"p": ctypes.c_void_p, "f": ctypes.c_double, "i": ctypes.c_longlong}
    fields = [(field[2:], types[field[0]]) for field in _fields(struct)]
    assert {name for name, _ in fields} == set(values), struct
    made = type(struct, (ctypes.Structure,), {"_fields_": fields})()
    assert ctypes.sizeof(made) == 8 * len(fields)
    for name, value in values.items():
        setattr(made, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return made


def run(source: str, macros: dict[str, int], entry: str, made: ctypes.Structure, x: int, y: int = 1,
        seed: int = 0) -> None:  # fmt: skip
    library = cuda_emulator.library(source, macros)
    assert library.memokern_emulate(entry.encode(), ctypes.addressof(made), x, y, seed) == 0


def sq_norms(rows: Rows) -> Tensor:
    """|y - center|^2 [N]."""
    out = torch.full((rows.n,), math.nan, dtype=F64)
    made = params(
        "NormsParams", rows=rows.data, center=rows.center, sq_norms=out, scale=rows.scale,
        shift=rows.shift, n=rows.n, d=rows.dim, stride=_stride(rows.data),
    )  # fmt: skip
    macros = {"MK_ROWS": CODES[rows.data.dtype]}
    run("sweep/norms.cu", macros, "memokern_sq_norms", made, -(-rows.n // 8))
    return out


def _stride(data: Tensor) -> int:
    return data.stride(0) if data.shape[0] > 1 else data.shape[1]


class Parts(NamedTuple):
    """What a sweep found."""

    table: Tensor
    states: Tensor
    acc: Tensor
    near: Tensor


def sweep(query: Query, rows: Rows, variant: Variant, clusters: int, seed: int) -> Parts:
    """Queries, then the sweep; outputs and work space begin as NaN."""
    (b, d), n, code = query.x.shape, rows.n, CODES[rows.data.dtype]
    features = variant.features or -(-d // (16 * variant.cluster)) * 16
    dp, q = features * variant.cluster, variant.queries
    terms = torch.full((TERMS[code], q, dp), -1, dtype=torch.int16)
    table, states = (
        torch.full(size, math.nan, dtype=F64) for size in ((TABLE, q), (clusters, STATE, q))
    )
    acc, near = (torch.full((clusters, q, dp), math.nan) for _ in range(2))
    macros = {"MK_ROWS": code}
    shared = {
        "x": query.x, "sigma": query.sigma, "alpha": query.alpha, "terms": terms, "table": table,
        "scale": rows.scale, "shift": rows.shift, "b": b, "d": d,
    }  # fmt: skip
    log = query.weighting == "log"
    made = params(
        "QueriesParams", **shared, temperature=query.temperature, center=rows.center, dp=dp,
        queries=q, depth=features, log=log,
    )  # fmt: skip
    run("sweep/queries.cu", macros, "memokern_queries", made, q, seed=seed)
    made = params(
        "SweepParams", **shared, rows=rows.data, sq_norms=rows.sq_norms, bias=query.bias,
        states=states, acc=acc, near=near, n=n, stride=_stride(rows.data),
    )  # fmt: skip
    macros |= {
        "MK_QUERIES": q, "MK_CLUSTER": variant.cluster, "MK_FEATURES": features,
        "MK_TILE": variant.tile, "MK_STAGES": variant.stages, "MK_BULK": int(variant.bulk),
        "MK_LOG": int(log),
    }  # fmt: skip
    run("sweep/sweep.cu", macros, "memokern_sweep", made, clusters * variant.cluster, seed=seed)
    return Parts(table, states, acc, near)


class Answer(NamedTuple):
    """What the last step writes; score is that of the gates."""

    state: State
    sums: Sums
    score: Tensor


def posterior(
    query: Query, rows: Rows, variant: Variant, clusters: int = 2, seed: int = 0,
    gates: tuple[float, float] = (0.0, -math.inf),
) -> Answer:  # fmt: skip
    """The whole call. gates: the c of Tikhonov, and log tau of empirical Bayes."""
    parts = sweep(query, rows, variant, clusters, seed)
    b, d = query.x.shape
    column = {
        name: torch.full((b,), math.nan, dtype=F64)
        for name in (*State._fields[:6], *Sums._fields[1:5])
    }
    wide = {name: torch.full((b, d), math.nan) for name in ("residual", "sum", "mean", "score")}
    zero = rows.shift + (128 * rows.scale if rows.data.dtype == torch.uint8 else 0.0)
    made = params(
        "FinishParams", **parts._asdict(), **column, **wide, x=query.x, sigma=query.sigma,
        alpha=query.alpha, temperature=query.temperature, center=rows.center, scale=rows.scale,
        zero=zero, b=b, d=d, dp=parts.acc.shape[2], parts=clusters, queries=variant.queries,
        tikhonov=gates[0], log_threshold=gates[1],
    )  # fmt: skip
    grid = (b, -(-d // 512))
    run("sweep/finish.cu", {}, "memokern_finish_state", made, *grid, seed=seed)
    state = State(
        *(column[name] for name in State._fields[:6]), wide["sum"], wide["residual"].clone(),
        rows.center,
    )  # fmt: skip
    run("sweep/finish.cu", {}, "memokern_finish_sums", made, *grid, seed=seed)
    sums = Sums(wide["mean"], *(column[n] for n in Sums._fields[1:5]), wide["residual"])
    return Answer(state, sums, wide["score"])
