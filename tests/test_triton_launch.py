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
from memokern import validate as queries
from memokern.backends import protocol as backends
from memokern.backends.triton import dense as backend
from memokern.backends.triton import variants as listing
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.core.variant import POINTERS, Variant
from memokern.backends.triton.listed import launch as triton_select
from memokern.backends.triton.posterior import planner
from memokern.backends.triton.posterior.planner import Machine
from memokern.backends.triton.scan import kernels as scan
from memokern.backends.triton.scan import launch as triton_scan
from memokern.regularizers import parse
from memokern.util import env

F32, F64 = torch.float32, torch.float64
LISTED = {v.name: v for v in listing.variants()}


def driver(machine: str) -> dict:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    here = Path(__file__).resolve().parent
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent), env.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(here / "fake_driver.py"), machine],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_streams_devices_options_and_no_compilation_that_is_not_needed() -> None:
    facts = driver("hopper")
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
        "dots_kernel": [[[300, 192], [200, 1], [128, 64]]] * 2,
        "accumulate_kernel": [[[300, 192], [200, 1], [64, 64]]] * 2,
    }


def test_what_is_launched_is_what_was_compiled_ahead_of_time() -> None:
    """Whatever the numbers and addresses: types, and what is taken for granted of the arguments."""
    facts = driver("alignment")
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
        assert {"sweep_kernel", "exact_kernel", "dots_kernel"} <= {name for name, _ in kernels}
        assert {aligned for _, aligned in kernels} == {layout in ("plain", "odd bias")}


def test_a_device_that_is_too_small_says_so_before_anything_runs() -> None:
    facts = driver("small")
    assert "shared memory" in facts["error"] and "8192" in facts["error"]
    assert facts["launches"] == []


def test_amd_is_asked_for_nothing_that_is_nvidias() -> None:
    launches = driver("amd")["nearest"]
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
    monkeypatch.setattr(backend, "machine", lambda device: Machine(132, 50 << 20))
    monkeypatch.setattr(triton_select, "multiprocessors", lambda device: 132)
    return asked


SIZES = [
    (1, 1, 1), (1, 1_000_000, 784), (1, 10_000_000, 16), (17, 1_000_003, 100),
    (64, 50_000, 3072), (256, 200_000, 12_288), (65_536, 50_000, 16), (65_536, 20, 2),
]  # fmt: skip


def problem(b: int, n: int, d: int, dtype: torch.dtype = torch.uint8):
    """Arguments of any size: rows that are all one row."""
    one = torch.ones(b, dtype=F64)
    rows = torch.zeros(1, d, dtype=dtype).expand(n, d)
    return torch.zeros(b, d), rows, one, one.clone(), one.clone()


@pytest.mark.parametrize(
    ("b", "n", "d", "kernel"),
    [(*size, "gaussian") for size in SIZES] + [(64, 50_000, 3072, "log"), (65_536, 20, 2, "log")],
)
def test_the_sweep_at_all_sizes(launched: Launched, b: int, n: int, d: int, kernel: str) -> None:
    x, rows, *how = problem(b, n, d)
    center, sq_norms = torch.zeros(d), torch.ones(n, dtype=F64)
    data = (center, sq_norms, 2 / 255, -1.0, kernel)
    out = backend.posterior(x, rows, *how, None, *data)
    assert out[0].shape == x.shape and len(launched) >= 2
    count = len(launched)
    backend.posterior_backward(x, rows, *how, None, *data[:2], *out, *out, *data[2:])
    assert len(launched) > count
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
        for name, rows in layouts.items():
            launched.clear()
            n, d = rows.shape
            one = torch.ones(20, dtype=F64)
            data = (torch.zeros(d), torch.ones(n, dtype=F64), 1.0, 0.0, "gaussian")
            backend.posterior(torch.zeros(20, d), rows, one, one, one, None, *data)
            products = [(what, args["rows"]) for what, _, args in launched
                        if what.split()[0] in ("dots", "accumulate")]  # fmt: skip
            assert len(products) >= 2
            for what, given in products:
                if not (knows and name in described):
                    assert given is rows and "described" not in what, (name, what)
                    continue
                assert "described" in what and given.base is rows, (name, what)
                assert (given.shape, given.padding) == ([n, d], "zero")
                assert given.strides == [rows.stride(0) if n > 1 else d, 1]
                tile = LISTED[what].constexprs
                assert given.block_shape == [tile["BLOCK_N"], tile["BLOCK_D"]]
            # What a descriptor cannot know: where a chunk ends. All but the last are whole tiles.
            step = max(args.get("n", 0) for _, _, args in launched)
            assert step == n or step % 128 == 0


