"""A training set of which each process holds a part of the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memokern.calls import Rows
from memokern.data import files, parts
from memokern.data.derived import Derived
from memokern.data.parted import PartedSet, no_rows, share
from memokern.data.storage import as_given, check_rows, checked_index
from memokern.data.stored import PER_ROW
from memokern.data.training_set import TrainingSet
from memokern.util.ranks import Ranks, checksum

QUERIES = ("replicated", "split")


class ShardedSet(PartedSet):
    r"""A training set whose rows lie on several ranks of :mod:`torch.distributed`, in their order.

    :func:`memokern.distributed.shard` makes it. Every function that takes a TrainingSet takes it.
    Calls are collective: all ranks make the same ones, in the same order, with the same queries, or
    with queries="split" each with its own. Biases, labels, conditions and log weights that are
    given or read are those of this rank's rows; row numbers count through all ranks.

    Attributes:
        rows: [n_here, D], this rank's. n: the number of all rows. n_here: that of this rank's.
            first: the number of its first row. streams: whether any rank reads rows in chunks.
        ranks: who the others are. queries: "replicated" or "split".
        labels, conditions, log_weights: of this rank's rows; others: as a TrainingSet's.

    Raises: RuntimeError where another rank dies, raises or is late, ValueError where one was asked
        something else; on every rank.
    """

    def __init__(self, mine: TrainingSet, n_here: int, ranks: Ranks, queries: str) -> None:
        """mine: this rank's rows; of a rank without any, one row that stands for what they are
        like, and n_here = 0. The ranks come together here."""
        if queries not in QUERIES:
            raise ValueError(f"expected queries one of {', '.join(QUERIES)}, got {queries!r}")
        self.part: TrainingSet | None = mine if n_here else None
        self.ranks, self.queries, self.shape, self.name = ranks, queries, mine.shape, mine.name
        self.scale, self.shift = mine.scale, mine.shift
        self.rows, self._n_here = mine.rows if n_here else no_rows(mine.rows), n_here
        for name in PER_ROW:
            value = getattr(mine, name)
            setattr(self, name, value if n_here or value is None else no_rows(value))
        self._agree()
        self._derived = Derived(
            self.rows, self.scale, self.shift, center=self._joint_center(mine),
            sq_norms=None if n_here else mine.center64[:0],
        )  # fmt: skip
        if self.part is not None and mine.index is None:
            self.part.adopt(self._derived)
        self._note_index()

    def _agree(self) -> None:
        """Compares what the ranks' rows are like, and counts them."""
        known = [] if self.labels is None else self.labels.unique().tolist()
        conditions = None if self.conditions is None else self.conditions.shape[1]
        alike = {
            "rows": f"{str(self.rows.dtype).removeprefix('torch.')} {list(self.shape)}",
            "scale": repr(self.scale), "shift": repr(self.shift), "conditions": conditions,
            "labels": self.labels is not None, "queries": self.queries,
            "log_weights": self.log_weights is not None, "_n": self.n_here, "_known": len(known),
            "_streams": isinstance(self.part, PartedSet),
        }  # fmt: skip
        found = self.ranks.agree("shard", alike)
        self.streams = any(facts["_streams"] for facts in found)
        self.counts = counts = [int(facts["_n"]) for facts in found]
        self.whole_n, self.first = sum(counts), sum(counts[: self.ranks.rank])
        if self.whole_n == 0:
            raise ValueError("no rank has a row")
        most = max(int(facts["_known"]) for facts in found)
        self.known_labels: list[int] = []
        if most:
            numbers = (known + known[:1] * most)[:most] or [-(2**62)] * most
            padded = torch.tensor(numbers, device="cpu")
            every = self.ranks.gather(padded, "shard").unique().tolist()
            self.known_labels = [v for v in every if v != -(2**62)]
        self._of_label: dict[int, tuple[Tensor, TrainingSet]] = {}

    def _note_index(self) -> None:
        """Sees whether all ranks that have rows have an index of them, and how far any row lies
        from the joint center, at most."""
        index = self.index
        reach = 0.0
        if index is not None:
            off = index.center.to(torch.float64) - self.center64
            reach = (index.y_max + float(off.norm())) * (1 + 2.0**-40)
        lacks = float(index is None and self.n_here > 0)
        mine = torch.tensor([reach, lacks], dtype=torch.float64, device="cpu")
        most, missing = self.ranks.gather(mine, "index").amax(0).tolist()
        self.radius: float | None = None if missing else most

    def _joint_center(self, mine: TrainingSet) -> Tensor:
        """A point amid all rows: the mean of the parts' centers."""
        index = None if self.part is None else self.part.index
        center = mine.center64 if index is None else index.center.to(torch.float64)
        n = self.n_here
        (total,) = self.ranks.sum([center * n if n else torch.zeros_like(center)], "shard")
        return (total / self.n).to(mine.center.dtype)

    # --- rows -----------------------------------------------------------------------------------

    @property
    def n_here(self) -> int:
        """How many rows lie on this rank."""
        return self._n_here

    def as_rows(self) -> Rows:
        """This rank's rows as the operations take them."""
        return self._derived.as_rows() if self.part is None else self.part.as_rows()

    @property
    def how_swept(self) -> str:
        """What a sweep does here, for :func:`memokern.explain`."""
        part = f", {self.part.how_swept}" if isinstance(self.part, PartedSet) else ""
        return f"{self.n} rows on {self.ranks.size} ranks, {self.n_here} of them here{part}"

    @property
    def index(self) -> Any:
        """The index of this rank's rows, or None."""
        return None if self.part is None else self.part.index

    @property
    def indexed(self) -> bool:
        """Whether the ranks have indices of their rows."""
        return self.radius is not None

    def __repr__(self) -> str:
        part = "no rows here" if self.part is None else f"here {self.part!r}"
        return f"ShardedSet({self.n} rows on {self.ranks.size} ranks; {part})"

    def local_numbers(self, rows: Tensor) -> Tensor:
        """Where rows, by their numbers among all, are among this rank's; -1 for others."""
        place = rows - self.first
        return torch.where((place >= 0) & (place < self.n_here), place, -1)

    def gather(self, index: Tensor) -> Tensor:
        """The values of the rows at `index`, as a TrainingSet's; one sum over the ranks. Where
        queries are split each rank has an index of its own."""
        error: Exception | None = None
        try:
            index = checked_index(index, self.n, self.device)
        except Exception as raised:
            error = raised
        wanted, own = self._asked_by_all(index, error)
        place = self.local_numbers(wanted)
        values = torch.zeros(len(place), self.dim, dtype=self.compute_dtype, device=self.device)
        here = place >= 0
        if self.part is not None:
            # Of those elsewhere, the first row's are taken in vain: a pass over chunks, where rows
            # come in no other way, is all ranks' or none's.
            found = self.part.gather(place.clamp(min=0)).reshape(len(place), self.dim)
            values[here] = found[here]
        (values,) = self.ranks.sum([values], "gather")
        return values[own].reshape((*index.shape, *self.shape))

    def _asked_by_all(self, index: Tensor, error: Exception | None) -> tuple[Tensor, slice]:
        """The row numbers that are asked for, of split queries by any rank, and which of these are
        this rank's."""
        if error is not None:
            self.ranks.refuse("gather", error)
            raise error
        flat = index.reshape(-1)
        if self.queries != "split":
            self.ranks.agree("gather", {"index": checksum(flat)})
            return flat, slice(None)
        told = self.ranks.agree("gather", {"_b": len(flat)})
        counts = [int(facts["_b"]) for facts in told]
        padded = torch.cat([flat, flat.new_zeros(max(counts) - len(flat))])
        pairs = zip(self.ranks.gather(padded, "gather"), counts, strict=True)
        first = sum(counts[: self.ranks.rank])
        return torch.cat([v[:count] for v, count in pairs]), slice(first, first + len(flat))

    def __getitem__(self, item: int | slice | Tensor) -> Tensor:
        """As a TrainingSet's: on every rank, whichever has the rows."""
        if isinstance(item, int) and not -self.n <= item < self.n:
            raise IndexError(f"row {item} of {self.n}")
        picked = torch.arange(self.n, device=self.device)[item]
        return self.gather(picked)

    def most(self, count: int) -> int:
        """The largest of the ranks' numbers, where queries are split."""
        if self.queries != "split":
            return count
        return int(self.ranks.gather(torch.tensor([count]), "count").max())

    def label_count(self) -> int:
        """1 more than the largest label of any rank."""
        return max(0, *(v + 1 for v in self.known_labels)) if self.known_labels else 0

    def has_label(self, label: int) -> bool:
        """Whether a row of any rank has the label."""
        return label in self.known_labels

    # --- other training sets --------------------------------------------------------------------

    def _remade(self, part: TrainingSet | None) -> ShardedSet:
        """The set with other rows on this rank, or none."""
        like = part
        if like is None:
            per_row: dict[str, Any] = {
                name: None if getattr(self, name) is None else _blank(getattr(self, name))
                for name in PER_ROW
            }
            like = TrainingSet(
                _blank(self.rows).reshape((1, *self.shape)), scale=self.scale, shift=self.shift,
                name=self.name, check=False, **per_row,
            )  # fmt: skip
        return ShardedSet(like, 0 if part is None else part.n, self.ranks, self.queries)

    @torch.inference_mode(False)
    def subset(self, index: Tensor | np.ndarray | Sequence[int] | slice) -> ShardedSet:
        """The rows chosen by an index, ascending, a mask [N] or a slice, on the ranks where they
        are."""
        every = torch.arange(self.n, device=self.device)
        chosen = every[index if isinstance(index, slice) else as_given(index, "index")]
        if chosen.ndim != 1 or bool((chosen.diff() <= 0).any()):
            raise ValueError("expected rows of a sharded set in ascending order, each once")
        return self._of_places(self.local_numbers(chosen))

    def _of_places(self, place: Tensor) -> ShardedSet:
        place = place[place >= 0]
        mine = self.part
        return self._remade(None if mine is None or not len(place) else mine.subset(place))

    def where(self, label: int | Sequence[int]) -> ShardedSet:
        """The rows with this label, or one of these labels, on the ranks where they are."""
        if self.labels is None:
            raise ValueError("this training set has no labels (integers): make it with labels=")
        wanted = as_given(label, "label").reshape(-1)
        if not any(self.has_label(int(v)) for v in wanted):
            raise ValueError(
                f"no row has the label {label}; the labels are {self.known_labels[:20]}"
            )
        at = torch.isin(self.labels, wanted.to(self.device)).nonzero()[:, 0]
        return self._of_places(at)

    def of_label(self, label: int) -> tuple[Tensor, TrainingSet]:
        """Which of this rank's rows have the label, and the set of all that have it."""
        if label not in self._of_label:
            chosen = self.where(label)
            assert self.labels is not None
            self._of_label[label] = (self.labels == label).nonzero()[:, 0], chosen
        return self._of_label[label]

    def renewed(self, rows: Tensor, scale: float, shift: float, **own: Any) -> ShardedSet:
        """A sharded set of other rows in these one's place."""
        if not len(rows):
            return self._remade(None)
        return self._remade(
            TrainingSet(rows, scale=scale, shift=shift, name=self.name, check=False, **own)
        )

    def each(self, function: Callable[[Tensor], Tensor]) -> ShardedSet:
        """As a TrainingSet's, of this rank's rows."""
        like = self.part
        if like is None:  # what they would be like
            one = _blank(self.rows).reshape((1, *self.shape))
            like = TrainingSet(one, scale=self.scale, shift=self.shift, check=False)
        return ShardedSet(like.each(function), self.n_here, self.ranks, self.queries)

    def to(self, device: torch.device | str) -> ShardedSet:
        """The same set with this rank's rows on another device."""
        if torch.device(device) == self.device:
            return self
        return self._remade(None if self.part is None else self.part.to(device))

    def _build_index(self, resume: str | os.PathLike[str] | None = None, **choices: Any) -> None:
        """Each rank makes one of its rows, in a folder of its own."""
        error: Exception | None = None
        if self.part is not None:
            try:
                own = resume and Path(resume) / f"rank-{self.ranks.rank}-of-{self.ranks.size}"
                self.part.build_index(**choices, resume=own or None)
            except Exception as raised:
                error = raised
        self.ranks.settle("build_index", error)
        self._note_index()
        self._of_label.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes each rank's rows, with index, into a folder as one file; `shard` reads it back.
        The folder appears when all parts are written, and takes the place of one of such parts.

        Raises: ValueError for a path with a suffix of a file; FileExistsError for a folder that has
        something else.
        """
        folder = Path(os.path.abspath(path))
        # The ranks' own folder, which each of them knows by name; one that was left is replaced.
        partial = folder.with_name(f".{folder.name}.partial")
        counts = [rank for rank, count in enumerate(self.counts) if count]

        def prepare() -> None:
            if folder.suffix in files.FORMATS:
                raise ValueError(
                    f"expected a folder for {self.ranks.size} parts, got {str(path)!r}"
                )
            parts.require_replaceable(folder)
            if self.ranks.rank == 0:
                parts.clear(partial)
                partial.mkdir()

        def write() -> None:
            if self.part is not None:
                place = counts.index(self.ranks.rank)
                self.part.save(partial / parts.name(place, len(counts)))

        def publish() -> None:
            if self.ranks.rank == 0:
                parts.put_in_place(partial, folder)

        for step in (prepare, write, publish):
            error: Exception | None = None
            try:
                step()
            except Exception as raised:
                error = raised
            self.ranks.settle("save", error)


def _blank(values: Tensor) -> Tensor:
    return values.new_zeros((1, *values.shape[1:]))


def own_rows(
    data: Any, ranks: Ranks, options: Mapping[str, Any], already_apart: bool
) -> tuple[TrainingSet, int]:
    """This rank's share of the data as a training set, and how many rows it has: 0 where the set
    only stands for what rows are like."""
    if already_apart:
        return _counted(data, options)
    if isinstance(data, (str, os.PathLike)) and os.path.isdir(data):
        found = parts.of_folder(data)
        if found:
            return _of_parts(found, ranks, options)
    whole = data
    if not isinstance(whole, TrainingSet):
        whole = TrainingSet(data, check=False, **options)
    first, last = share(whole.n, ranks.rank, ranks.size)
    if first == last:
        return whole.subset(slice(0, 1)), 0
    return whole.subset(slice(first, last)), last - first


def _counted(data: Any, options: Mapping[str, Any]) -> tuple[TrainingSet, int]:
    if isinstance(data, TrainingSet):
        return data, data.n
    if isinstance(data, (Tensor, np.ndarray)) and len(data) == 0:
        rows = as_given(data, "rows")
        rows = rows.new_zeros((1, *rows.shape[1:]))
        check_rows(rows)
        per_row = {k: v for k, v in options.items() if k not in PER_ROW}
        blank: dict[str, Any] = {
            k: _blank(as_given(options[k], k)) for k in PER_ROW if options.get(k) is not None
        }
        return TrainingSet(rows, check=False, **blank, **per_row), 0
    found = TrainingSet(data, **options)
    return found, found.n


def _of_parts(
    paths: list[Path], ranks: Ranks, options: Mapping[str, Any]
) -> tuple[TrainingSet, int]:
    """The share of the rows in several files, as they follow each other. As many files as ranks are
    one for each, with its index."""
    if len(paths) == ranks.size:
        return _counted(paths[ranks.rank], options)
    sets = [TrainingSet(path, check=False, index=False, **options) for path in paths]
    first, last = share(sum(s.n for s in sets), ranks.rank, ranks.size)
    if first == last:
        return sets[0].subset(slice(0, 1)), 0
    taken, start = [], 0
    for found in sets:
        low, high = max(first, start) - start, min(last, start + found.n) - start
        if low < high:
            taken.append(found.subset(slice(low, high)))
        start += found.n
    if len(taken) == 1:
        return taken[0], taken[0].n
    joined: dict[str, Any] = {}
    for name in PER_ROW:
        values = [getattr(part, name) for part in taken]
        joined[name] = None if any(v is None for v in values) else torch.cat(values)
    one = taken[0]
    rows = torch.cat([part.rows for part in taken]).reshape((last - first, *one.shape))
    whole = TrainingSet(
        rows, scale=one.scale, shift=one.shift, name=one.name, check=False, **joined
    )
    return whole, whole.n
