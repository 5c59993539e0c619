"""The compiled C++ kernels; ``csrc/README.md`` describes them."""

from __future__ import annotations

import functools

from torch import Tensor

from memokern.backends.cpu import dense, listed, native
from memokern.backends.cpu.projection import CosineProjection
from memokern.backends.protocol import Backend, Call
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

# Compiled kernels have no derivatives of their own for these.
_REFERENCE_ONLY = {
    "posterior_double_backward": "second derivatives are taken in plain PyTorch",
    "posterior_listed_double_backward": "second derivatives are taken in plain PyTorch",
    "posterior_backward_rows": "the gradient for the rows is taken in plain PyTorch",
}


class Cpu(Backend):
    """Tensors in the memory of the CPU."""

    name = "cpu"
    # Its own projection of float32 queries to an index whose basis is a cosine transform.
    cosine_projection = CosineProjection
    # The sweep for a few queries, without what checks and converts.
    small_posterior = staticmethod(dense.small_posterior)
    # Sweeps of queries that each see a segment of the rows, in one call, without derivatives.
    posterior_segments = staticmethod(dense.posterior_segments)
    # Projection, scan and sums over the lists in one call, without derivatives.
    pruned_posterior = staticmethod(listed.pruned_posterior)

    @functools.cache  # noqa: B019  # there is one
    def unavailable(self) -> str | None:
        try:
            native.module()
        except ImportError as error:
            return (
                f"the compiled module is missing ({error}): install memokern where there is a C++"
                " compiler"
            )
        return None

    def refuses(self, operation: str, call: Call) -> str | None:
        if call.device != "cpu":
            return f"it runs tensors on the CPU, and these are on {call.device}"
        if call.transform:
            return "it has no torch.func transforms and no forward mode"
        return _REFERENCE_ONLY.get(operation)

    def isa(self) -> str:
        """The instruction set in use: ``baseline``, ``avx2`` or ``avx512``."""
        return str(native.module().isa())

    def described_isa(self) -> str:
        """The same, and whether the processor has VNNI, an extension that not all of them have."""
        return f"{self.isa()} with VNNI" if native.module().vnni() else self.isa()

    def detail(self) -> str:
        threads = native.threads()
        many = "s" if threads > 1 else ""
        return f"compiled kernels, {self.described_isa()}, {threads} thread{many}"

    def posterior_state(self, query: Query, rows: Rows) -> State:
        return dense.posterior_state(query, rows)

    def posterior(self, query: Query, rows: Rows) -> Sums:
        return dense.posterior(query, rows)

    def posterior_backward(
        self, query: Query, rows: Rows, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        return dense.posterior_backward(query, rows, sums, grads)

    def nearest(self, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        return dense.nearest(x, rows, k)

    def bound_scan(self, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
        return listed.bound_scan(query, rows, bounds)

    def posterior_listed(self, query: Query, rows: Rows, lists: RowLists) -> Sums:
        return listed.posterior_listed(query, rows, lists)

    def posterior_listed_backward(
        self, query: Query, rows: Rows, lists: RowLists, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        return listed.posterior_listed_backward(query, rows, lists, grads)


BACKEND = Cpu()
