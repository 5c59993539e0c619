"""The Triton kernels: NVIDIA's and AMD's GPUs, and, for tests, Triton's interpreter on the CPU.

Nothing of Triton is imported before the first call, and nothing compiled before the first launch of
each kernel. No call but bound_scan reads a number back from the device, so that it can be captured
in a CUDA graph, after a first call outside of one.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

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

MOST_NEIGHBOURS = 64
# Kernels address the numbers that they keep for each query, up to 12, with 32 bits.
MOST_QUERIES = 1 << 27
# Kernels count rows with 32 bits, and some round the count up to 8,192.
MOST_ROWS = (1 << 31) - (1 << 14)
_REFERENCE_ONLY = {
    "posterior_double_backward": "second derivatives are taken in plain PyTorch",
    "posterior_listed_double_backward": "second derivatives are taken in plain PyTorch",
}


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton itself decides when it is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Triton(Backend):
    """Tensors on a GPU. The launchers of :mod:`memokern.backends.triton` import Triton, so each
    operation imports its own when it is called."""

    name = "triton"

    @functools.cache  # noqa: B019  # there is one
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'memokern[triton]' on Linux"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        if torch.cuda.is_available() or interpreted():
            return None
        return "PyTorch sees no GPU"

    def refuses(self, operation: str, call: Call) -> str | None:
        if call.device != ("cpu" if interpreted() else "cuda"):
            where = "CPU, by Triton's interpreter" if interpreted() else "GPU"
            return f"it runs tensors on the {where}, and these are on {call.device}"
        if call.transform:
            return "it has no torch.func transforms and no forward mode"
        if call.own_bias:
            return (
                "it has no kernel for conditions and rows left out that differ from query to query"
            )
        if torch.float64 in (call.x, call.rows):
            return "it has no kernel for float64"
        if call.b > MOST_QUERIES:
            return f"it takes at most {MOST_QUERIES:,} queries in a call, not {call.b:,}"
        if call.n > MOST_ROWS:
            return f"it takes at most {MOST_ROWS:,} rows in a call, not {call.n:,}"
        if call.k > MOST_NEIGHBOURS:
            return f"it finds at most {MOST_NEIGHBOURS} neighbours, and {call.k} are asked for"
        return captured(operation, call) or _REFERENCE_ONLY.get(operation)

    def detail(self) -> str:
        import triton

        where = "interpreted on the CPU" if interpreted() else torch.cuda.get_device_name()
        rest = f"float64, and more than {MOST_NEIGHBOURS} neighbours, go to the reference"
        return f"Triton {triton.__version__}, {where}; {rest}"

    def posterior_state(self, query: Query, rows: Rows) -> State:
        from memokern.backends.triton.posterior import launch

        return launch.posterior_state(query, rows)

    def posterior(self, query: Query, rows: Rows) -> Sums:
        from memokern.backends.triton.posterior import launch

        return launch.posterior(query, rows)

    def posterior_backward(
        self, query: Query, rows: Rows, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        from memokern.backends.triton.gradient import launch

        return launch.posterior_backward(query, rows, sums, grads)

    def posterior_backward_rows(self, query: Query, rows: Rows, grads: BasicSums) -> Tensor:
        from memokern.backends.triton.gradient import launch

        return launch.posterior_backward_rows(query, rows, grads)

    def nearest(self, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        from memokern.backends.triton.nearest import launch

        return launch.nearest(x, rows, k)

    def bound_scan(self, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
        from memokern.backends.triton.scan import launch

        return launch.bound_scan(query, rows, bounds)

    def posterior_listed(self, query: Query, rows: Rows, lists: RowLists) -> Sums:
        from memokern.backends.triton.listed import launch

        return launch.posterior_listed(query, rows, lists)

    def posterior_listed_backward(
        self, query: Query, rows: Rows, lists: RowLists, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        from memokern.backends.triton.listed import launch

        return launch.posterior_listed_backward(query, rows, lists, grads)


BACKEND = Triton()
