"""A GPU that is not there: Triton's launch code runs as it is, up to the driver, which writes down
what it is asked. Run in a process of its own, since Triton must compile; prints facts as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import Any

import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

STREAMS = {0: 1000, 1: 1001}


def flat(args: Any) -> list[Any]:
    """Triton hands a kernel's arguments over one by one, or, later, as one tuple."""
    return [v for arg in args for v in (arg if isinstance(arg, tuple) else (arg,))]


def known(source: Any) -> dict[str, Any]:
    """What a kernel was compiled to take for granted of its arguments."""
    names = source.fn.arg_names
    at = {names[path[0]]: value for path, value in source.constants.items()}
    given = {names[path[0]]: value for path, value in source.attrs.items() if value}
    allowed = (["tt.divisibility", 16], ["tt.pointer_range", 32])  # the other: AMD, below 2 GiB
    assert all(v in allowed for value in given.values() for v in value), given
    given = {name: value for name, value in given.items() if allowed[0] in value}
    return {
        "types": {n: kind for n, kind in source.signature.items() if kind != "constexpr"},
        "constexprs": at, "aligned": sorted(given),
    }  # fmt: skip


class Machine:
    """Two devices; launches: what reached the driver."""

    def __init__(self, target: GPUTarget, shared: int) -> None:
        self.target, self.shared, self.device = target, shared, 0
        self.launches: list[dict[str, Any]] = []
        self.compiled: list[str] = []
        machine = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name, self.metadata, self.source = metadata.name, metadata, source

            def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
                machine.launches.append({
                    "kernel": self.name, "grid": [x, y, z], "stream": stream,
                    "device": machine.device, "warps": self.metadata.num_warps,
                    "maxnreg": getattr(self.metadata, "maxnreg", None), **known(self.source),
                    "described": [
                        [a.shape, a.strides, a.block_shape] for a in flat(rest)
                        if isinstance(a, TensorDescriptor)
                    ],
                })  # fmt: skip

        self.launcher_cls = Launcher
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        self.compiled.append(name)
        return 1, 2, 100, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return STREAMS[device]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @contextlib.contextmanager
    def guard(self, device: torch.device) -> Any:
        """In place of torch.cuda.device."""
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before


def activate(target: GPUTarget, shared: int = 227 << 10) -> Machine:
    machine = Machine(target, shared)
    driver.set_active(machine)
    torch.cuda.device = machine.guard
    return machine


def without_code() -> None:
    """Triton reads kernels and goes no further: what is asked here is what a kernel is compiled
    for, not its machine code, which takes most of the time. The caller sets TRITON_CACHE_DIR, so
    that no other process finds kernels without code."""
    assert "TRITON_CACHE_DIR" in os.environ

    def add_stages(backend: Any, stages: dict[str, Any], *_: Any) -> None:
        def code(module: Any, metadata: dict[str, Any]) -> bytes:
            name = re.search(r"tt\.func public @(\w+)", str(module))
            metadata.update(name=name[1], shared=0)
            return b""

        stages["ttir"] = lambda module, metadata: module
        stages[backend.binary_ext] = code

    for found in backends.values():
        found.compiler.add_stages = add_stages


def weights(device: torch.device, b: int) -> None:
    """One launch whose sizes are b."""
    from memokern.backends.triton.listed import kernels

    start = torch.arange(b + 1)
    some = torch.ones(b, dtype=torch.float64)
    kernels.weights_variant(False).launch(
        (b,), device, r2=some, index=start[:-1].clone(), bias=some, start=start,
        mode=torch.zeros(b, dtype=torch.int32), sigma=some, temperature=some, w=some.clone(),
        stats=torch.empty(6, b, dtype=torch.float64), B=b,
    )  # fmt: skip


def nearest(b: int, d: int) -> None:
    """The nearest of 200 rows whose norms are known, on 132 multiprocessors."""
    from memokern.backends.triton import BACKEND
    from memokern.backends.triton.core import machine
    from memokern.calls import Rows

    machine.of = lambda device: machine.Machine(132, 1 << 20)
    about = {"center": torch.zeros(d), "sq_norms": torch.ones(200, dtype=torch.float64)}
    BACKEND.nearest(torch.zeros(b, d), Rows(torch.zeros(200, d), **about), 3)


def hopper() -> dict[str, Any]:
    machine = activate(GPUTarget("cuda", 90, 32))
    without_code()
    from memokern.backends.triton import variants as listing

    assert listing.variants()
    facts: dict[str, Any] = {"compiled at import": list(machine.compiled)}
    for b in (16, 1, 17, 1000):
        weights(torch.device("cpu"), b)
    facts["sizes"] = (list(machine.compiled), list(machine.launches))
    weights(torch.device("cuda", 1), 5)
    facts["second device"] = (machine.launches[-1], machine.device)
    weights(torch.device("cuda", 1), 0)
    facts["launches of an empty grid"] = len(machine.launches) - 5
    machine.launches.clear()
    nearest(20, 32)
    facts["nearest"] = list(machine.launches)
    facts["described"] = described(machine)
    return facts


