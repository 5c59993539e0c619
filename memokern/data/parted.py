"""Training sets of which this process does not hold all rows in memory."""

from __future__ import annotations

import math
from typing import Any

import torch

from memokern.data.training_set import TrainingSet


class PartedSet(TrainingSet):
    """A training set whose rows are swept part by part: shards on other ranks, or chunks that are
    read one after the other. Strategies of their own answer queries of it.

    n is the number of all rows; n_here that of the rows that biases, labels and what else there is
    for each row are about: a shard's own rows.
    """

    whole_n: int

    @property
    def how_swept(self) -> str:
        """What a sweep does in this process, for :func:`memokern.explain`."""
        raise NotImplementedError

    @property
    def indexed(self) -> bool:
        """Whether all parts that have rows have an index."""
        return self.index is not None

    @property
    def n(self) -> int:
        """Number of rows N, of all parts."""
        return self.whole_n

    @property
    def dim(self) -> int:
        """Number of features D of a row."""
        return math.prod(self.shape)

    def most(self, count: int) -> int:
        """The largest of such numbers, where each rank has its own queries."""
        return count

    def refuse(self, what: str, instead: str) -> Any:
        """RuntimeError for what needs all rows in this process."""
        raise RuntimeError(f"{what} needs all rows in one process, and these are apart: {instead}")


def share(n: int, rank: int, size: int) -> tuple[int, int]:
    """Where the rows of a rank begin and end when n rows are dealt out evenly, in order.

    Example:
        >>> from memokern.data.parted import share
        >>> [share(5, rank, 3) for rank in range(3)]
        [(0, 2), (2, 4), (4, 5)]
    """
    small, more = divmod(n, size)
    first = rank * small + min(rank, more)
    return first, first + small + (rank < more)


def no_rows(like: torch.Tensor) -> torch.Tensor:
    """Rows of the same type and size, none of them."""
    return like.new_empty((0, *like.shape[1:]))
