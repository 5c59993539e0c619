"""Checksums of an index in a file and of its rows, so that neither is believed once it is damaged
or belongs to something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from memokern.util.mapped import forget, is_file

# The parts that are hashed each by itself, on all of PyTorch's threads.
PART_BYTES = 1 << 24
# Up to this many bytes of rows and index together are checked when they are loaded. More are
# checked at their first use, so that a memory-mapped file can be opened without reading all of it.
AT_ONCE_BYTES = 1 << 28


def checksum(tensor: Tensor) -> str:
    """A hash of the bytes, type and shape of a tensor, the same on every device.

    Cost: about a second for 1 GB on one thread; the tensor is read once, in parts of 16 MiB.

    Example:
        >>> import torch
        >>> from memokern.index.checksum import checksum
        >>> checksum(torch.zeros(3)) == checksum(torch.zeros(3)) != checksum(torch.zeros(3, 1))
        True
    """
    whole = _start(tensor.shape, tensor.dtype)
    flat = tensor.detach().contiguous().reshape(-1)
    file = flat.nbytes > PART_BYTES and is_file(flat)

    def parts() -> Iterator[Tensor]:
        return iter(flat.split(PART_BYTES // flat.element_size()) if flat.numel() else ())

    def digest(part: Tensor) -> bytes:
        found = _digest(part)
        if file:  # it may be larger than memory
            forget(part)
        return found

    if flat.nbytes <= PART_BYTES or flat.device.type != "cpu":
        digests: Any = map(digest, parts())
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests = list(pool.map(digest, parts()))
    for found in digests:
        whole.update(found)
    return whole.hexdigest()


class Checksum:
    """The same of a tensor that comes piece by piece.

    Example:
        >>> import torch
        >>> from memokern.index.checksum import Checksum, checksum
        >>> rows = torch.arange(12).reshape(4, 3)
        >>> total = Checksum(rows.shape, rows.dtype)
        >>> for part in rows.split(3):
        ...     total.update(part)
        >>> total.hexdigest() == checksum(rows)
        True
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._whole = _start(shape, dtype)
        self._room = self._part = PART_BYTES // dtype.itemsize * dtype.itemsize
        self._of_part = hashlib.blake2b(digest_size=16)

    def update(self, rows: Tensor) -> None:
        """Adds what comes next."""
        left = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        while len(left):
            taken = left[: self._room]
            self._of_part.update(taken)
            left, self._room = left[len(taken) :], self._room - len(taken)
            if not self._room:
                self._end_part()

    def _end_part(self) -> None:
        self._whole.update(self._of_part.digest())
        self._of_part, self._room = hashlib.blake2b(digest_size=16), self._part

    def hexdigest(self) -> str:
        """The checksum; nothing can be added then."""
        if self._room < self._part:
            self._end_part()
        return self._whole.hexdigest()


def _start(shape: Sequence[int], dtype: torch.dtype) -> Any:
    return hashlib.blake2b(f"{tuple(shape)} {dtype}".encode(), digest_size=16)


def _digest(part: Tensor) -> bytes:
    return hashlib.blake2b(part.cpu().view(torch.uint8).numpy().data, digest_size=16).digest()


def sealed(described: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor | str) -> str:
    """The description of an index as JSON, with checksums of itself, the tensors and the rows,
    which may be given as their checksum."""
    sums = {name: checksum(tensors[name]) for name in sorted(tensors)}
    sums["rows"] = rows if isinstance(rows, str) else checksum(rows)
    known = {**described, "checksums": sums}
    return json.dumps(known | {"checksum": _of_text(known)})


def require_seal(described: str, tensors: Mapping[str, Tensor], rows: Tensor, hint: str) -> None:
    """ValueError, which ends with the hint, unless all is as it was when `sealed` wrote it."""
    known = json.loads(described)
    own = known.pop("checksum", None)
    sums = known.get("checksums", {})
    if own != _of_text(known) or set(sums) != {*tensors, "rows"}:
        raise ValueError(f"the index in the file is damaged: its description changed; {hint}")
    for name, tensor in tensors.items():
        if sums[name] != checksum(tensor):
            raise ValueError(f"the index in the file is damaged: its {name} changed; {hint}")
    if sums["rows"] != checksum(rows):
        raise ValueError(
            f"the index does not belong to these {len(rows)} rows: some of them changed after it "
            f"was built; {hint}"
        )


def _of_text(known: Mapping[str, Any]) -> str:
    text = json.dumps(known, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
