"""How the kernels are launched: by Triton's own launch code on a driver that is not there, and, for
sizes that nobody could allocate, by what the launchers ask for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

import memokern
from memokern import processes
from memokern.backends.triton import BACKEND
from memokern.backends.triton import variants as listing
from memokern.backends.triton.core import machine
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.core.machine import Machine
from memokern.backends.triton.core.state import merge_states
from memokern.backends.triton.core.variant import POINTERS, Variant
from memokern.backends.triton.listed import launch as listed
from memokern.backends.triton.posterior import planner
from memokern.backends.triton.scan import kernels as scan
from memokern.backends.triton.scan import launch as scan_launch
from memokern.calls import BasicSums, LogitBounds, Query, RowLists, Rows
from memokern.regularizers import parse
from memokern.util import env

F32, F64 = torch.float32, torch.float64
LISTED = {v.name: v for v in listing.variants()}


def driver(machine: str, cache: Path) -> dict:
    """What the fake driver was asked for, in a process whose Triton compiles into a cache of its
    own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parents[2]), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, str(here / "fake_driver.py"), machine],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.long
def test_streams_devices_options_and_no_compilation_that_is_not_needed(tmp_path: Path) -> None:
    facts = driver("hopper", tmp_path)
    assert facts["compiled at import"] == []
    compiled, launches = facts["sizes"]
    assert len(compiled) == 1  # for all sizes, multiples of 16 or not, and 1
    assert [launch["grid"] for launch in launches] == [[b, 1, 1] for b in (16, 1, 17, 1000)]
    assert {(launch["stream"], launch["device"]) for launch in launches} == {(1000, 0)}
    launch, current = facts["second device"]
    assert (launch["stream"], launch["device"], current) == (1001, 1, 0)
    assert facts["launches of an empty grid"] == 0
    groups, exact = facts["nearest"]
    assert (groups["kernel"], exact["kernel"]) == ("nearest_groups_kernel", "nearest_exact_kernel")
    # 200 rows: four groups, one block of queries; 20 queries in as many parts as there are groups.
    assert groups["grid"] == [4, 1, 1] and exact["grid"] == [80, 1, 1]
    assert (exact["warps"], exact["maxnreg"]) == (8, 96)
    # 300 rows in two chunks, through descriptors: shape, strides, tile.
    assert facts["described"] == {
        "dot_products_kernel": [[[300, 192], [200, 1], [128, 64]]] * 2,
        "accumulate_kernel": [[[300, 192], [200, 1], [64, 64]]] * 2,
    }


@pytest.mark.long
def test_what_is_launched_is_what_was_compiled_ahead_of_time(tmp_path: Path) -> None:
    """Whatever the numbers and addresses: types, and what is taken for granted of the arguments."""
    facts = driver("alignment", tmp_path)
    assert facts.keys() == {"plain", "odd features", "odd stride", "odd address", "odd bias"}
    for layout, launches in facts.items():
        kernels = set()
        for launch in launches:
            same = [v for v in LISTED.values() if v.kernel.fn.__name__ == launch["kernel"]
                    and v.signature == launch["types"] and sorted(v.aligned) == launch["aligned"]
                    and v.constexprs == launch["constexprs"]]  # fmt: skip
            assert same, (layout, launch)
            assert all(v.num_warps == launch["warps"] for v in same)
            if same[0].signature.get("rows"):
                kernels.add((launch["kernel"], bool(launch["aligned"])))
        # Rows decide; other values that lie oddly are moved.
        names = {name for name, _ in kernels}
        assert {"sweep_kernel", "exact_kernel", "dot_products_kernel"} <= names
        assert {aligned for _, aligned in kernels} == {layout in ("plain", "odd bias")}


@pytest.mark.long
def test_a_device_that_is_too_small_says_so_before_anything_runs(tmp_path: Path) -> None:
    facts = driver("small", tmp_path)
    assert "shared memory" in facts["error"] and "8192" in facts["error"]
    assert facts["launches"] == []


@pytest.mark.long
def test_amd_is_asked_for_nothing_that_is_nvidias(tmp_path: Path) -> None:
    launches = driver("amd", tmp_path)["nearest"]
    assert [launch["maxnreg"] for launch in launches] == [None, None]


