"""Writing files whole or not at all: whoever reads the target sees the old file or the complete
new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; on a clean exit it is synced and takes the target's place.

    On an exception, SIGTERM or SIGHUP the temporary file is removed and the target is as it was.
    What a process that was killed left beside this target is removed at the next write. The
    temporary name keeps the suffix, which np.savez and matplotlib look at. A symbolic link is
    followed.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the target is a folder or a device.

    Example:
        >>> import tempfile, pathlib
        >>> from memokern.util.writing import atomic
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {str(target.parent)!r}; make it first")
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write to {str(path)!r}: it exists and is not a file")
    _clear_stale(target)
    own = f"{_place()}-{os.getpid()}-{secrets.token_hex(6)}"
    temporary = target.with_name(f".{target.stem[:100]}.{own}.tmp{target.suffix}")
    # tempfile would make a file that only its owner may read. O_EXCL refuses a file that exists.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode
    with _signals_raised():
        try:
            yield temporary
            # safetensors replaces the file by one that only its owner may read.
            temporary.chmod(mode)
            _sync(temporary, os.O_RDWR)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if os.name == "posix":
        _sync(target.parent, os.O_RDONLY)


class _Signalled(BaseException):
    """A signal came whose default is to end the process."""


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP, where nobody handles them, into exceptions, and ends the process by
    the signal after what is inside has cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread
        return
    known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    ours = [s for s in known if s is not None and signal.getsignal(s) == signal.SIG_DFL]
    caught: list[int] = []

    def raised(number: int, frame: object) -> None:
        caught.append(number)
        raise _Signalled(number)

    for number in ours:
        signal.signal(number, raised)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])


def _place() -> str:
    """Stands for where a process number is unique: this machine, or a container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    name = f"{platform.node()} {space}".encode()
    return hashlib.blake2b(name, digest_size=4).hexdigest()


def _clear_stale(target: Path) -> None:
    """Removes what writers of this target left that were killed on this machine."""
    start = f".{target.stem[:100]}.{_place()}-"
    end = f".tmp{target.suffix}"
    with contextlib.suppress(OSError):
        for entry in os.scandir(target.parent):
            if not (entry.name.startswith(start) and entry.name.endswith(end)):
                continue
            number = entry.name[len(start) :].partition("-")[0]
            if number.isdecimal() and not _runs(int(number)):
                os.unlink(entry.path)


def _runs(number: int) -> bool:
    """Whether a process of this number runs, or may."""
    if os.name != "posix":  # where os.kill would end it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes (a rendered picture, say) whole or not at all. Errors as `atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON. Arrays and tensors become lists; NaN and infinities become null.

    Raises TypeError for what JSON cannot hold, and as `atomic`.
    """
    write_bytes(path, (json_text(value) + "\n").encode())


def json_text(value: Any) -> str:
    """Indented JSON, as :func:`write_json` writes it. TypeError for what JSON cannot hold."""
    return json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value in types that JSON has."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
