"""What reaches the driver: grids, clusters, shared memory, streams, and every argument, byte by
byte; nothing runs."""

from __future__ import annotations

import ctypes
import math
import re
import threading
from pathlib import Path

import pytest
import torch

from memokern.backends.cuda import BACKEND, abi
from memokern.backends.cuda.core import cache, driver, sources
from memokern.backends.cuda.core.variant import Variant
from memokern.backends.cuda.plane import variants as plane
from memokern.backends.cuda.posterior import launch, planner
from memokern.backends.cuda.posterior.tiles import shared_bytes
from memokern.calls import BasicSums, Query, Rows, State, Sums
from memokern.util import torch_internals
from tests.backends.cuda import fake_driver
from tests.backends.cuda.fake_driver import H100, STREAMS, installed

F32, F64, U8 = torch.float32, torch.float64, torch.uint8
INF = float("inf")


def query_of(b: int, d: int, **fields: object) -> Query:
    one = torch.ones(b, dtype=F64)
    return Query(torch.zeros(b, d), one, one, one)._replace(**fields)


def rows_of(n: int, d: int, dtype: torch.dtype = F32, known: bool = True) -> Rows:
    about = {"center": torch.zeros(d, dtype=F64), "sq_norms": torch.ones(n, dtype=F64)}
    return Rows(torch.zeros(n, d, dtype=dtype), **(about if known else {}))


def macro(variant: Variant, name: str) -> int:
    return dict(variant.macros)[name]