class Launched(list):
    """Launches that were asked for, each checked against what its variant says."""

    def ask(self, variant: Variant, grid: tuple[int, ...], device: torch.device, **args) -> None:
        if 0 in grid:
            return
        variant = variant if variant.fits(args) else variant.unaligned()
        assert variant == LISTED[variant.name]
        assert args.keys() == variant.signature.keys()
        assert 1 <= grid[0] < 2**31 and all(1 <= g <= 65535 for g in grid[1:]), grid
        for name, value in args.items():
            kind = variant.signature[name]
            if isinstance(value, TensorDescriptor):
                base, tile = POINTERS[value.base.dtype][1:], value.block_shape
                assert kind == f"tensordesc<{base}[{tile[0]},{tile[1]}]>", (variant.name, name)
            elif isinstance(value, torch.Tensor):
                assert POINTERS[value.dtype] == kind, (variant.name, name)
            elif kind == "i32":
                assert isinstance(value, int) and -(2**31) <= value < 2**31, (variant.name, name)
            elif kind == "i64":
                assert isinstance(value, int), (variant.name, name)
            else:
                assert kind == "fp32" and isinstance(value, float), (variant.name, name)
        if variant.constexprs.get("PASS") == scan.COUNT:
            args["place"].zero_()  # what a launcher reads back
        self.append((variant.name, grid, args))


@pytest.fixture
def launched(monkeypatch) -> Launched:
    """Launches as an H100 would get them; nothing runs."""
    asked = Launched()
    monkeypatch.setattr(Variant, "launch", lambda self, *a, **k: asked.ask(self, *a, **k))
    monkeypatch.setattr(machine, "of", lambda device: Machine(132, 50 << 20))
    return asked


SIZES = [
    (1, 1, 1), (1, 1_000_000, 784), (1, 10_000_000, 16), (17, 1_000_003, 100),
    (64, 50_000, 3072), (256, 200_000, 12_288), (65_536, 50_000, 16), (65_536, 20, 2),
]  # fmt: skip


def problem(b: int, n: int, d: int, dtype: torch.dtype = torch.uint8) -> tuple[Query, Rows]:
    """A call of any size: rows that are all one row."""
    one = torch.ones(b, dtype=F64)
    data = torch.zeros(1, d, dtype=dtype).expand(n, d)
    rows = Rows(data, 2 / 255, -1.0, torch.zeros(d), torch.ones(n, dtype=F64))
    return Query(torch.zeros(b, d), one, one.clone(), one.clone()), rows


@pytest.mark.parametrize(
    ("b", "n", "d", "weighting"),
    [(*size, "gaussian") for size in SIZES] + [(64, 50_000, 3072, "log"), (65_536, 20, 2, "log")],
)
def test_the_sweep_at_all_sizes(launched: Launched, b: int, n: int, d: int, weighting: str) -> None:
    query, rows = problem(b, n, d)
    query = query._replace(weighting=weighting)
    out = BACKEND.posterior(query, rows)
    assert out.mean.shape == query.x.shape and len(launched) >= 2
    count = len(launched)
    state = BACKEND.posterior_state(query, rows)
    assert state.acc.shape == query.x.shape and len(launched) == 2 * count
    merge_states(state, state)
    BACKEND.posterior_backward(query, rows, out, out)
    assert len(launched) > 2 * count + 1
    programs = max(grid[0] * (grid[1] if len(grid) > 1 else 1) for _, grid, _ in launched)
    if n >= 50_000:  # B = 1 fills the chip too
        assert programs >= 128  # of 132 multiprocessors


def test_rows_are_described_where_a_descriptor_takes_them(launched: Launched, monkeypatch) -> None:
    """Address and stride in multiples of 16 bytes, and a device that knows descriptors."""
    memory = torch.zeros(9_000, 264, dtype=torch.bfloat16)
    layouts = {
        "plain": memory[:, :256], "every other": memory[::2, :257], "whole": memory,
        "alone": memory[:1, :200],  # its stride is its length: 400 bytes
        "moved by two bytes": memory[:, 1:200], "odd": torch.zeros(90, 260, dtype=torch.bfloat16),
        "one row": memory[:1].expand(90, 264),
        "bytes": torch.zeros(90, 208, dtype=torch.uint8),
    }  # fmt: skip
    described = {"plain", "every other", "whole", "alone", "bytes"}
    monkeypatch.setattr(planner, "one_pass", lambda *_: None)
    for knows in (True, False):
        monkeypatch.setattr(stored, "has_descriptors", lambda _, k=knows: k)
        for name, data in layouts.items():
            launched.clear()
            n, d = data.shape
            one = torch.ones(20, dtype=F64)
            rows = Rows(data, 1.0, 0.0, torch.zeros(d), torch.ones(n, dtype=F64))
            BACKEND.posterior(Query(torch.zeros(20, d), one, one, one), rows)
            products = [(what, args["rows"]) for what, _, args in launched
                        if what.split()[0] in ("dot_products", "accumulate")]  # fmt: skip
            assert len(products) >= 2
            for what, given in products:
                if not (knows and name in described):
                    assert given is data and "described" not in what, (name, what)
                    continue
                assert "described" in what and given.base is data, (name, what)
                assert (given.shape, given.padding) == ([n, d], "zero")
                assert given.strides == [data.stride(0) if n > 1 else d, 1]
                tile = LISTED[what].constexprs
                assert given.block_shape == [tile["BLOCK_N"], tile["BLOCK_D"]]
            # What a descriptor cannot know: where a chunk ends. All but the last are whole tiles.
            step = max(args.get("n", 0) for _, _, args in launched)
            assert step == n or step % 128 == 0


