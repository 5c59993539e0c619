"""The rows of a call as the kernels take them."""

from __future__ import annotations

from torch import Tensor


class Rows:
    """The rows of a call as the kernels take them: contiguous features, their squared norms."""

    def __init__(self, rows: Tensor, sq_norms: Tensor, bias: Tensor | None) -> None:
        self.rows, self.sq_norms, self.bias = rows, sq_norms, bias
        self.n, self.d = rows.shape
        self.stride = rows.stride(0) if self.n > 1 else self.d