def test_three_launches(monkeypatch) -> None:
    b, n, d = 5, 1000, 300
    query, rows = query_of(b, d, bias=torch.zeros(n, dtype=F64)), rows_of(n, d)
    with installed() as fake:
        out = BACKEND.posterior(query, rows)
    assert isinstance(out, Sums) and out.mean.shape == out.residual.shape == (b, d)
    split, sweep, join = fake.launches
    tile = planner.plan(b, n, d, F32, H100)
    assert tile is not None
    clusters = min(132 * tile.resident // tile.cluster, -(-n // tile.rows))
    names = ["memokern_queries", "memokern_sweep", "memokern_finish_sums"]
    assert [found.entry for found in fake.launches] == names
    assert (split.grid, split.threads, split.shared) == ((16, 1), 256, 512)
    assert (sweep.grid, sweep.threads) == ((clusters * tile.cluster, 1), 256)
    assert (join.grid, join.threads, join.shared) == ((b, 1), 128, 0)
    assert sweep.shared == shared_bytes(F32, tile)
    assert fake.prepared[
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", "memokern_sweep", 0
    ] == shared_bytes(F32, tile)

    q, s, f = (found.argument for found in fake.launches)
    for arg in (q, s, f):
        assert (arg.b, arg.d, arg.scale) == (b, d, 1.0)
        assert arg.x == query.x.data_ptr() and arg.table == q.table
        assert arg.sigma == query.sigma.data_ptr() and arg.alpha == query.alpha.data_ptr()
    assert q.dp == f.dp == tile.cluster * tile.features and q.depth == tile.features
    assert (q.shift, s.shift, f.zero) == (0.0, 0.0, 0.0)
    assert q.log == 0 and q.queries == f.queries == tile.queries
    assert q.temperature == f.temperature == query.temperature.data_ptr()
    assert q.center == f.center == rows.center.data_ptr()
    assert (s.rows, s.bias) == (rows.data.data_ptr(), query.bias.data_ptr())
    assert (s.sq_norms, s.n, s.stride) == (rows.sq_norms.data_ptr(), n, d)
    assert (s.terms, s.states, s.acc, s.near) == (q.terms, f.states, f.acc, f.near)
    assert f.parts == clusters
    for name in out._fields:
        assert getattr(f, name) == getattr(out, name).data_ptr()
    assert [f.key, f.m, f.s, f.sum, f.score] == [None] * 5
    assert (f.tikhonov, f.log_threshold) == (0.0, -INF)


def test_a_state_and_the_weighting_log() -> None:
    query = query_of(3, 400, weighting="log")
    rows = rows_of(70, 400, U8)._replace(scale=2 / 255, shift=-1.0)
    with installed() as fake:
        state = BACKEND.posterior_state(query, rows)
    assert isinstance(state, State)
    assert fake.launches[-1].entry == "memokern_finish_state"
    f = fake.launches[-1].argument
    for name in ("key", "m", "s", "s_v", "s_bias", "s_sq", "residual"):
        assert getattr(f, name) == getattr(state, name).data_ptr()
    assert f.zero == -1.0 + 128 * (2 / 255) and fake.launches[1].argument.shift == -1.0
    assert f.sum == state.acc.data_ptr() and f.mean is None
    assert fake.launches[0].argument.log == 1 and fake.launches[1].argument.bias is None
    assert b"log=1" in fake.loaded[0] and b"bulk=1" in fake.loaded[0]


def basic(b: int, d: int) -> BasicSums:
    return BasicSums(torch.zeros(b, d), *(torch.zeros(b, dtype=F64) for _ in range(4)))


@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_sweep(biased: bool) -> None:
    b, n, d = 19, 1000, 300
    bias = torch.zeros(n, dtype=F64) if biased else None
    query, rows, sums, grads = query_of(b, d, bias=bias), rows_of(n, d), basic(b, d), basic(b, d)
    with installed() as fake:
        out = BACKEND.posterior_backward(query, rows, sums, grads)
    assert out.x.shape == (b, d) and out.bias.shape == ((n,) if biased else (0,))
    assert out.condition.shape == out.bandwidth.shape == (0,)
    extra = ["memokern_gradient_ties", "memokern_gradient_bias"] if biased else []
    names = ["memokern_queries", "memokern_gradient_terms", "memokern_gradient", *extra,
             "memokern_gradient_finish"]  # fmt: skip
    assert [found.entry for found in fake.launches] == 2 * names
    tile = planner.plan(b, n, d, F32, H100, backward=True)
    assert tile is not None and tile.backward and tile.queries == 16
    first = fake.launches[: len(names)]
    sweep = first[2]
    clusters = min(132 // tile.cluster, -(-n // tile.rows))
    assert (sweep.grid, sweep.threads) == ((clusters * tile.cluster, 1), 256)
    assert sweep.shared == shared_bytes(F32, tile) and first[1].grid == (16, 1)
    grids = {found.entry: found.grid for found in first[3:]}
    assert grids["memokern_gradient_finish"] == (16, 1)
    assert not biased or grids["memokern_gradient_bias"] == (4, 1)
    for i, (b0, some) in enumerate(((0, 16), (16, 3))):
        split, *rest = fake.launches[i * len(names) : (i + 1) * len(names)]
        raw = [ctypes.string_at(ctypes.addressof(x.argument), 8 * 41) for x in rest]
        assert ctypes.sizeof(rest[0].argument) >= 8 * 41 and len(set(raw)) == 1
        a = rest[0].argument
        assert (a.b, a.n, a.d, a.queries, a.parts, a.first) == (some, n, d, 16, clusters, b0 == 0)
        assert a.terms == split.argument.terms and a.table == split.argument.table
        assert a.dp == split.argument.dp == tile.cluster * tile.features
        assert a.x == query.x.data_ptr() + 4 * d * b0
        for name in ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq"):
            size = 4 * d if name == "mean" else 8
            assert getattr(a, name) == getattr(sums, name).data_ptr() + size * b0
            assert getattr(a, f"grad_{name}") == getattr(grads, name).data_ptr() + size * b0
        for name in ("x", "sigma", "alpha", "temperature"):
            size = 4 * d if name == "x" else 8
            assert getattr(a, f"grad_{name}") == getattr(out, name).data_ptr() + size * b0
        assert a.grad_bias == (out.bias.data_ptr() if biased else None)
        assert (a.pairs is not None) == biased


def test_the_backward_sweep_of_no_queries() -> None:
    query = query_of(0, 300, bias=torch.zeros(4, dtype=F64))
    with installed() as fake:
        out = BACKEND.posterior_backward(query, rows_of(4, 300), basic(0, 300), basic(0, 300))
    assert fake.launches == [] and torch.equal(out.bias, torch.zeros(4, dtype=F64))


def test_many_queries_are_blocks_of_queries() -> None:
    b, d = 70, 512
    query = query_of(b, d)
    with installed() as fake:
        out = BACKEND.posterior(query, rows_of(10_000, d, U8))
    sweeps = [found.argument for found in fake.launches[1::3]]
    size = planner.plan(b, 10_000, d, U8, H100).queries
    assert [s.b for s in sweeps] == [min(size, b - b0) for b0 in range(0, b, size)]
    assert [s.x - query.x.data_ptr() for s in sweeps] == [4 * d * b0 for b0 in range(0, b, size)]
    joins = [found.argument for found in fake.launches[2::3]]
    offsets = [4 * d * b0 for b0 in range(0, b, size)]
    assert [j.mean - out.mean.data_ptr() for j in joins] == offsets
    assert [j.log_z - out.log_z.data_ptr() for j in joins] == [8 * b0 for b0 in range(0, b, size)]
    assert len({s.acc for s in sweeps}) == 1  # the work space is used again


def test_no_queries_is_no_launch() -> None:
    with installed() as fake:
        assert BACKEND.posterior(query_of(0, 300), rows_of(4, 300)).mean.shape == (0, 300)
    assert fake.launches == []


@pytest.mark.parametrize("case", ["aligned", "address", "stride", "features"])
def test_rows_that_the_copy_engine_does_not_take(case: str) -> None:
    memory = torch.zeros(40 * 320 + 4, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    data = {
        "aligned": memory[: 40 * 320].view(40, 320)[:, :304],
        "address": memory[1 : 1 + 40 * 320].view(40, 320)[:, :304],
        "stride": memory[: 40 * 305].view(40, 305)[:, :304],
        "features": memory[: 40 * 320].view(40, 320)[:, :301],
    }[case]
    rows = rows_of(*data.shape)._replace(data=data)
    with installed() as fake:
        BACKEND.posterior(query_of(1, data.shape[1]), rows)
    assert (b"bulk=1" in fake.loaded[0]) == (case == "aligned")
    assert fake.launches[1].argument.stride == (305 if case == "stride" else 320)


def test_what_is_not_known_of_the_rows_is_computed() -> None:
    with installed() as fake:
        BACKEND.posterior(query_of(2, 300), rows_of(21, 300, known=False))
    first = fake.launches[0]
    assert (first.entry, first.grid) == ("memokern_sq_norms", (3, 1))
    assert (first.argument.n, first.argument.d, first.argument.stride) == (21, 300, 300)
    assert fake.launches[2].argument.sq_norms == first.argument.sq_norms


def test_where_no_cluster_of_16_fits_one_of_8_sweeps() -> None:
    query, rows = query_of(1, 6000), rows_of(500, 6000, U8)
    with installed() as fake:
        BACKEND.posterior(query, rows)
    wanted = planner.plan(1, 500, 6000, U8, H100)
    name = "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"
    portable = wanted.cluster <= driver.PORTABLE_CLUSTER
    assert portable != ((name, "memokern_sweep", 0) in fake.prepared)
    with installed(largest_cluster=8) as fake, pytest.MonkeyPatch.context() as patch:
        plain = planner.plan
        patch.setattr(  # as if 16 were faster by count
            planner, "plan",
            lambda *a: next(t for t in planner.tiles(U8) if t.cluster == a[5] and t.queries == 16
                            and t.cluster * t.features >= 6000),
        )  # fmt: skip
        BACKEND.posterior(query, rows)
        patch.setattr(planner, "plan", plain)
    assert [b"cluster=16" in code for code in fake.loaded[:2]] == [True, False]
    assert fake.launches[1].grid[0] % 8 == 0 and b"cluster=8" in fake.loaded[1]
    with installed(largest_cluster=0), pytest.raises(RuntimeError, match="no room for a cluster"):
        BACKEND.posterior(query, rows)


def test_streams_devices_and_threads() -> None:
    """Launches go to the tensors' device and its current stream, and the device that was current
    is so again; a thread that has no context gets the device's."""
    variant = Variant("sweep/finish.cu", ("memokern_finish_sums",), threads=128)
    with installed() as fake:
        for index in (0, 1):
            device = torch.device("cuda", index)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver, "capturing", lambda device: False)
                found = driver.kernel(variant, "memokern_finish_sums", "sm_90a", device)
            driver.launch(found, (1, 1), 0, abi.FinishParams(), device)
        assert [(x.device, x.stream) for x in fake.launches] == [(0, STREAMS[0]), (1, STREAMS[1])]
        assert fake.device == 0 and len(fake.loaded) == 1
        fake.context = 0
        driver.launch(found, (1, 1), 0, abi.FinishParams(), torch.device("cuda", 1))
        assert fake.context == 101


def test_threads_load_a_kernel_once(monkeypatch) -> None:
    variant, seen = Variant("sweep/norms.cu", ("memokern_sq_norms",)), []
    with installed() as fake:
        gate = threading.Barrier(4)

        def load() -> None:
            gate.wait()
            seen.append(driver.kernel(variant, variant.entries[0], "sm_90a", torch.device("cpu")))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(fake.loaded) == 1 and len(set(seen)) == 1


def test_nothing_waits_and_a_second_call_loads_nothing() -> None:
    query, rows = query_of(2, 300), rows_of(50, 300)
    with installed() as fake:
        BACKEND.posterior(query, rows)
        fake.calls.clear()
        BACKEND.posterior(query, rows)
    assert fake.calls == ["cuLaunchKernel"] * 3


def test_a_kernel_is_not_loaded_in_a_capture(monkeypatch) -> None:
    query, rows = query_of(2, 300), rows_of(50, 300)
    with installed() as fake:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "capturing", lambda device: True)
            with pytest.raises(RuntimeError, match="make the same call once before the capture"):
                BACKEND.posterior(query, rows)
        BACKEND.posterior(query, rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "capturing", lambda device: True)
            BACKEND.posterior(query, rows)
    assert len(fake.launches) == 6 and not torch_internals.capturing(torch.device("cpu"))


def test_an_error_of_the_driver_is_one_line() -> None:
    query, rows = query_of(2, 300), rows_of(50, 300)
    with installed() as fake:
        fake.fails["cuLaunchKernel"] = fake_driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(driver.DriverError, match=r"cuLaunchKernel failed: .*out_of_memory$"):
            BACKEND.posterior(query, rows)


def test_the_cache_is_used(tmp_path: Path) -> None:
    query, rows = query_of(2, 300), rows_of(50, 300)
    for _ in range(2):
        with installed(folder=tmp_path) as fake:
            BACKEND.posterior(query, rows)
        assert len(fake.loaded) == 3
    assert sum(cache.kept(tmp_path).kernels.values()) == 3


def test_types_are_refused() -> None:
    with installed(), pytest.raises(TypeError, match="take float32 queries and rows of float32, b"):
        launch.posterior(query_of(1, 300, x=torch.zeros(1, 300, dtype=F64)), rows_of(3, 300))
    with installed(), pytest.raises(ValueError, match="expected x"):
        launch.posterior(query_of(1, 301), rows_of(3, 300))


# --- the structs ------------------------------------------------------------------------------

STRUCTS = [abi.QueriesParams, abi.SweepParams, abi.FinishParams, abi.GradientParams,
           abi.NormsParams, abi.ScanParams, abi.ListedParams,
           abi.NearestParams, abi.PlaneParams]  # fmt: skip
HEADERS = "".join(p.read_text() for p in sorted(sources.folder().glob("*/abi.h")))


def declared(text: str, name: str) -> list[tuple[str, type]]:
    """The fields of a struct of the header, in order."""
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None, name
    fields = []
    for line in re.sub(r"//[^\n]*", "", body[1]).split(";"):
        words = re.fullmatch(r"\s*(?:const )?(\w+)(\s*[\w\s,*]+)", line)
        if words is None:
            assert not line.strip(), line
            continue
        for field in words[2].split(","):
            kind = {"double": ctypes.c_double, "i64": ctypes.c_int64}.get(words[1])
            fields.append((field.strip(" *"), ctypes.c_void_p if "*" in field else kind))
    return fields


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_structs_are_those_of_the_kernels(struct: type[ctypes.Structure]) -> None:
    assert declared(HEADERS, struct.__name__) == struct._fields_
    assert ctypes.sizeof(struct) == abi.WORD * len(struct._fields_)


def test_rows_of_tables_are_those_of_the_kernels() -> None:
    for name, last, count in (
        ("TableRow", "kTable", abi.TABLE_ROWS), ("StateRow", "kState", abi.STATE_ROWS),
        ("GradientTableRow", "kGradientTable", abi.GRADIENT_TABLE_ROWS),
        ("ListedRow", "kListed", abi.LISTED_ROWS), ("PlaneRow", "kPlaneSums", plane.SUMS),
        ("GradientRow", "kGradientSums", abi.GRADIENT_ROWS - 1),  # and whether there are near rows
    ):  # fmt: skip
        words = re.search(rf"enum {name} : int {{(.*?)}};", HEADERS, re.DOTALL)
        assert words is not None
        assert [w.strip() for w in words[1].split(",")].index(last) == count


def test_a_field_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match="NormsParams has no rowz"):
        abi.filled(abi.NormsParams, rowz=1)
    assert math.isinf(abi.filled(abi.FinishParams, log_threshold=-INF).log_threshold)