def test_full_precision_reads_by_pointers(launched: Launched, monkeypatch) -> None:
    monkeypatch.setattr(stored, "has_descriptors", lambda _: True)
    monkeypatch.setattr(planner, "one_pass", lambda *_: None)
    x, rows, *how = problem(2, 8, 64, F32)
    args = (x, rows.contiguous(), *how, None, None, None, 1.0, 0.0, "gaussian")
    for precision in ("tf32x3", "ieee"):
        # The argument counts, and where it leaves the choice, the environment.
        for said, environment in ((precision, "tf32x3"), ("auto", precision)):
            monkeypatch.setenv(env.PRECISION, environment)
            launched.clear()
            out = backend.posterior(*args, said)
            backend.posterior_backward(*args[:8], *out, *out, *args[8:], said)
            grads = [v.clone() for v in out]
            backend.posterior_backward_rows(*args[:6], None, grads, *args[8:], said)
            names = [name for name, _, _ in launched if name.split()[0] in ("dots", "accumulate")]
            assert {name.split()[3] for name in names} == {precision}
            assert {"described" in name for name in names} == {precision == "tf32x3"}


@pytest.mark.parametrize(("b", "n", "d"), [(1, 1, 1), (64, 50_000, 3072), (65_536, 2000, 64)])
def test_the_gradient_for_rows_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    """Two sweeps; the gradient is written once for each row, by the last block of queries."""
    x, _, *how = problem(b, 1, d)
    rows, stat = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(b, dtype=F64)
    grads = [x, stat, stat, stat, stat]
    out = backend.posterior_backward_rows(x, rows, *how, None, None, grads, 1.0, 0.0, "gaussian")
    assert out.shape == rows.shape and out.dtype == rows.dtype
    last = [args for name, _, args in launched if name.startswith("rows ") and args["is_last"]]
    assert sum(args["n"] for args in last) == n
    spent = max(args["coefficients"].numel() for args in last)
    assert 2 * 4 * spent <= 64 << 20
    # Coefficients of all pairs twice: for the sums, and for the rows.
    pairs = [args["b"] * args["n"] for name, _, args in launched if "coefficients" in name]
    assert sum(pairs) == 2 * b * n


