"""Small tensors that are kept while large ones come and go."""

from __future__ import annotations

from torch import Tensor


class Stack:
    """Tensors of one shape, one after the other, in one tensor: each by itself would lie between
    large ones that are freed, and leave a hole as large as these in the heap.

    like: has the shape, type and device of each. count: as many as are expected.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self._all = like.new_empty((max(1, count), *like.shape))
        self._n = 0

    def add(self, value: Tensor) -> None:
        if self._n == len(self._all):
            more = self._all.new_empty((2 * self._n, *self._all.shape[1:]))
            more[: self._n] = self._all
            self._all = more
        self._all[self._n] = value
        self._n += 1

    def stacked(self) -> Tensor:
        """[count, *shape]"""
        return self._all[: self._n]