def test_full_precision_reads_by_pointers(launched: Launched, monkeypatch) -> None:
    monkeypatch.setattr(stored, "has_descriptors", lambda _: True)
    monkeypatch.setattr(planner, "one_pass", lambda *_: None)
    query, rows = problem(2, 8, 64, F32)
    rows = Rows(rows.data.contiguous())
    for precision in ("tf32x3", "ieee"):
        # The argument counts, and where it leaves the choice, the environment.
        for said, environment in ((precision, "tf32x3"), ("auto", precision)):
            monkeypatch.setenv(env.PRECISION, environment)
            launched.clear()
            asked = query._replace(precision=said)
            out = BACKEND.posterior(asked, rows)
            BACKEND.posterior_backward(asked, rows, out, out)
            BACKEND.posterior_backward_rows(asked, rows, out)
            names = [name for name, *_ in launched
                     if name.split()[0] in ("dot_products", "accumulate")]  # fmt: skip
            assert {name.split()[3] for name in names} == {precision}
            assert {"described" in name for name in names} == {precision == "tf32x3"}


@pytest.mark.parametrize(("b", "n", "d"), [(1, 1, 1), (64, 50_000, 3072), (65_536, 2000, 64)])
def test_the_gradient_for_rows_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    """Two sweeps; the gradient is written once for each row, by the last block of queries."""
    query, _ = problem(b, 1, d)
    rows, stat = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(b, dtype=F64)
    out = BACKEND.posterior_backward_rows(
        query, Rows(rows), BasicSums(query.x, stat, stat, stat, stat)
    )
    assert out.shape == rows.shape and out.dtype == rows.dtype
    last = [args for name, _, args in launched
            if name.startswith("row_gradient ") and args["is_last"]]  # fmt: skip
    assert sum(args["n"] for args in last) == n
    spent = max(args["coefficients"].numel() for args in last)
    assert 2 * 4 * spent <= 64 << 20
    # Coefficients of all pairs twice: for the sums, and for the rows.
    pairs = [args["b"] * args["n"] for name, _, args in launched if "coefficients" in name]
    assert sum(pairs) == 2 * b * n


