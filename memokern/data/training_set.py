"""The training set: its rows as they are stored, and what every query needs of them.

Images stay uint8 and half-precision rows stay half: a row's value is y = row * scale + shift, which
the kernels apply. A data set on disk stays there, memory-mapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from memokern.calls import Rows
from memokern.data import digits, files, sources
from memokern.data import layout as layouts
from memokern.data.derived import Derived
from memokern.data.storage import (
    UINT8_SCALE,
    UINT8_SHIFT,
    Classes,
    check_rows,
    checked_choice,
    checked_conditions,
    checked_labels,
    checked_log_weights,
    chunks,
    require_finite,
    rows_of_label,
    sorted_by_class,
)
from memokern.data.stored import PER_ROW, StoredRows
from memokern.index.build import Source, build
from memokern.index.index import Index, fingerprint
from memokern.util import checks
from memokern.util.held import Held

Same = TypeVar("Same", bound="TrainingSet")
NO_LABELS = "this training set has no labels (integers): make it with labels="


class TrainingSet(StoredRows):
    """The N training rows y_n = rows[n] * scale + shift, each of D features.

    Args:
        rows: [N, *shape] float64, float32, bfloat16, float16 or uint8, kept in that type; one of
            - a tensor or numpy array, whose memory is shared, not copied, where it is contiguous:
              changes by PyTorch are followed until there is an index, which they make an error;
              changes by others, such as numpy, must not happen, since norms and mean are cached;
            - a path: `.npy`, `.safetensors` and aligned uncompressed `.npz` are memory-mapped; to
              cut such a file short ends the process. Pickles are never loaded. A file that `save`
              wrote brings all else with it. A folder's PNG and JPEG pictures are read, uint8
              [N, 3, H, W] or [N, H, W]; subfolders are classes, as in torchvision's ImageFolder;
            - a torch map-style Dataset of tensors or (tensor, label) items, each of which is read
              once, into one allocation.
        labels: [N] integers. None takes those of the Dataset or folder, or the file's array
            "labels" if it holds N integers.
        conditions: [N, K] or [N] finite numbers, a continuous condition of each row, kept as
            float64; `condition=` asks for rows whose conditions are near. None takes the file's
            array "conditions".
        log_weights: [N] log prior weights of the rows, finite or -inf (weight 0), not all -inf,
            kept as float64; they need not be normalised. None gives all rows the same weight.
        scale, shift: finite numbers, scale not 0. The default is 1 and 0, for uint8 rows 2/255 and
            -1, which takes pixels to [-1, 1].
        name: what repr shows.
        key: which array of a `.npz` or `.safetensors` file holds the rows; for the default see
            `memokern.data.files.read_tensor`.
        shape: of one row, where the source has rows of as many elements in another shape, such as
            flat ones: (3, 32, 32).
        layout: "hwc" turns images [N, H, W, C] (after `shape`) into [N, C, H, W], a copy. None
            leaves them as they are.
        check: False skips the search for NaN and infinite values, which reads all rows once.
        index: False leaves out the index that a file written by `save` may have. It is left out too
            where scale, shift, shape or layout differ from the file's.

    Attributes:
        rows: [N, D] as stored, contiguous. shape: of one row. n, dim: N and D. dtype, device: of
            the rows. nbytes: of rows, labels, weights and caches.
        scale, shift: y = row * scale + shift. labels: [N] int64 or None. conditions: [N, K], and
            log_weights: [N], float64 or None.
        center: [D] float32 or float64, the mean of the rows that can have weight, or a median where
            a few far ones would move it (of a subset with an index, that of the whole set).
        sq_norms: [N] float64, |y_n - center|^2.

    Raises:
        TypeError: rows of another type (other integers, bool, complex); labels not integers.
        ValueError: no rows or no features; NaN or infinite values (the first such row is named);
            wrong lengths; a pickle; an index of other rows; rows that require a gradient, which
            the cached norms would not follow (pass the tensor itself to memokern's functions).

    Numerics: center and sq_norms are accumulated in float64; sq_norms is about the center as kept.

    Cost: the check, and at first use center and sq_norms, read the rows once each. They take
    8 N + 8 D bytes beside the rows, and 2 MiB while they are computed.

    Example:
        >>> from memokern.data.training_set import TrainingSet
        >>> digits = TrainingSet.digits()
        >>> digits
        TrainingSet(digits: 1797 rows [8, 8] uint8, y = 0.125 r - 1, 129.4 kB, labels, cpu)
        >>> digits.gather(torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        rows: torch.Tensor | np.ndarray | str | os.PathLike[str] | Dataset,
        *,
        labels: Any = None,
        conditions: Any = None,
        log_weights: Any = None,
        scale: float | None = None,
        shift: float | None = None,
        name: str | None = None,
        key: str | None = None,
        shape: Sequence[int] | None = None,
        layout: str | None = None,
        check: bool = True,
        index: bool = True,
    ) -> None:
        found = sources.read(rows, key)
        tensor = layouts.arranged(found["rows"], shape, layout)
        if tensor.shape != found["rows"].shape:  # which the index is for
            found.pop("index", None)
        labels = found.get("labels") if labels is None else labels
        conditions = found.get("conditions") if conditions is None else conditions
        log_weights = found.get("log_weights") if log_weights is None else log_weights
        scale = found.get("scale") if scale is None else scale
        shift = found.get("shift") if shift is None else shift
        name = found.get("name") if name is None else name
        check_rows(tensor)
        if tensor.requires_grad:
            raise ValueError(
                "rows require a gradient, and a TrainingSet caches norms that would not follow "
                "them: pass rows.detach(), or the tensor itself to memokern's functions"
            )
        if tensor.is_inference():  # autograd cannot save it
            tensor = tensor.clone()
        self.shape = tuple(tensor.shape[1:])
        self.rows = tensor.reshape(tensor.shape[0], -1).contiguous()
        default = (UINT8_SCALE, UINT8_SHIFT) if tensor.dtype == torch.uint8 else (1.0, 0.0)
        self.scale = checks.number("scale", default[0] if scale is None else scale)
        self.shift = checks.number("shift", default[1] if shift is None else shift)
        if self.scale == 0:
            raise ValueError("expected a scale other than 0, which would make all rows equal")
        self.labels = checked_labels(labels, self.n, self.device)
        self.conditions = checked_conditions(conditions, self.n, self.device)
        self.log_weights = checked_log_weights(log_weights, self.n, self.device)
        self.name, self._derived = name, self._new_derived()
        if check:
            require_finite(self.rows)
        if index and "index" in found and (scale, shift) == (found["scale"], found["shift"]):
            self._derived.read(found["index"], self.shape)

    @classmethod
    def digits(cls) -> TrainingSet:
        """1797 handwritten digits, uint8 [8, 8] in [-1, 1], with labels; `memokern.data.digits` has
        their source and licence."""
        images, labels = digits.digits()
        scale, shift = digits.DIGITS_SCALE, digits.DIGITS_SHIFT
        return cls(images, labels=labels, scale=scale, shift=shift, name="digits")

    # --- what queries need, computed once -----------------------------------------------------

    def _new_derived(self) -> Derived:
        return Derived(self.rows, self.scale, self.shift, log_weights=self.log_weights)

    def _current(self) -> Derived:  # of the rows as they are now
        if not self._derived.is_of(self.rows):
            if self._derived.index is not None:
                raise ValueError("the rows changed after the index: call build_index() anew")
            self._derived = self._new_derived()
        self._derived.require_checked()
        return self._derived

    @property
    def center(self) -> torch.Tensor:
        """A point amid the rows, [D] float32 (float64 for float64 rows); computed at first use."""
        return self._current().center

    @property
    def center64(self) -> torch.Tensor:
        """`center` as float64, as the operations take it."""
        return self._current().center64

    @property
    def sq_norms(self) -> torch.Tensor:
        """|y_n - center|^2 for the center as stored, [N] float64; computed at first use."""
        return self._current().sq_norms

    def as_rows(self) -> Rows:
        """The rows as the operations take them."""
        return self._current().as_rows()

    def plain_rows(self) -> Rows | None:
        """The same for rows on the CPU of which PyTorch knows nothing but the values; else None."""
        known, rows = self._derived, self.rows
        if not known.plain or rows.requires_grad or not known.is_of(rows):
            return None
        return known.as_rows()

    @property
    def index(self) -> Index | None:
        """The index that proves rows to have no weight, or None before `build_index`."""
        return self._derived.index and self._current().index

    def build_index(
        self: Same,
        basis: str = "auto",
        dims: Sequence[int] | None = None,
        storage: str = "float16",
        progress: bool | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> Same:
        """Make `index`, from which rows are proven to have no weight, and return the set itself.

        The index holds, for every row, its leading coordinates in an orthonormal basis, and the
        norms of the others; and level 0 once more, in blocks of rows near each other.

        Args:
            basis: "dct" is the cosine transform of rows [H, W], [C, H, W] or [H, W, C], its
                coordinates ordered by variance. "pca" is the principal directions of up to 4096
                rows (D <= 4096). "auto" takes dct for images (H, W >= 8, C <= 4), else pca.
            dims: how many coordinates each level uses, ascending. None stands for 32, 64, 128, 256
                and 512, as far as D allows.
            storage: type of the coordinates beyond the first dims[0], "float16" or "float32".
                Float32 is taken in any case where the rows' norms, above 6e4 or below 0.01, do not
                suit float16. The rounding of each row is measured and allowed for.
            progress: whether to show a progress bar. None shows it on a terminal, after two
            seconds.
            resume: a folder in which what is done is kept, safe every few seconds: a build of the
                same rows that was killed goes on there. The index then stays in its files, mapped
                into memory; remove the folder when the set is saved and no longer used. Each rank
                of a sharded set has a folder of its own in it, which the same ranks find again.

        Raises: ValueError for D <= 16, for rows that do not suit the basis, for unknown choices;
            RuntimeError where another process builds in the folder; OSError where its disk has no
            room for the index, before it is computed.

        Warns: of flat rows that have the size of images, for which dct is much faster.

        Cost: per row, a matrix product along each axis for dct, D max(dims) multiplications for
        pca, in float64; 8 (dims[0] + bands + 3) + 2 (max(dims) - dims[0]) bytes or so per row.

        Example:
            >>> from memokern.data.training_set import TrainingSet
            >>> TrainingSet.digits().build_index(dims=(8, 16)).index.dims
            (8, 16)
        """
        self._build_index(basis=basis, dims=dims, storage=storage, progress=progress, resume=resume)
        return self

    def _build_index(self, **choices: Any) -> None:
        if not self._derived.is_of(self.rows):
            self._derived = self._new_derived()
        rows = Source.of(self.as_rows())
        self._derived.index = build(rows, self.center, self.shape, **choices)

    # --- other training sets ------------------------------------------------------------------

    @torch.inference_mode(False)
    def subset(self, index: torch.Tensor | np.ndarray | Sequence[int] | slice) -> TrainingSet:
        """The rows chosen by an index, a mask [N] or a slice, with their labels and weights.

        A slice shares memory. The log weights are not renormalised. The subset of a set with an
        index has the rows' part of it, and the center of the whole set. ValueError if nothing is
        chosen, or only rows of weight 0.
        """
        index = checked_choice(index, self.n, self.device)
        rows = self.rows[index]
        if len(rows) == 0:
            raise ValueError("the subset has no rows")
        part = self._like(rows, index)
        whole = self.index
        if whole is not None:
            taken = whole.take(index, fingerprint(rows, self.scale, self.shift))
            part.adopt(self._derived.taken(part.rows, index, taken))
        return part

    def _like(self, rows: torch.Tensor, index: Any = slice(None)) -> TrainingSet:
        """A set of these rows, with what the rows at the index have."""
        own = {name: getattr(self, name) for name in ("shape", "scale", "shift", "name")}
        for name in PER_ROW:
            value = getattr(self, name)
            own[name] = None if value is None else value[index]
        return TrainingSet(rows, check=False, **own)

    def renewed(self, rows: torch.Tensor, scale: float, shift: float, **own: Any) -> TrainingSet:
        """A set of these rows, and what each of them has, in this one's place."""
        return TrainingSet(rows, **own, scale=scale, shift=shift, name=self.name, check=False)

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TrainingSet:
        """A set of what a function of rows' values [n, D] makes of them, [n, D] in the same shape,
        with scale 1 and shift 0."""
        made = torch.cat([function(self.dequantize(part)) for part in chunks(self.rows)])
        rows = made.reshape(len(made), *self.shape)
        return TrainingSet(rows, scale=1.0, shift=0.0, name=self.name, check=False)

    def adopt(self, derived: Derived) -> None:
        """Takes what was computed of these very rows elsewhere."""
        self._derived = derived

    def where(self, label: int | Sequence[int]) -> TrainingSet:
        """The rows with this label, or one of these labels: the empirical p(y | label). ValueError
        if there are none; TypeError for labels that are not integers.

        Example:
            >>> from memokern.data.training_set import TrainingSet
            >>> len(TrainingSet.digits().where(3))
            183
        """
        if self.labels is None:
            raise ValueError(NO_LABELS)
        return self.subset(rows_of_label(self.labels, label))

    def _with_classes(self) -> Derived:
        """What is kept of the rows, of their labels as they are now."""
        known, mine = self._current(), {name: getattr(self, name) for name in PER_ROW}
        if known.classes_of is None or known.classes_of.changed(mine):
            known.forget_classes(Held(mine))
        return known

    @torch.inference_mode(False)
    def by_class(self) -> Classes:
        """The rows sorted by their labels, kept for the next call. ValueError without labels."""
        known = self._with_classes()
        if self.labels is None:
            raise ValueError(NO_LABELS)
        known.class_order = known.class_order or sorted_by_class(self.labels)
        return known.class_order

    @torch.inference_mode(False)
    def sorted_by_label(self) -> TrainingSet:
        """The set in the order of :meth:`by_class`, without an index, kept for the next call."""
        known, order = self._with_classes(), self.by_class().order
        if known.sorted_by_label is None:
            if bool((order[1:] > order[:-1]).all()):
                return self
            known.sorted_by_label = made = self._like(self.rows[order], order)
            made.adopt(known.taken(made.rows, order))
        return known.sorted_by_label

    @torch.inference_mode(False)  # what is kept must serve calls that record a gradient
    def of_label(self, label: int) -> tuple[torch.Tensor, TrainingSet]:
        """Which rows have this label, [k] int64, and the set of these rows, which is kept for the
        next call. Errors: as :meth:`where`."""
        known = self._with_classes()
        found: tuple[torch.Tensor, TrainingSet] | None = known.classes.get(label)
        if found is None or (found[1].index is None) != (known.index is None):
            chosen = self.where(label)
            assert self.labels is not None
            found = known.classes[label] = (self.labels == label).nonzero()[:, 0], chosen
        return found

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> TrainingSet:
        """The same set on another device, caches included; itself if it is there already."""
        rows = self.rows.to(torch.device(device))
        if rows is self.rows:
            return self
        moved = self._like(rows)
        moved.adopt(self._current().to(moved.rows))
        return moved

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a `.safetensors` file, whole or not at all; with an index, norms too.
        The rows are stored as they are, called "rows"; scale, shift and name are metadata.
        ValueError for another suffix, FileNotFoundError for a folder that does not exist.
        """
        rows = self.rows.reshape((self.n, *self.shape))
        tensors = {"rows": rows, **{name: getattr(self, name) for name in PER_ROW}}
        index = None if self.index is None else self.index.state(self.rows, self.sq_norms)
        sources.write(path, tensors, sources.described(self), index)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, check: bool = True, index: bool = True
    ) -> TrainingSet:
        """Read a file written by `save`; rows and index stay memory-mapped. An index has checksums
        of itself and of all rows, compared now, or above 256 MiB, which are then read, at first
        use. ValueError where one differs (index=False leaves the index out), and for other files.

        Example:
            >>> from memokern.data.training_set import TrainingSet
            >>> TrainingSet.digits().save("digits.safetensors")
            >>> TrainingSet.load("digits.safetensors").shape
            (8, 8)
        """
        if files.read_metadata(path).get("format") != sources.FORMAT:
            raise ValueError(
                f"{str(path)!r} was not written by TrainingSet.save; "
                "to read rows from any other file use TrainingSet(path)"
            )
        return cls(path, check=check, index=index)
