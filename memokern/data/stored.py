"""Rows as they are stored, with what belongs to each: their sizes and their values."""

from __future__ import annotations

import numpy as np
import torch

from memokern.calls.values import dequantized
from memokern.data import files
from memokern.data.derived import Derived
from memokern.data.storage import checked_index
from memokern.util.text import byte_size

# What a training set may have for each row.
PER_ROW = ("labels", "conditions", "log_weights")


class StoredRows:
    """The part of :class:`memokern.TrainingSet` that reads; its docstring describes the fields."""

    rows: torch.Tensor
    shape: tuple[int, ...]
    scale: float
    shift: float
    labels: torch.Tensor | None
    conditions: torch.Tensor | None
    log_weights: torch.Tensor | None
    name: str | None
    _derived: Derived

    # --- sizes --------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of rows N."""
        return self.rows.shape[0]

    @property
    def n_here(self) -> int:
        """How many rows biases, labels and what else belongs to each row are about: N, but for a
        set that is spread over several processes."""
        return self.n

    @property
    def dim(self) -> int:
        """Number of features D of a row."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type the rows are stored in."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of dequantised rows: float64 for float64 rows, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def nbytes(self) -> int:
        """How many bytes the rows (in memory or mapped), what each has, and caches take."""
        held = (self.rows, *(getattr(self, name) for name in PER_ROW), self._derived)
        return sum(part.nbytes for part in held if part is not None)

    def __len__(self) -> int:
        return self.n

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index, of the rows as they are or as they were."""
        return self._derived.index is not None

    def __repr__(self) -> str:
        parts = [f"{self.n} rows {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"]
        if (self.scale, self.shift) != (1.0, 0.0):
            sign = "-" if self.shift < 0 else "+"
            parts.append(f"y = {self.scale:.6g} r {sign} {abs(self.shift):.6g}")
        parts.append(byte_size(self.nbytes))
        parts += [name for name in PER_ROW if getattr(self, name) is not None]
        parts += [] if self._derived.index is None else [f"{self._derived.index.basis} index"]
        parts.append(str(self.device))
        return f"TrainingSet({f'{self.name}: ' if self.name else ''}{', '.join(parts)})"

    # --- rows as values -----------------------------------------------------------------------

    def dequantize(self, rows: torch.Tensor) -> torch.Tensor:
        """The values row * scale + shift of stored rows of any shape, in `compute_dtype`."""
        return dequantized(rows, self.scale, self.shift)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """The values of the rows at `index` (any shape): [*index.shape, *shape] in `compute_dtype`.
        TypeError for an index that is not of integers, IndexError outside 0..N-1."""
        index = checked_index(index, self.n, self.device)
        taken = self.rows.index_select(0, index.reshape(-1))
        return self.dequantize(taken).reshape((*index.shape, *self.shape))

    # --- labels, and where rows are -----------------------------------------------------------

    def label_count(self) -> int:
        """1 more than the largest label; 0 without labels."""
        labels = self.labels
        return 0 if labels is None or labels.is_meta else max(0, int(labels.max()) + 1)

    def has_label(self, label: int) -> bool:
        """Whether a row has the label."""
        return self.labels is not None and bool((self.labels == label).any())

    def local_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Where rows, by their numbers among all, are among those here; -1 for rows elsewhere."""
        return rows

    def __getitem__(self, item: int | slice | torch.Tensor) -> torch.Tensor:
        """The values of one row [*shape], or of a slice, index or mask [k, *shape]."""
        if isinstance(item, tuple):
            raise TypeError("expected one index, for the rows; index the result for the rest")
        # torch raises IndexError past the last row, which ends `for row in data`.
        picked = self.rows[files.as_tensor(item) if isinstance(item, np.ndarray) else item]
        return self.dequantize(picked).reshape((*picked.shape[:-1], *self.shape))
