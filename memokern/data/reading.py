"""Rows read chunk by chunk, the next one while the last is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memokern.data import files
from memokern.util.mapped import ask, forget, is_file

# One is filled while the other is used.
BUFFERS = 2
Chunk = tuple[int, Tensor]


class Mapped:
    """The rows of a mapped file [N, D], as chunks of `step` rows, from row `start` on."""

    def __init__(self, rows: Tensor, step: int, start: int = 0) -> None:
        self.rows, self.step, self.n, self.start = rows, step, len(rows), start

    def by(self, step: int, start: int = 0) -> Mapped:
        """The same rows, otherwise cut."""
        return Mapped(self.rows, step, start)

    def fill(self, free: Callable[[], Tensor], ready: Callable[[Chunk], None]) -> None:
        """Reads all rows into buffers that are free, and hands each on when it is full."""
        # Asked anew: a copy of the rows lies in memory, where what is forgotten is lost.
        file = is_file(self.rows)
        if file:
            ask(self.rows[self.start : self.start + self.step])
        for first in range(self.start, self.n, self.step):
            part = self.rows[first : first + self.step]
            buffer = free()[: len(part)]
            if file:  # the disk has something to do while this one is copied, and swept
                ask(self.rows[first + self.step : first + 2 * self.step])
            buffer.copy_(part)
            if file:
                forget(part)
            ready((first, buffer))


class Iterated:
    """The rows of a re-iterable, whose items [n, \\*shape] are put together to chunks of `step`
    rows, from row `start` on."""

    def __init__(
        self, source: Iterable[Any] | Callable[[], Iterable[Any]], step: int, start: int = 0
    ) -> None:
        self._source, self.step, self.start = source, step, start

    def by(self, step: int, start: int = 0) -> Iterated:
        """The same rows, otherwise cut."""
        return Iterated(self._source, step, start)

    def items(self) -> Iterator[Tensor]:
        """What is given, from the start; of tuples (a DataLoader's batches) the first part."""
        given = self._source() if callable(self._source) else self._source
        found = iter(given)
        if not callable(self._source) and found is self._source:
            raise TypeError(
                "expected chunks of rows that can be read again and again, got an iterator, which"
                " ends once: give the function that makes it, or a DataLoader"
            )
        for item in found:
            part = item[0] if isinstance(item, (tuple, list)) else item
            part = files.as_tensor(part, "a chunk") if isinstance(part, np.ndarray) else part
            if not isinstance(part, Tensor) or part.ndim < 2:
                got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"expected chunks of rows as tensors [n, *shape], got {got}")
            yield part

    def fill(self, free: Callable[[], Tensor], ready: Callable[[Chunk], None]) -> None:
        """As :meth:`Mapped.fill`."""
        first, filled, buffer, before = self.start, 0, None, self.start
        for item in self.items():
            rows = item.detach()[:, None].flatten(1) if len(item) else item[:0]
            before, rows = max(0, before - len(rows)), rows[before:]
            while len(rows):
                if buffer is None:
                    buffer = free()
                if rows.shape[1] != buffer.shape[1] or rows.dtype != buffer.dtype:
                    raise ValueError(
                        f"expected all chunks to have rows of {buffer.shape[1]} numbers of"
                        f" {buffer.dtype}, got {list(item.shape)} {item.dtype}"
                    )
                taken = min(len(rows), len(buffer) - filled)
                buffer[filled : filled + taken] = rows[:taken]
                rows, filled = rows[taken:], filled + taken
                if filled == len(buffer):
                    ready((first, buffer))
                    first, filled, buffer = first + filled, 0, None
        if buffer is not None and filled:
            ready((first, buffer[:filled]))


class _Stopped(Exception):
    """Nobody wants what is read."""


def ahead(source: Mapped | Iterated, like: Tensor, device: torch.device) -> Iterator[Chunk]:
    """The chunks (number of the first row, rows [n, D] on the device), read by a thread that is one
    chunk ahead. A chunk's memory is used again when the next one is asked for.

    like: [0, D] of the rows' type. Errors of the source are raised here.
    """
    gpu = device.type == "cuda"
    buffers = [
        torch.empty((source.step, like.shape[1]), dtype=like.dtype, pin_memory=gpu)
        for _ in range(BUFFERS)
    ]
    free: queue.Queue[Tensor | None] = queue.Queue()
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue()
    for buffer in buffers:
        free.put(buffer)

    def take() -> Tensor:
        found = free.get()
        if found is None:
            raise _Stopped
        return found

    def read() -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                source.fill(take, ready.put)
            ready.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=read, name="memokern rows", daemon=True)
    thread.start()
    try:
        yield from _on(device, ready, free, buffers) if gpu else _here(ready, free, buffers)
    finally:
        free.put(None)
        thread.join()


def _next(ready: queue.Queue[Any]) -> Chunk | None:
    found = ready.get()
    if isinstance(found, BaseException):
        raise found
    chunk: Chunk | None = found
    return chunk


def _whole(part: Tensor, buffers: list[Tensor]) -> Tensor:
    """The buffer that a chunk is the beginning of."""
    return next(v for v in buffers if v.data_ptr() == part.data_ptr())


def _here(
    ready: queue.Queue[Any], free: queue.Queue[Any], buffers: list[Tensor]
) -> Iterator[Chunk]:
    while (chunk := _next(ready)) is not None:
        yield chunk
        free.put(_whole(chunk[1], buffers))


def _on(
    device: torch.device, ready: queue.Queue[Any], free: queue.Queue[Any], buffers: list[Tensor]
) -> Iterator[Chunk]:
    """The same on a GPU: the next chunk is copied, from pinned memory, while the last is used."""
    copies = torch.cuda.Stream(device)
    waiting: tuple[int, Tensor, Any] | None = None
    while True:
        chunk = _next(ready)
        coming = None
        if chunk is not None:
            first, part = chunk
            copies.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(copies):
                there = part.to(device, non_blocking=True)
                done = torch.cuda.Event()
                done.record(copies)
            coming = first, there, (done, part)
        if waiting is not None:
            first, there, (done, part) = waiting
            torch.cuda.current_stream(device).wait_event(done)
            there.record_stream(torch.cuda.current_stream(device))
            yield first, there
            done.synchronize()
            free.put(_whole(part, buffers))
        if coming is None:
            return
        waiting = coming
