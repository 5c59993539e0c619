"""The truth that every kernel is tested against: plain PyTorch, float64, any device.

It is also a real backend: it runs where the compiled module is missing and on devices that have no
kernel yet, and since it is made of PyTorch operations only, every transform of PyTorch (forward
mode, ``torch.func``, any order of derivative) works through it.
"""

from __future__ import annotations

from torch import Tensor

from memokern.backends.protocol import Backend, Call, captured
from memokern.backends.reference import dense, listed, scan
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
from memokern.calls.checks import check_selectable


class Reference(Backend):
    """Takes every call, but for what cannot be captured in a CUDA graph."""

    name = "reference"

    def detail(self) -> str:
        return "plain PyTorch in float64, any device; slow, every transform works"

    def refuses(self, operation: str, call: Call) -> str | None:
        return captured(operation, call)

    def posterior_state(self, query: Query, rows: Rows) -> State:
        return dense.posterior_state(query, rows)

    def posterior_backward(
        self, query: Query, rows: Rows, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        return dense.posterior_backward(query, rows, grads)

    def posterior_backward_rows(self, query: Query, rows: Rows, grads: BasicSums) -> Tensor:
        return dense.posterior_backward_rows(query, rows, grads)

    def posterior_double_backward(
        self, query: Query, rows: Rows, grads: BasicSums, grad_grads: Gradients
    ) -> tuple[Gradients, BasicSums]:
        return dense.posterior_double_backward(query, rows, grads, grad_grads)

    def nearest(self, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        return dense.nearest(x, rows, k)

    def bound_scan(self, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
        check_selectable(query, "bound_scan")
        return scan.bound_scan(query, rows, bounds)

    def posterior_listed(self, query: Query, rows: Rows, lists: RowLists) -> Sums:
        check_selectable(query, "posterior_listed")
        return listed.posterior(query, rows, lists)

    def posterior_listed_backward(
        self, query: Query, rows: Rows, lists: RowLists, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        return listed.backward(query, rows, lists, grads)

    def posterior_listed_double_backward(
        self, query: Query, rows: Rows, lists: RowLists, grads: BasicSums, grad_grads: Gradients
    ) -> tuple[Gradients, BasicSums]:
        return listed.double_backward(query, rows, lists, grads, grad_grads)


BACKEND = Reference()
