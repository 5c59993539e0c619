"""An index that is being built, kept in a folder so that a build that was killed goes on where it
stopped."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from memokern.util.tensor_file import write_tensors
from memokern.util.writing import atomic, write_json

try:
    import fcntl
except ImportError:  # where a file cannot be locked, nobody is kept from building twice
    fcntl = None  # type: ignore[assignment]

STATE, BASIS, LOCK = "state.json", "basis.safetensors", "lock"
# Rows that are projected become safe after so many seconds.
SECONDS = 5.0


class Unfinished:
    """The arrays of an index in files, and how many rows of them are done.

    Args:
        folder: made where it is not there.
        identity: what the index is of: rows, choices, versions. Files of another identity are
            removed, and the build starts anew.
        arrays: shapes and types by name.

    Attributes: done: how many rows are projected. arrays: [N, .] by name, as they are in the files.

    Raises: RuntimeError where another process builds in the folder; OSError for a disk without room
        for the arrays, before any row is projected.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        arrays: Mapping[str, tuple[tuple[int, int], torch.dtype]],
    ) -> None:
        self.folder, self.done, self._identity = folder, 0, json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._begin(arrays)
        except BaseException:
            self.close()
            raise

    def _begin(self, arrays: Mapping[str, tuple[tuple[int, int], torch.dtype]]) -> None:
        known = self._known()
        self._same = known is not None  # as an earlier build's
        if known is None:
            for entry in self.folder.iterdir():
                if entry.name in (STATE, BASIS) or entry.suffix == ".rows":
                    entry.unlink()
        else:
            self.done = known
        self._maps: list[np.memmap] = []
        self.arrays = {name: self._array(name, *kind) for name, kind in arrays.items()}
        self._noted = time.monotonic()

    def _locked(self) -> Any:
        handle = open(self.folder / LOCK, "w")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.close()
                raise RuntimeError(
                    f"another process builds an index in {str(self.folder)!r}: wait for it, or"
                    " choose another folder"
                ) from error
        return handle

    def _known(self) -> int | None:
        """How many rows an earlier build of the same index has done; None where there is none."""
        try:
            state = json.loads((self.folder / STATE).read_text())
            done: int = state["done"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return done if state.get("identity") == self._identity else None

    def _array(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        path = self.folder / f"{name}.rows"
        if 0 in shape:  # which no file can be mapped for
            return torch.empty(shape, dtype=dtype, device="cpu")
        kind = np.dtype(str(dtype).removeprefix("torch."))
        size = shape[0] * shape[1] * kind.itemsize
        if not path.exists() or path.stat().st_size != size:
            self.done = 0
            with open(path, "wb") as file:
                _reserve(file.fileno(), size, path)
        mapped = np.memmap(path, dtype=kind, mode="r+", shape=shape)
        self._maps.append(mapped)
        return torch.from_numpy(mapped)

    def basis(self) -> dict[str, Tensor] | None:
        """What an earlier build fitted, or None."""
        if self._same:
            with contextlib.suppress(OSError, safetensors.SafetensorError):
                return safetensors.torch.load_file(self.folder / BASIS)
        self.done = 0
        return None

    def keep_basis(self, state: Mapping[str, Tensor]) -> None:
        """Keeps what was fitted: the rows that follow are projected on it."""
        with atomic(self.folder / BASIS) as path, open(path, "wb") as file:
            write_tensors(file, state, {})
        self.note(0, True)

    def note(self, done: int, now: bool = False) -> None:
        """Notes that so many rows are done; every few seconds, or now."""
        if not now and time.monotonic() - self._noted < SECONDS:
            return
        for mapped in self._maps:
            mapped.flush()  # before they are said to be there
        write_json(self.folder / STATE, {"identity": self._identity, "done": done})
        self.done, self._noted = done, time.monotonic()

    def close(self) -> None:
        """Lets others build in the folder."""
        self._lock.close()


@contextlib.contextmanager
def unfinished(
    folder: str | os.PathLike[str] | None,
    identity: Mapping[str, Any],
    arrays: Mapping[str, tuple[tuple[int, int], torch.dtype]],
) -> Iterator[Unfinished | None]:
    """The folder's, while a build goes on; None without a folder."""
    if folder is None:
        yield None
        return
    found = Unfinished(Path(folder), identity, arrays)
    try:
        yield found
    finally:
        found.close()


def _reserve(file: int, size: int, path: Path) -> None:
    """Gives a file this size on the disk: where it has no room, to write to a mapping of the file
    would end the process."""
    reserve = getattr(os, "posix_fallocate", None)
    try:
        if reserve is None:
            os.ftruncate(file, size)
        else:
            reserve(file, 0, size)
    except OSError as error:
        why = f"{error.strerror} for {size / 1e9:.3g} GB of an index"
        raise OSError(error.errno, why, str(path)) from error


def remove(folder: str | os.PathLike[str]) -> None:
    """Removes such a folder, or that of several ranks, once the index is somewhere else; what else
    is in it stays."""
    for path in [*Path(folder).glob("rank-*"), Path(folder)]:
        for entry in [*path.glob("*.rows"), *(path / name for name in (STATE, BASIS, LOCK))]:
            entry.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a folder that has other files, or is not there
            path.rmdir()
