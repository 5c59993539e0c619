"""The kernels of ``csrc/cuda`` on the emulator, one after the other as the host calls them."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import BasicSums, Gradients, Query, Rows, State, Sums
from tests import cuda_emulator

F64 = torch.float64
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
TERMS = {1: 3, 2: 3, 3: 2, 4: 2}
TABLE, STATE, SUMS, GRADIENT_TABLE = 12, 7, 8, 2


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
    headers = sorted((cuda_emulator.ROOT / "cuda").glob("*/abi.h"))
    text = "".join(header.read_text() for header in headers)
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
    made.tensors = values  # which live as long as it does
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


class _Split(NamedTuple):
    """What every sweep begins with: the queries' terms and their table."""

    macros: dict[str, int]  # of a sweep
    features: int
    dp: int
    terms: Tensor
    table: Tensor
    shared: dict[str, Tensor | float | int]  # fields of several structs


def _split(query: Query, rows: Rows, variant: Variant, seed: int) -> _Split:
    (b, d), code = query.x.shape, CODES[rows.data.dtype]
    features = variant.features or -(-d // (16 * variant.cluster)) * 16
    dp, q = features * variant.cluster, variant.queries
    terms = torch.full((TERMS[code], q, dp), -1, dtype=torch.int16)
    table = torch.full((TABLE, q), math.nan, dtype=F64)
    shared = {
        "x": query.x, "sigma": query.sigma, "alpha": query.alpha, "terms": terms, "table": table,
        "scale": rows.scale, "shift": rows.shift, "b": b, "d": d,
    }  # fmt: skip
    log = query.weighting == "log"
    made = params(
        "QueriesParams", **shared, temperature=query.temperature, center=rows.center, dp=dp,
        queries=q, depth=features, log=log,
    )  # fmt: skip
    run("sweep/queries.cu", {"MK_ROWS": code}, "memokern_queries", made, q, seed=seed)
    macros = {
        "MK_ROWS": code, "MK_QUERIES": q, "MK_CLUSTER": variant.cluster, "MK_FEATURES": features,
        "MK_TILE": variant.tile, "MK_STAGES": variant.stages, "MK_BULK": int(variant.bulk),
        "MK_LOG": int(log),
    }  # fmt: skip
    return _Split(macros, features, dp, terms, table, shared)


def _nan(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def sweep(query: Query, rows: Rows, variant: Variant, clusters: int, seed: int) -> Parts:
    """Queries, then the sweep; outputs and work space begin as NaN."""
    begun, q = _split(query, rows, variant, seed), variant.queries
    states = _nan(clusters, STATE, q)
    acc, near = (_nan(clusters, q, begun.dp, dtype=torch.float32) for _ in range(2))
    made = params(
        "SweepParams", **begun.shared, rows=rows.data, sq_norms=rows.sq_norms, bias=query.bias,
        states=states, acc=acc, near=near, n=rows.n, stride=_stride(rows.data),
    )  # fmt: skip
    grid = clusters * variant.cluster
    run("sweep/sweep.cu", begun.macros, "memokern_sweep", made, grid, seed=seed)
    return Parts(begun.table, states, acc, near)


def zero_of(rows: Rows) -> float:
    """The value of a row that enters products as 0."""
    return rows.shift + (128 * rows.scale if rows.data.dtype == torch.uint8 else 0.0)


def backward(
    query: Query, rows: Rows, sums: BasicSums, grads: BasicSums, variant: Variant,
    clusters: int = 2, seed: int = 0,
) -> Gradients:  # fmt: skip
    """The whole backward call, of one block of queries."""
    begun, q, (b, d) = _split(query, rows, variant, seed), variant.queries, query.x.shape
    mean, grad_mean = (v.mean.float().contiguous() for v in (sums, grads))
    pairs = _nan(q, rows.n, dtype=torch.float32) if query.bias is not None else None
    columns = {name: _nan(b) for name in ("grad_sigma", "grad_alpha", "grad_temperature")}
    grad_x = _nan(b, d, dtype=torch.float32)
    grad_bias = _nan(0 if query.bias is None else rows.n)
    made = params(
        "GradientParams", **begun.shared, **columns, rows=rows.data, sq_norms=rows.sq_norms,
        bias=query.bias, center=rows.center, temperature=query.temperature, mean=mean,
        grad_terms=torch.full_like(begun.terms, -1), grad_table=_nan(GRADIENT_TABLE, q),
        grad_mean=grad_mean, log_z=sums.log_z, mean_logit=sums.mean_logit,
        mean_bias=sums.mean_bias, weight_sq=sums.weight_sq, grad_log_z=grads.log_z,
        grad_mean_logit=grads.mean_logit, grad_mean_bias=grads.mean_bias,
        grad_weight_sq=grads.weight_sq, sums=_nan(clusters, SUMS, q),
        acc=_nan(clusters, q, begun.dp, dtype=torch.float32),
        near=_nan(clusters, q, begun.dp, dtype=torch.float32), pairs=pairs, grad_x=grad_x,
        grad_bias=grad_bias if pairs is not None else None, zero=zero_of(rows), n=rows.n,
        dp=begun.dp, stride=_stride(rows.data), parts=clusters, queries=q, first=1,
    )  # fmt: skip
    small = {"MK_ROWS": begun.macros["MK_ROWS"]}
    run("gradient/terms.cu", small, "memokern_gradient_terms", made, q, seed=seed)
    macros = {**begun.macros, "MK_GRADIENT": 1}
    grid = clusters * variant.cluster
    run("gradient/gradient.cu", macros, "memokern_gradient", made, grid, seed=seed)
    if pairs is not None:
        run("gradient/ties.cu", small, "memokern_gradient_ties", made, b, seed=seed)
        run("gradient/bias.cu", {}, "memokern_gradient_bias", made, -(-rows.n // 256), seed=seed)
    run("gradient/finish_gradient.cu", {}, "memokern_gradient_finish", made, b, seed=seed)
    return Gradients(grad_x, *columns.values(), grad_bias, _nan(0), _nan(0))


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
    made = params(
        "FinishParams", **parts._asdict(), **column, **wide, x=query.x, sigma=query.sigma,
        alpha=query.alpha, temperature=query.temperature, center=rows.center, scale=rows.scale,
        zero=zero_of(rows), b=b, d=d, dp=parts.acc.shape[2], parts=clusters,
        queries=variant.queries, tikhonov=gates[0], log_threshold=gates[1],
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