@pytest.mark.parametrize(("b", "n", "d"), SIZES)
def test_the_nearest_rows_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    x, rows, *_ = problem(b, n, d)
    k = min(n, 10)
    out = triton_select.nearest(x, rows, k, torch.zeros(d), torch.ones(n, dtype=F64), 1.0, 0.0)
    assert out[0].shape == out[1].shape == (b, k)
    spent = max(args["least"].numel() for _, _, args in launched)
    assert 4 * spent <= max(64 << 20, 4 * -(-n // 64))  # the work space that is stated


@pytest.mark.parametrize(("b", "n", "d"), SIZES)
def test_lists_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    x, rows, *how = problem(b, n, d)
    start = torch.arange(b + 1)
    index = torch.arange(b) % n
    out = triton_select.posterior_on_support(x, rows, *how, None, start, index, 1.0, 0.0)
    triton_select.posterior_on_support_backward(
        x, rows, *how, None, start, index, *out, *out, 1.0, 0.0
    )
    assert {name.split()[0] for name, *_ in launched} == {
        "support_pairs", "support_weights", "support_sum", "support_coefficients",
    }  # fmt: skip


class Captured(TorchDispatchMode):
    """As a CUDA graph is captured: nothing may wait for the device, nor copy to or from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")
        name = func.__name__.split(".")[0]
        assert not name.startswith(waits), f"{func} waits for the device"
        assert not name.startswith("lift_fresh"), f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["gaussian", "log"])
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_waits_for_the_device(
    launched: Launched, kernel: str, cached: bool, monkeypatch
) -> None:
    """After a first call all can be captured in a CUDA graph, but for the scan."""
    monkeypatch.setattr(triton_select._Lists, "_check", lambda self: None)  # left out then
    x, _, *how = problem(20, 1, 100)
    rows, bias = torch.zeros(300, 100), torch.zeros(300, dtype=F64)
    known = (torch.zeros(100), torch.ones(300, dtype=F64)) if cached else (None, None)
    lists = (torch.arange(21), torch.arange(20))
    plan = planner.one_pass

    def calls() -> None:
        for one_pass in (plan, lambda *_: None):
            monkeypatch.setattr(planner, "one_pass", one_pass)
            args = (x, rows, *how, bias, *known)
            out = backend.posterior(*args, 1.0, 0.0, kernel)
            backend.posterior_backward(*args, *out, *out, 1.0, 0.0, kernel)
            grads = list(out)
            backend.posterior_backward_rows(*args[:6], known[0], grads, 1.0, 0.0, kernel)
        triton_select.nearest(x, rows, 3, *known, 1.0, 0.0)
        args = (x, rows, *how, bias, *lists)
        out = triton_select.posterior_on_support(*args, 1.0, 0.0)
        triton_select.posterior_on_support_backward(*args, *out, *out, 1.0, 0.0)

    calls()
    count = len(launched)
    with Captured():
        calls()
    assert len(launched) == 2 * count > 0
    with pytest.raises(AssertionError, match="waits for the device"), Captured():
        x.sum().item()


def test_the_public_functions_can_be_captured_too(launched: Launched, monkeypatch) -> None:
    """What they check of values is left out while a CUDA graph is captured."""
    monkeypatch.setenv(env.BACKEND, "triton")
    monkeypatch.setattr(backend, "refuses", lambda device_type: None)  # not even CPU tensors
    backends._choose.cache_clear()
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
    monkeypatch.setattr(queries, "capturing", lambda tensor: True)
    with Captured():
        calls()
    assert len(launched) == 2 * count > 0
    backends._choose.cache_clear()


@pytest.mark.parametrize(("b", "n", "d"), [(1, 1, 1), (1, 2_000_000, 3072), (65_536, 1000, 64)])
def test_the_scan_at_all_sizes(launched: Launched, b: int, n: int, d: int) -> None:
    x, rows, *how = problem(b, n, d)
    k, bands = min(d, 32), 4
    found = triton_scan.bound_scan(
        x, rows, *how, None, torch.zeros(d), torch.ones(n, dtype=F64), 1.0, 0.0,
        torch.zeros(1, k + bands + 1).expand(n, -1), torch.zeros(n, 0, dtype=torch.float16),
        torch.zeros(b, k), torch.zeros(b, bands + 1), torch.zeros(b, dtype=F64),
        torch.ones(b, dtype=F64), [k], [0], 1e-6, n,
    )  # fmt: skip
    assert found[0].shape == (b + 1,) and len(found[1]) == 0
    steps = [name.split()[0] for name, *_ in launched if name.startswith("scan")]
    turns = -(-b * n // triton_scan._PAIRS) if b > 1 else 1
    assert steps[:2] == ["scan_promise", "scan_count"] and len(steps) >= 2 * turns
