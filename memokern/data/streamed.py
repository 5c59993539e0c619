"""A training set whose rows are read chunk by chunk, over and over: more than memory holds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from memokern.calls import Rows
from memokern.calls.values import dequantized
from memokern.data import sources, storage
from memokern.data.derived import Derived
from memokern.data.parted import PartedSet, no_rows
from memokern.data.reading import Iterated, Mapped, ahead
from memokern.data.storage import center, checked_index, require_finite
from memokern.data.stored import PER_ROW
from memokern.data.training_set import TrainingSet
from memokern.index.build import Source, build
from memokern.index.checksum import Checksum
from memokern.index.index import Index, evenly_spaced_rows, fingerprint_of, fingerprint_rows
from memokern.util import checks, mapped
from memokern.util.tensor_file import Stream

CHUNK_BYTES = 64 << 20
ELEMENTS = 1 << 22  # of a temporary
MIDDLE_ROWS = 4096  # at most, for the center of a file's rows


def _step(rows: Tensor, chunk_bytes: int) -> int:
    """How many rows a chunk has."""
    return max(1, chunk_bytes // (rows.shape[1] * rows.element_size()))


class StreamedSet(PartedSet):
    r"""A training set of which two chunks are in memory at a time; every function of memokern takes
    it, and gives what it gives for a :class:`memokern.TrainingSet`.

    A sweep reads all rows once, for all queries together: give as many queries to a call as there
    are. The next chunk is read by a thread while the last is swept. With an index of a file, which
    stays in memory, queries at small noise read only the rows that matter.

    Args:
        source: a path of a `.npy`, `.npz` or `.safetensors` file, which is mapped; or chunks of
            rows [n, \*shape] that can be read again and again: a list, a DataLoader (of whose
            batches the first part counts), or a function that returns an iterator.
        chunk_bytes: how large a chunk is, at most; a row at least.
        device: where the rows are swept; chunks are copied there from pinned memory, while the last
            one is swept.
        progress: whether to show a bar for each pass. None shows it on a terminal, after 2 s.
        check: False skips the search for NaN and infinite values in the first pass.
        others: as TrainingSet; labels, conditions and log_weights [N] stay in memory.

    Attributes: as TrainingSet's, but for `rows`, which holds none of them. center is that of some
        rows, spaced evenly through a file, else of the first chunk's.

    Raises: as TrainingSet; TypeError for an iterator, which could be read only once; RuntimeError
        for chunks that have become others, and for second derivatives.

    Gradients: for x, sigma, alpha, temperature, bias, condition and bandwidth, once; a second pass.

    Cost: memory 2 chunk_bytes, 8 N bytes of norms, the index, and what a sweep of one chunk takes.
        The first pass checks rows and computes norms.

    Example:
        >>> import torch, memokern
        >>> rows = torch.randn(1000, 4)
        >>> data = memokern.StreamedSet(lambda: iter(rows.split(64)), chunk_bytes=1 << 12)
        >>> x = torch.zeros(2, 4)
        >>> found, whole = (memokern.posterior(x, v, 1.0).mean for v in (data, rows))
        >>> data.n, bool(torch.allclose(found, whole, atol=1e-6))
        (1000, True)
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Any] | Callable[[], Iterable[Any]] | TrainingSet,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        device: torch.device | str = "cpu",
        progress: bool | None = None,
        check: bool = True,
        **options: Any,
    ) -> None:
        chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, 1, 2**62)
        self._device, self._progress, self._check = torch.device(device), progress, check
        self._mapped: TrainingSet | None = None
        self._norms: Tensor | None = None
        self._center: Tensor | None = None
        self._index: Index | None = None
        if isinstance(source, (str, os.PathLike, TrainingSet)):
            whole = source
            if not isinstance(whole, TrainingSet):
                whole = TrainingSet(whole, check=False, **options)
            elif options:
                raise ValueError(f"options of a TrainingSet are its own: leave out {list(options)}")
            self._mapped = like = whole
            self._source: Mapped | Iterated = Mapped(whole.rows, _step(whole.rows, chunk_bytes))
            self.whole_n = whole.n
        else:
            first = next(Iterated(source, 1).items(), None)
            if first is None or len(first) == 0:
                raise ValueError("expected chunks of rows, got none, or a first one without rows")
            kept = {k: v for k, v in options.items() if k not in PER_ROW}
            like = TrainingSet(first[:1].detach().cpu().clone(), check=False, **kept)
            self._source = Iterated(source, _step(like.rows, chunk_bytes))
        self.shape, self.name = like.shape, like.name
        self.scale, self.shift = like.scale, like.shift
        self.rows = no_rows(like.rows).to(self._device)
        self._derived = Derived(self.rows, self.scale, self.shift)
        for name in PER_ROW:
            setattr(self, name, None)
        if self._mapped is None:
            self._first_pass()
            assert self._norms is not None
            # Their checks, for N rows of one number.
            given = {k: options[k] for k in PER_ROW if options.get(k) is not None}
            like = TrainingSet(torch.zeros(1, 1).expand(self.n, 1), check=False, **given)
        for name in PER_ROW:
            value = getattr(like, name)
            setattr(self, name, None if value is None else value.to(self._device))

    # --- chunks ---------------------------------------------------------------------------------

    def raw_chunks(
        self, what: str = "sweeping rows", start: int = 0, multiple: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row and the stored rows [n, D], of chunk after chunk, from row
        `start` on; of a multiple of so many rows, but for the last. A chunk's memory is used again
        when the next one is asked for."""
        total = self._rows_known() or None
        source = self._source
        if start or multiple > 1:
            source = source.by(max(1, source.step // multiple) * multiple, start)
        hidden = None if self._progress is None else not self._progress
        with tqdm(
            total=total, initial=start, desc=what, unit=" rows", leave=False, disable=hidden,
            delay=2 if self._progress is None else 0,
        ) as bar:  # fmt: skip
            n = start
            for first, rows in ahead(source, self.rows, self._device):
                yield first, rows
                n += len(rows)
                bar.update(len(rows))
        if total is not None and n != total:
            raise RuntimeError(f"expected the {total} rows that there were before, got {n}")

    def chunks(self) -> Iterator[tuple[int, Rows]]:
        """The same as the operations take them."""
        self._first_pass()
        assert self._norms is not None and self._center is not None
        center = self._center.to(torch.float64)
        for first, rows in self.raw_chunks():
            norms = self._norms[first : first + len(rows)]
            if len(norms) < len(rows):
                raise RuntimeError(f"expected the {self.n} rows that there were before, got more")
            yield first, Rows(rows, self.scale, self.shift, center, norms)

    def _first_pass(self) -> None:
        """Checks the rows, counts them, and computes norms, unless that was done."""
        if self._norms is not None:
            return
        with torch.inference_mode(False), torch.no_grad():
            # One tensor from the start: small ones that stay, made between large ones that go,
            # would leave holes as large as the file in the heap.
            norms = torch.empty(self._rows_known(), dtype=torch.float64, device=self._device)
            held = self._mapped
            if held is not None and held.index is not None:
                # The index is for these very numbers, and its checksums are those of the rows.
                self._center = held.index.center.to(self._device)
                self._norms = held.sq_norms.to(self._device)
                return
            center = None if held is None else self._middle(held.rows)
            n = 0
            for first, rows in self.raw_chunks("reading rows"):
                if self._check:
                    require_finite(rows, first)
                if center is None:
                    center = self._values(rows[: max(1, ELEMENTS // rows.shape[1])]).mean(0)
                    center = center.to(self.compute_dtype)
                n = first + len(rows)
                if n > len(norms):
                    norms = torch.cat([norms, torch.empty_like(norms), norms.new_empty(n)])
                self._write_norms(norms[first:n], rows, center.to(torch.float64))
            if center is None:
                raise ValueError("there are no rows")
            self._center, self._norms = center, norms[:n].clone()
        self.whole_n = len(self._norms)

    def _middle(self, rows: Tensor) -> Tensor:
        """A point amid the rows of a file, from some of them, spaced evenly."""
        most = max(1, min(MIDDLE_ROWS, self._source.step))
        some = mapped.take(rows, evenly_spaced_rows(len(rows), most))
        return center(some, self.scale, self.shift, self.compute_dtype).to(self._device)

    def _values(self, rows: Tensor) -> Tensor:
        return dequantized(rows, self.scale, self.shift).to(torch.float64)

    def _rows_known(self) -> int:
        """How many rows there are; 0 where nobody has counted."""
        known: int = getattr(self, "whole_n", 0)
        return known

    def _write_norms(self, norms: Tensor, rows: Tensor, center: Tensor) -> None:
        step = max(1, storage.CHUNK_ELEMENTS // rows.shape[1])
        for part, out in zip(rows.split(step), norms.split(step), strict=True):
            torch.sum((self._values(part) - center).square_(), dim=1, out=out)

    @property
    def center(self) -> Tensor:
        """A point amid the rows, [D], of some of them."""
        self._first_pass()
        assert self._center is not None
        return self._center

    @property
    def center64(self) -> Tensor:
        """`center` as float64."""
        return self.center.to(torch.float64)

    @property
    def sq_norms(self) -> Tensor:
        """|y_n - center|^2, [N] float64."""
        self._first_pass()
        assert self._norms is not None
        return self._norms

    @property
    def how_swept(self) -> str:
        """What a sweep does, for :func:`memokern.explain`."""
        return f"read {self._source.step} rows at a time"

    @property
    def index(self) -> Any:
        """The index of the rows, or None."""
        return self._index if self._mapped is None else self._mapped.index

    @property
    def nbytes(self) -> int:
        """Bytes of what is in memory: two chunks, norms, index and what belongs to each row."""
        held = (self._norms, self.index, *(getattr(self, name) for name in PER_ROW))
        row = self.rows.element_size() * self.dim
        return 2 * row * self._source.step + sum(v.nbytes for v in held if v is not None)

    def as_rows(self) -> Rows:
        """The rows as the operations take them, of which only those of a file have values, each
        read when it is used: a sweep over all goes by :meth:`chunks`."""
        if self._mapped is not None:
            rows = self._mapped.rows
            if self._norms is None:
                return Rows(rows, self.scale, self.shift)
            return Rows(rows, self.scale, self.shift, self.center64, self._norms)
        kind = self.rows.dtype
        nothing = torch.nan if kind.is_floating_point else 0
        rows = torch.full((1, self.dim), nothing, dtype=kind, device=self._device)
        rows = rows.expand(self.n, self.dim)
        return Rows(rows, self.scale, self.shift, self.center64, self._norms)

    def gather(self, index: Tensor) -> Tensor:
        """The values of the rows at `index`, as a TrainingSet's; of chunks that are not a file's,
        by a pass over all."""
        index = checked_index(index, self.n, self._device)
        flat = index.reshape(-1)
        return self.dequantize(self.stored(flat)).reshape((*index.shape, *self.shape))

    def stored(self, index: Tensor) -> Tensor:
        """The rows with these numbers [k] as they are stored, [k, D]; see :meth:`gather`."""
        if self._mapped is not None:
            return mapped.take(self._mapped.rows, index).to(self._device)
        taken = self.rows.new_empty((len(index), self.dim))
        for first, rows in self.raw_chunks():
            here = (index >= first) & (index < first + len(rows))
            taken[here] = rows[index[here] - first]
        return taken

    def __getitem__(self, item: int | slice | Tensor) -> Tensor:
        """As a TrainingSet's."""
        if isinstance(item, int) and not -self.n <= item < self.n:
            raise IndexError(f"row {item} of {self.n}")
        return self.gather(torch.arange(self.n, device="cpu")[item])

    def __repr__(self) -> str:
        kind = str(self.rows.dtype).removeprefix("torch.")
        name = f"{self.name}: " if self.name else ""
        step = self._source.step
        return f"StreamedSet({name}{self.n} rows {list(self.shape)} {kind}, {step} at a time)"

    # --- other sets -----------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedSet:
        """A copy whose rows are those of the same file, which stay there."""
        if self._mapped is not None:
            memo[id(self._mapped.rows)] = self._mapped.rows
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def in_file(self) -> bool:
        """Whether the rows are in a file, where each can be read by itself."""
        return self._mapped is not None

    def file(self, what: str) -> TrainingSet:
        """The mapped file; RuntimeError where the rows are of another source."""
        if self._mapped is None:
            raise RuntimeError(f"{what} needs rows in any order: write them to a .npy file first")
        return self._mapped

    def _with(self, held: TrainingSet) -> StreamedSet:
        row = self.rows.element_size() * self.dim
        return StreamedSet(
            held, chunk_bytes=self._source.step * row, device=self._device,
            progress=self._progress, check=self._check and self._norms is None,
        )  # fmt: skip

    def subset(self, index: Any) -> StreamedSet:
        """A slice of a file's rows stays in the file; other rows of it are copied to memory."""
        return self._with(self.file("a subset").subset(index))

    def of_label(self, label: int) -> tuple[Tensor, TrainingSet]:
        """Which rows have this label, and a set of them, in memory."""
        return self.file("a label").of_label(label)

    def renewed(self, rows: Tensor, scale: float, shift: float, **own: Any) -> TrainingSet:
        """The set itself: its rows are nowhere but in its source."""
        if len(rows):
            return TrainingSet(rows, scale=scale, shift=shift, name=self.name, check=False, **own)
        if (scale, shift) != (self.scale, self.shift) or rows.dtype != self.rows.dtype:
            self.refuse("a change of all rows", "change the file")
        return self

    def each(self, function: Callable[[Tensor], Tensor]) -> StreamedSet:
        """As a TrainingSet's; it is made anew in each pass."""

        def made() -> Iterator[Tensor]:
            for _, rows in self.raw_chunks():
                yield function(self.dequantize(rows)).reshape(len(rows), *self.shape)

        return StreamedSet(
            made, chunk_bytes=self._source.step * self.dim, device=self._device,
            progress=self._progress, check=False, scale=1.0, shift=0.0,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> StreamedSet:
        """The same rows, swept on another device."""
        if torch.device(device) == self._device:
            return self
        self.refuse("a move", "give device= to the StreamedSet")
        return self

    def adopt(self, derived: Derived) -> None:
        """Keeps its own center and norms."""

    def _build_index(self, progress: bool | None = None, **choices: Any) -> None:
        """One pass for norms, unless that was made, and one for the index, which stays in memory,
        or with resume= in files; of rows that are not a file's, one more for those that the basis
        is fitted to."""
        self._first_pass()
        assert self._norms is not None
        choices["progress"] = self._progress if progress is None else progress
        rows = self._rows_for_index(self._norms)
        self._index = build(rows, self.center, self.shape, **choices)
        if self._mapped is not None:
            known: dict[str, Any] = {"sq_norms": self._norms, "index": self._index}
            self._mapped.adopt(Derived(self._mapped.rows, self.scale, self.shift, **known))

    def _rows_for_index(self, norms: Tensor) -> Source:
        def chunks(first: int, step: int) -> Iterator[tuple[int, Tensor]]:
            yield from self.raw_chunks("building the index", first, step)

        def some(at: Tensor) -> Tensor:
            return self.stored(at.to(self._device))

        most = fingerprint_rows(self.n, self.rows)
        mark = fingerprint_of(some(most), (self.n, self.dim), self.scale, self.shift)
        return Source(self.n, self.dim, self.scale, self.shift, norms, some, chunks, mark)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows and index as :meth:`memokern.TrainingSet.save`, chunk by chunk; rows that are
        not a file's in two passes."""
        if self._mapped is not None:
            self._mapped.save(path)
            return
        rows = Stream(
            (self.n, *self.shape), self.rows.dtype,
            lambda: (chunk for _, chunk in self.raw_chunks("writing rows")),
        )  # fmt: skip
        tensors = {"rows": rows, **{name: getattr(self, name) for name in PER_ROW}}
        index = None
        if self._index is not None:
            total = Checksum((self.n, self.dim), self.rows.dtype)
            for _, chunk in self.raw_chunks("checking rows"):
                total.update(chunk)
            index = self._index.state(total.hexdigest(), self.sq_norms)
        sources.write(path, tensors, sources.described(self), index)
