"""What a command has memory and time for: rows of a file, and an index of them."""

from __future__ import annotations

import os

import torch

from memokern import StreamedSet, TrainingSet
from memokern.apps.cli import common
from memokern.data.parted import PartedSet
from memokern.data.sharded import ShardedSet
from memokern.data.storage import require_finite
from memokern.data.streamed import CHUNK_BYTES
from memokern.index.basis import is_image
from memokern.index.build import bytes_per_row, default_levels
from memokern.util import memory
from memokern.util.mapped import is_file

# An index is built without being asked for where a sweep over so many rows and features takes long
# enough for bounds to save time, and after so many queries (samples times evaluations) it has paid.
INDEX_ROWS, INDEX_DIM, INDEX_PAYS = 2000, 256, 4000
# Of a large chunk an index excludes more than of small ones: some rows of each are evaluated.
LARGEST_CHUNK = 1 << 28


def too_large(data: TrainingSet, share: float = 1.0) -> bool:
    """Whether a share of rows in a file takes more than half of the memory that is left."""
    return is_file(data.rows) and 2 * share * data.rows.nbytes > memory.available()


def checked(data: TrainingSet, about: str) -> TrainingSet:
    """The rows, which all are read and found to be numbers; those of a file for which there is
    hardly memory as a set that reads them chunk by chunk, each time they are used."""
    with common.wrong_input(about):
        if too_large(data):
            chunk = min(LARGEST_CHUNK, max(CHUNK_BYTES, memory.available() // 16))
            data = StreamedSet(data, chunk_bytes=chunk)
            _ = data.center  # of a first pass
        else:
            require_finite(data.rows)
    return data


def index_for(data: TrainingSet, method: str, queries: int, *, progress: bool) -> None:
    """Build an index where the data have none and `method` uses one. "auto" does so for many images
    and at least `INDEX_PAYS` queries, where memory has room for it.
    """
    indexed = data.indexed if isinstance(data, PartedSet) else data.index is not None
    if indexed or method == "dense":
        return
    worth = data.n >= INDEX_ROWS and data.dim >= INDEX_DIM and queries >= INDEX_PAYS
    if method == "auto" and not (worth and is_image(data.shape)):
        return
    dims, fits = _dims(data)
    if fits or method == "pruned":
        with common.wrong_input("--method"):
            data.build_index(dims=dims, progress=None if progress else False)


def _dims(data: TrainingSet) -> tuple[list[int] | None, bool]:
    """The dims of an index, and whether it fits: of rows that are read from a disk it takes at most
    a quarter of the memory that is left, or else has the two levels of the smallest."""
    part = data.part if isinstance(data, ShardedSet) else data
    levels = default_levels(data.dim)
    fitting = len(levels)
    if isinstance(part, StreamedSet):
        most = memory.available() / (4 * sharers())
        while fitting > 1 and part.n * bytes_per_row(levels[:fitting], data.dim) > most:
            fitting -= 1
    if isinstance(data, ShardedSet):  # all ranks build one, or none
        mine = torch.tensor([fitting], device="cpu")
        fitting = int(data.ranks.gather(mine, "memory for an index").min())
    return None if fitting == len(levels) else levels[: max(2, fitting)], fitting > 1


def sharers() -> int:
    """How many processes of this command share this machine's memory."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return max(1, int(told)) if told.isdigit() else 1
