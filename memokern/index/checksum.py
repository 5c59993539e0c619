"""Checksums of an index in a file and of its rows, so that neither is believed once it is damaged
or belongs to something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

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
    whole = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    flat = tensor.detach().contiguous().reshape(-1)

    def parts() -> Iterator[Tensor]:
        return iter(flat.split(PART_BYTES // flat.element_size()) if flat.numel() else ())

    if flat.nbytes <= PART_BYTES or flat.device.type != "cpu":
        digests: Any = map(_digest, parts())
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests = list(pool.map(_digest, parts()))
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def _digest(part: Tensor) -> bytes:
    return hashlib.blake2b(part.cpu().view(torch.uint8).numpy().data, digest_size=16).digest()


def sealed(described: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor) -> str:
    """The description of an index as JSON, with checksums of itself, the tensors and the rows."""
    sums = {name: checksum(tensors[name]) for name in sorted(tensors)}
    sums["rows"] = checksum(rows)
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
