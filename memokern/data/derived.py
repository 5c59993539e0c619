"""What a training set computes from its rows once and keeps, as long as the rows stay as they
were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memokern.calls import Rows
from memokern.data.storage import Classes, center, sq_norms
from memokern.index.checksum import AT_ONCE_BYTES, require_seal
from memokern.index.index import REBUILD_HINT, Index, restored
from memokern.util.held import Held
from memokern.util.torch_internals import is_plain, version


class Derived:
    """Center, norms and index of rows [N, D] with values row * scale + shift.

    The index is set from outside; the others are computed at first use, unless they are given. All
    are made outside of torch.inference_mode, since autograd cannot save what is made in it.
    """

    def __init__(
        self,
        rows: Tensor,
        scale: float,
        shift: float,
        *,
        center: Tensor | None = None,
        sq_norms: Tensor | None = None,
        index: Index | None = None,
        log_weights: Tensor | None = None,
    ) -> None:
        self.rows, self.scale, self.shift = rows, scale, shift
        self._log_weights = log_weights
        self.index = index
        self._center = center if index is None else index.center
        self._center64: Tensor | None = None
        self._sq_norms = sq_norms
        self._as_rows: Rows | None = None
        self.plain = is_plain(rows)
        # The rows of labels that were asked for, and of which labels and weights they are.
        self.classes: dict[int, Any] = {}
        self.class_order: Classes | None = None
        self.sorted_by_label: Any = None
        self.classes_of: Held | None = None
        self._version = version(rows)
        # The index and norms of a file, while their checksums and those of the rows are not known
        # to be right.
        self._unchecked: tuple[str, Mapping[str, Tensor]] | None = None

    def read(self, index: tuple[str, Mapping[str, Tensor]], shape: Sequence[int]) -> None:
        """Takes what a file has: the description of its index, and tensors. All checksums are
        compared now, or for large data at the first use.

        Raises: ValueError for an index that is damaged or of other rows.
        """
        found, norms = restored(*index, shape)
        found.require_match(self.rows, self.scale, self.shift)
        self.index, self._center, self._sq_norms = found, found.center, norms
        self._unchecked = index
        if self.rows.nbytes + sum(part.nbytes for part in index[1].values()) <= AT_ONCE_BYTES:
            self.require_checked()

    def require_checked(self) -> None:
        """Compares the checksums of what a file had, unless that was done; ValueError where one
        differs."""
        if self._unchecked is not None:
            require_seal(*self._unchecked, self.rows, REBUILD_HINT)
            self._unchecked = None

    def is_of(self, rows: Tensor) -> bool:
        """Whether it was computed from these rows as they are now. What other libraries write into
        shared memory goes unnoticed."""
        known = self._version
        return rows is self.rows and (known is None or version(rows) in (known, None))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "classes": {}, "class_order": None, "classes_of": None,
                "sorted_by_label": None}  # fmt: skip

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._version = version(self.rows)  # of the copy, which counts from 0

    @property
    def center(self) -> Tensor:
        """A point amid the values: :func:`memokern.data.storage.center`, [D] float32, or float64
        for float64 rows."""
        if self._center is None:
            dtype = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
            self._center = center(self.rows, self.scale, self.shift, dtype, self._log_weights)
        return self._center

    @property
    def center64(self) -> Tensor:
        """`center` as float64."""
        if self._center64 is None:
            with torch.inference_mode(False):
                self._center64 = self.center.to(torch.float64)
        return self._center64

    @property
    def sq_norms(self) -> Tensor:
        """|y_n - center|^2 for the center as stored, [N] float64."""
        if self._sq_norms is None:
            self._sq_norms = sq_norms(self.rows, self.scale, self.shift, self.center64)
        return self._sq_norms

    def as_rows(self) -> Rows:
        """The rows as the operations take them, with center and norms."""
        self.require_checked()
        if self._as_rows is None:
            self._as_rows = Rows(self.rows, self.scale, self.shift, self.center64, self.sq_norms)
        return self._as_rows

    def taken(self, rows: Tensor, chosen: Tensor | slice, index: Index | None = None) -> Derived:
        """The same about some of the rows, which are given; so may be their part of the index."""
        norms = self.sq_norms[chosen].contiguous()
        return Derived(
            rows, self.scale, self.shift, center=self.center, sq_norms=norms, index=index
        )

    def forget_classes(self, held: Held) -> None:
        """Nothing is known of classes any more, of which the labels and weights are `held` now."""
        self.classes, self.class_order, self.sorted_by_label = {}, None, None
        self.classes_of = held

    @property
    def nbytes(self) -> int:
        """Bytes of what is there by now."""
        held = (self._center, self._sq_norms, self.index)
        return sum(part.nbytes for part in held if part is not None)

    def to(self, rows: Tensor) -> Derived:
        """The same for a copy of the rows on another device."""
        moved = Derived(rows, self.scale, self.shift)
        for name in ("_center", "_center64", "_sq_norms"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(rows.device))
        # An index on the meta device could not prove anything.
        if self.index is not None and not rows.is_meta:
            moved.index = self.index.to(rows.device)
            moved._center = moved.index.center
        return moved
