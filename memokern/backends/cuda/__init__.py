"""The CUDA kernels, in C++: NVIDIA's GPUs that have clusters of thread blocks.

What Triton has no words for: a row that is wider than a block's registers goes through device
memory once, into the shared memory of a cluster, and a sweep is three launches; and rows are
selected in lists whose length the host does not know. The kernels' sources are compiled on their
first use, by NVRTC, and kept on disk.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from memokern.backends.cuda.core import cache, compiler, driver, machine, sources
from memokern.backends.cuda.core.variant import ROW_CODES
from memokern.backends.protocol import Backend, Call, captured
from memokern.calls import (
    BasicSums,
    Gradients,
    LogitBounds,
    Query,
    RowLists,
    Rows,
    Scan,
    State,
    Sums,
)

# Those for wide rows, which a cluster holds, and those for rows of any width.
_SWEEPS = ("posterior", "posterior_state", "posterior_backward")
_OPERATIONS = (*_SWEEPS, "bound_scan", "posterior_listed", "posterior_listed_backward", "nearest")


class Cuda(Backend):
    """Tensors on one of NVIDIA's GPUs."""

    name = "cuda"

    @functools.cache  # noqa: B019  # there is one
    def unavailable(self) -> str | None:
        if torch.version.hip is not None:
            return "this PyTorch is for AMD's GPUs, and these kernels are for NVIDIA's"
        reason = compiler.missing() or sources.missing()
        if reason is not None:
            return reason
        if not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        found, major = driver.version(), int(compiler.version().partition(".")[0])
        if found is None:
            return "the CUDA driver cannot be loaded"
        if found[0] < major:
            return (
                f"the driver is for CUDA {found[0]}.{found[1]}, and NVRTC {compiler.version()}"
                f" compiles for CUDA {major}: a newer driver runs it"
            )
        return None

    def refuses(self, operation: str, call: Call) -> str | None:
        if call.device != "cuda":
            return f"it runs tensors on the GPU, and these are on {call.device}"
        if call.transform:
            return "it has no torch.func transforms and no forward mode"
        if operation not in _OPERATIONS:
            return f"it has no kernel for {operation}"
        if call.own_bias:
            return (
                "it has no kernel for conditions and rows left out that differ from query to query"
            )
        if torch.float64 in (call.x, call.rows):
            return "it has no kernel for float64"
        if call.x != torch.float32 or call.rows not in ROW_CODES:
            return f"it has no kernel for {call.x} queries and {call.rows} rows"
        at = call.device_index
        device = torch.device("cuda") if at is None else torch.device("cuda", at)
        reason = machine.unknown(device)
        if reason is not None:
            return reason
        arch = machine.of(device).arch
        if int(arch.strip("sm_a")) not in compiler.architectures():
            return f"NVRTC {compiler.version()} does not compile for {arch}: a newer one does"
        if operation == "nearest":
            from memokern.backends.cuda.nearest import costs

            return costs.refuses(call.b, call.n, call.dim, call.k, call.rows, machine.of(device))
        if operation not in _SWEEPS:
            return captured(operation, call)
        from memokern.backends.cuda.posterior import planner

        backward = operation == "posterior_backward"
        return planner.refuses(call.b, call.n, call.dim, call.rows, machine.of(device), backward)

    def detail(self) -> str:
        return (
            f"NVRTC {compiler.version()}, {torch.cuda.get_device_name()}; sweeps over rows of more"
            " than 256 features, and of up to 8 for many queries; scans, lists and neighbours; all"
            " else goes to Triton"
        )

    def posterior_state(self, query: Query, rows: Rows) -> State:
        from memokern.backends.cuda.posterior import launch

        return launch.posterior_state(query, rows)

    def posterior(self, query: Query, rows: Rows) -> Sums:
        from memokern.backends.cuda.posterior import launch

        return launch.posterior(query, rows)

    def posterior_backward(
        self, query: Query, rows: Rows, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        from memokern.backends.cuda.gradient import launch

        return launch.posterior_backward(query, rows, sums, grads)

    def nearest(self, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        from memokern.backends.cuda.nearest import launch

        return launch.nearest(x, rows, k)

    def bound_scan(self, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
        from memokern.backends.cuda.scan import launch

        return launch.bound_scan(query, rows, bounds)

    def posterior_listed(self, query: Query, rows: Rows, lists: RowLists) -> Sums:
        from memokern.backends.cuda.listed import launch

        return launch.posterior_listed(query, rows, lists)

    def posterior_listed_backward(
        self, query: Query, rows: Rows, lists: RowLists, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        from memokern.backends.cuda.listed import launch

        return launch.posterior_listed_backward(query, rows, lists, grads)


def facts() -> dict[str, Any]:
    """What `memokern info` says of the kernels: the folder that keeps them, whether it can be
    written, how many it has of each architecture, and the versions of NVRTC and the driver, None
    where there is none."""
    where = cache.folder()
    kept, version = cache.kept(where), driver.version()
    return {
        "folder": str(where),
        "writable": cache.writable(where),
        "kernels": kept.kernels,
        "bytes": kept.bytes,
        "nvrtc": compiler.version() if compiler.missing() is None else None,
        "driver": None if version is None else f"{version[0]}.{version[1]}",
    }


BACKEND = Cuda()