@pytest.mark.parametrize(("b", "n", "d"), SIZES)
def test_the_nearest_rows_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    query, rows = problem(b, n, d)
    k = min(n, 10)
    out = BACKEND.nearest(query.x, rows, k)
    assert out[0].shape == out[1].shape == (b, k)
    spent = max(args["least"].numel() for _, _, args in launched)
    assert 4 * spent <= max(64 << 20, 4 * -(-n // 64))  # the work space that is stated


@pytest.mark.parametrize(("b", "n", "d"), SIZES)
def test_lists_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    query, rows = problem(b, n, d)
    lists = RowLists(torch.arange(b + 1), torch.arange(b) % n)
    out = BACKEND.posterior_listed(query, rows, lists)
    BACKEND.posterior_listed_backward(query, rows, lists, out, out)
    assert {name.split()[0] for name, *_ in launched} == {
        "pairs", "listed_weights", "listed_sum", "listed_coefficients",
    }  # fmt: skip


def test_lists_that_are_too_long(monkeypatch) -> None:
    """Kernels count pairs with 32 bits."""
    query, rows = problem(2, 8, 3)
    monkeypatch.setattr(listed, "MOST_PAIRS", 9)
    with pytest.raises(ValueError, match="a call can list at most 9 rows in all, not 10"):
        BACKEND.posterior_listed(
            query, rows, RowLists(torch.tensor([0, 4, 10]), torch.arange(10) % 8)
        )


class Captured(TorchDispatchMode):
    """As a CUDA graph is captured: nothing may wait for the device, nor copy to or from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")
        name = func.__name__.split(".")[0]
        assert not name.startswith(waits), f"{func} waits for the device"
        assert not name.startswith("lift_fresh"), f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_waits_for_the_device(
    launched: Launched, weighting: str, cached: bool, monkeypatch
) -> None:
    """After a first call all can be captured in a CUDA graph, but for the scan."""
    monkeypatch.setattr(listed, "capturing", lambda device: True)  # the lists are not checked then
    query, _ = problem(20, 1, 100)
    query = query._replace(bias=torch.zeros(300, dtype=F64), weighting=weighting)
    known = (torch.zeros(100), torch.ones(300, dtype=F64)) if cached else (None, None)
    rows = Rows(torch.zeros(300, 100), 1.0, 0.0, *known)
    lists = RowLists(torch.arange(21), torch.arange(20))
    plan = planner.one_pass

    def calls() -> None:
        for one_pass in (plan, lambda *_: None):
            monkeypatch.setattr(planner, "one_pass", one_pass)
            out, state = BACKEND.posterior(query, rows), BACKEND.posterior_state(query, rows)
            merge_states(state, state)
            BACKEND.posterior_backward(query, rows, out, out)
            BACKEND.posterior_backward_rows(query, rows, out)
        BACKEND.nearest(query.x, rows, 3)
        plain = query._replace(weighting="gaussian")
        out = BACKEND.posterior_listed(plain, rows, lists)
        BACKEND.posterior_listed_backward(plain, rows, lists, out, out)

    calls()
    count = len(launched)
    with Captured():
        calls()
    assert len(launched) == 2 * count > 0
    with pytest.raises(AssertionError, match="waits for the device"), Captured():
        query.x.sum().item()


def test_the_public_functions_can_be_captured_too(launched: Launched, monkeypatch) -> None:
    """What they check of values is left out while a CUDA graph is captured."""
    monkeypatch.setenv(env.BACKEND, "triton")
    monkeypatch.setattr(BACKEND, "refuses", lambda operation, call: None)  # not even CPU tensors
    x, sigma = torch.zeros(20, 30), torch.full((20,), 0.5, dtype=F64)
    data, bias = memokern.TrainingSet(torch.zeros(300, 30)), torch.zeros(300, dtype=F64)
    models = [
        memokern.Denoiser(data, process=processes.get(process), regularizer=parse(regularizer))
        for process in ("edm", "vp") for regularizer in ("none", "tikhonov:c=0.1", "bank:h=0.1")
    ]  # fmt: skip

    def calls() -> None:
        query = x.clone().requires_grad_()
        p = memokern.posterior(query, data, sigma, 0.9, bias=bias)
        assert p.score.shape == p.entropy.new_zeros(20, 30).shape
        torch.autograd.grad(p.mean.sum(), query)
        memokern.score(x, data, sigma)
        memokern.denoise(x, data, 0.5, temperature=2)
        memokern.nearest(x, data)
        for model in models:
            model(x, sigma)
            model(x, 0.5)

    calls()
    count = len(launched)
    for name, module in list(sys.modules.items()):
        if name.startswith("memokern.") and hasattr(module, "traced"):
            monkeypatch.setattr(module, "traced", lambda *_: True)
    with Captured():
        calls()
    assert len(launched) == 2 * count > 0


@pytest.mark.parametrize(("b", "n", "d"), [(1, 1, 1), (1, 2_000_000, 3072), (65_536, 1000, 64)])
def test_the_scan_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    query, rows = problem(b, n, d)
    k, bands = min(d, 32), 4
    bounds = LogitBounds(
        torch.zeros(1, k + bands + 1).expand(n, -1), torch.zeros(n, 0, dtype=torch.float16),
        torch.zeros(b, k), torch.zeros(b, bands + 1), torch.zeros(b, dtype=F64),
        torch.ones(b, dtype=F64), (k,), (0,), 1e-6, n,
    )  # fmt: skip
    found = BACKEND.bound_scan(query, rows, bounds)
    assert found.lists.start.shape == (b + 1,) and len(found.lists.index) == 0
    steps = [name.split()[0] for name, *_ in launched if name.startswith("scan")]
    turns = -(-b * n // scan_launch._PAIRS) if b > 1 else 1
    assert steps[:2] == ["scan_promise", "scan_count"] and len(steps) >= 2 * turns