def described(machine: Machine) -> dict[str, Any]:
    """What the products are given of rows that lie as a descriptor wants them."""
    from memokern.backends.triton import BACKEND
    from memokern.backends.triton.core import machine as known
    from memokern.backends.triton.core import rows as stored
    from memokern.backends.triton.posterior import planner
    from memokern.calls import Query, Rows

    stored.has_descriptors = lambda device: True
    known.of = lambda device: known.Machine(132, 1 << 18)
    planner.one_pass = lambda *_: None
    rows = torch.zeros(300, 200, dtype=torch.bfloat16)[:, :192]
    one = torch.ones(20, dtype=torch.float64)
    machine.launches.clear()
    BACKEND.posterior(Query(torch.zeros(20, 192), one, one, one), Rows(rows))
    found: dict[str, Any] = {}
    for launch in machine.launches:
        if launch["described"]:
            found.setdefault(launch["kernel"], []).extend(launch["described"])
    return found


def alignment() -> dict[str, Any]:
    """Every operation but the scan, the sweep both ways, on rows that lie in several ways."""
    machine = activate(GPUTarget("cuda", 80, 32))
    without_code()
    from memokern.backends.triton import BACKEND
    from memokern.backends.triton.core import machine as figures
    from memokern.backends.triton.core.state import merge_states
    from memokern.backends.triton.posterior import planner
    from memokern.calls import Query, RowLists, Rows

    figures.of = lambda device: figures.Machine(108, 40 << 20)
    memory, one = torch.zeros(48 * 64 + 16), torch.ones(20, dtype=torch.float64)
    layouts = {
        "plain": memory[: 48 * 32].view(48, 32), "odd features": memory[: 48 * 7].view(48, 7),
        "odd stride": memory[: 48 * 33].view(48, 33)[:, :32],
        "odd address": memory[1 : 1 + 48 * 32].view(48, 32),
        "odd bias": memory[: 48 * 32].view(48, 32),
    }  # fmt: skip
    one_pass, facts = planner.one_pass, {}
    for name, data in layouts.items():
        machine.launches.clear()
        x, bias = torch.zeros(20, data.shape[1]), torch.zeros(49, dtype=torch.float64)
        bias = bias[1:] if name == "odd bias" else bias[:48]
        query, rows = Query(x, one, one, one, bias), Rows(data)
        for plan in (one_pass, lambda *_: None):
            planner.one_pass = plan
            out, state = BACKEND.posterior(query, rows), BACKEND.posterior_state(query, rows)
        merge_states(state, state)
        BACKEND.posterior_backward(query, rows, out, out)
        BACKEND.posterior_backward_rows(query, rows, out)
        BACKEND.nearest(x, rows, 3)
        lists = RowLists(torch.arange(21), torch.zeros(20, dtype=torch.int64))
        out = BACKEND.posterior_listed(query, rows, lists)
        BACKEND.posterior_listed_backward(query, rows, lists, out, out)
        facts[name] = list(machine.launches)
    return facts


def small() -> dict[str, Any]:
    """A device whose blocks have too little shared memory."""
    machine = activate(GPUTarget("cuda", 90, 32), shared=8 << 10)
    try:
        nearest(20, 32)
    except OutOfResources as error:
        return {"error": str(error), "launches": machine.launches}
    return {"error": None, "launches": machine.launches}


def amd() -> dict[str, Any]:
    machine = activate(GPUTarget("hip", "gfx942", 64), shared=64 << 10)
    without_code()
    torch.version.hip = "6.0"
    nearest(20, 32)
    return {"nearest": machine.launches}


def tuning() -> dict[str, Any]:
    """A device with less shared memory than the default configuration wants."""
    from memokern.backends.triton.core import tuning
    from memokern.backends.triton.posterior import products

    default, other = tuning.choices(products.accumulate_variant(torch.bfloat16, True, "tf32x3"))
    machine = activate(GPUTarget("cuda", 90, 32), shared=15 << 10)  # it wants 18, the other 12
    measured = 0

    def timer(call: Any, device: Any) -> float:
        nonlocal measured
        call()
        measured += 1
        return 1.0

    tuning.timer = timer
    torch.cuda.is_current_stream_capturing = lambda: False
    tuning.has_clock = lambda device: True
    tuning.device_name = lambda device: "small"
    some, row = torch.zeros(1, 64), torch.zeros(16, 64, dtype=torch.bfloat16)
    for _ in range(2):
        tuning.launch(
            default, (1, 1), torch.device("cpu"), changes=("acc",), weights=some, rows=row,
            factor=some[0], unit=some[0], acc=some.clone(), b=1, n0=0, n=16, D=64, stride_n=64,
            part_n=32,
        )  # fmt: skip
    chosen = list(json.loads(tuning.cache_file().read_text()).values())
    return {
        "measured": measured, "chosen": chosen, "other": other.name,
        "launches": len(machine.launches),
    }  # fmt: skip


if __name__ == "__main__":
    known_machines = (hopper, small, amd, alignment, tuning)
    run = {machine.__name__: machine for machine in known_machines}[sys.argv[1]]
    print(json.dumps(run()))
