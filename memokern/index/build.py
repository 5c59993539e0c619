"""Building an `Index`: the choice of basis and levels, and one pass over the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from memokern.calls import Rows
from memokern.calls.checks import BLOCK_ROWS, box_numbers
from memokern.calls.values import dequantized
from memokern.index.basis import (
    FIT_ROWS,
    ORDER_ROWS,
    Cosine,
    Principal,
    from_state,
    image_shape,
    is_image,
)
from memokern.index.blocks import excess_of, worth_layout
from memokern.index.checksum import checksum
from memokern.index.index import STORAGES, VERSION, Index, evenly_spaced_rows, fingerprint
from memokern.index.projection import U64, band_indicator, band_norms, rounded_up
from memokern.index.unfinished import unfinished
from memokern.util import checks
from memokern.util.warned import warn

BASES = ("auto", "pca", "dct")
# How many coordinates the levels use unless the caller says so.
DEFAULT_DIMS = (32, 64, 128, 256, 512)
# With at most this many features, the dense sweep reads as little as an index would.
SMALL_DIM = 16
# Principal directions of more features than this take minutes.
PCA_DIM = 4096
# A chunk of rows has at most this many numbers: 2 MiB as float64, which stays in the cache.
CHUNK_ELEMENTS = 1 << 18
# float16 has its full precision for the coordinates of rows whose norms lie in this range.
HALF_RANGE = (1e-2, 6e4)


class Source(NamedTuple):
    """The rows that an index is built of, wherever they are.

    n, dim: how many, of so many features. scale, shift: as of :class:`.Rows`. sq_norms: [N].
    some: the stored rows with the numbers that it is given. chunks: of stored rows, in order, given
    the number of the first one and how many are wanted together; each with its first number; their
    lengths are multiples of that, but for the last. fingerprint: see
    :func:`memokern.index.index.fingerprint`.
    """

    n: int
    dim: int
    scale: float
    shift: float
    sq_norms: Tensor
    some: Callable[[Tensor], Tensor]
    chunks: Callable[[int, int], Iterable[tuple[int, Tensor]]]
    fingerprint: str

    @staticmethod
    def of(rows: Rows) -> Source:
        """Of rows in memory that know their sq_norms."""
        assert rows.sq_norms is not None
        data = rows.data

        def chunks(first: int, step: int) -> Iterator[tuple[int, Tensor]]:
            for start in range(first, rows.n, step):
                yield start, data[start : start + step]

        return Source(
            rows.n, rows.dim, rows.scale, rows.shift, rows.sq_norms,
            lambda at: data.index_select(0, at.to(data.device)), chunks,
            fingerprint(data, rows.scale, rows.shift),
        )  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def build(
    source: Source,
    center: Tensor,
    shape: Sequence[int],
    *,
    basis: str = "auto",
    dims: Sequence[int] | None = None,
    storage: str = "float16",
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Index:
    """The index of rows that know their sq_norms.

    Args:
        center: as a TrainingSet keeps it, float32 or float64. shape: of one row.

    The other arguments, and errors: as `TrainingSet.build_index`.
    """
    n, dim, sq_norms = source.n, source.dim, source.sq_norms
    device = sq_norms.device
    kind = _kind(basis, shape, dim)
    levels = _levels(dims, dim)
    edges = _edges(levels, dim)
    if storage not in STORAGES:
        raise ValueError(f"expected storage 'float16' or 'float32', got {storage!r}")
    y_max = float(sq_norms.max().sqrt()) * (1 + (dim + 8) * U64)
    if not y_max < 1e15:
        raise ValueError(
            f"rows up to {y_max:.3g} from their mean leave float32 in products: scale them down"
        )
    if not HALF_RANGE[0] <= y_max <= HALF_RANGE[1]:
        storage = "float32"
    center64 = center.to(torch.float64)

    def centred(chunk: Tensor) -> Tensor:
        return dequantized(chunk, source.scale, source.shift).to(torch.float64) - center64

    # The norm in the last band follows from |y_n| and the other coordinates, so that its own
    # coordinates need not be computed.
    size = dim if levels[-1] == dim else edges[-2]
    if kind is Principal:
        size = levels[-1]
        edges = [edge for edge in edges if edge <= size] + [dim] * (size < dim)
    k0, last, bands = levels[0], levels[-1], len(edges) - 1
    arrays = {
        "coarse": ((n, k0 + bands + 1), torch.float32),
        "fine": ((n, last - k0), STORAGES[storage]),
    }
    identity: dict[str, Any] = {}
    if resume is not None and device.type != "cpu":
        raise ValueError(f"resume= keeps an index on the CPU, and the rows are on {device}")
    if resume is not None:
        # The norms are those of every row, as it is now.
        identity = {
            "version": [VERSION, torch.__version__], "basis": kind.name, "levels": levels,
            "edges": edges, "storage": storage, "shape": list(shape),
            "rows": [source.fingerprint, checksum(sq_norms), checksum(center)],
        }  # fmt: skip
    with torch.autocast(device.type, enabled=False), unfinished(resume, identity, arrays) as kept:
        state = None if kept is None else kept.basis()
        if state is None:
            limit = FIT_ROWS if kind is Principal else ORDER_ROWS
            fitted = kind.fit(centred(source.some(evenly_spaced_rows(n, limit))), shape, size)
            if kept is not None:
                kept.keep_basis(fitted.state())
        else:
            fitted = from_state(kind.name, state, shape).to(device)
        made = {
            name: torch.empty(much, dtype=dtype, device=device)
            if kept is None
            else kept.arrays[name]
            for name, (much, dtype) in arrays.items()
        }
        coarse, fine = made["coarse"], made["fine"]
        indicator = band_indicator(edges, size, device)
        # Less the center, a value is rounded once more.
        value_error = 2 * U64 * (y_max + float(center64.norm()))
        relative = (size + 16) * U64 + 1.01 * fitted.error(torch.float64)
        step = max(1, CHUNK_ELEMENTS // dim)
        first = 0 if kept is None else kept.done // step * step if kept.done < n else n
        # Unless the caller decides, the bar appears after two seconds, and only on a terminal.
        with tqdm(
            total=n,
            initial=first,
            desc="building the index",
            unit=" rows",
            delay=2 if progress is None else 0,
            leave=False,
            disable=None if progress is None else not progress,
        ) as bar:
            for start, rows in source.chunks(first, step) if first < n else ():
                for piece in rows.split(step):
                    part = slice(start, start + len(piece))
                    start = part.stop
                    coordinates = fitted.coordinates(centred(piece))
                    high = sq_norms[part].sqrt() * (1 + (dim + 8) * U64) + value_error
                    error = relative * high + value_error
                    norms = band_norms(coordinates, indicator, bands, high, error)
                    norms[0] += error[:, None]
                    head, tail = coarse[part], fine[part]
                    head[:, :k0] = coordinates[:, :k0]
                    tail.copy_(coordinates[:, k0:last])
                    difference = coordinates[:, :last]
                    difference[:, :k0] -= head[:, :k0]
                    difference[:, k0:] -= tail
                    pad = torch.linalg.vector_norm(difference, dim=1) * (1 + (last + 8) * U64)
                    head[:, k0 : k0 + bands] = rounded_up(torch.cat(norms, dim=1))
                    head[:, -1] = rounded_up(pad + error)
                    bar.update(len(piece))
                    if kept is not None:
                        kept.note(part.stop)
        if kept is not None and first < n:
            kept.note(n, True)
        half = (-0.5 * sq_norms).to(torch.float32)
        layout = worth_layout(coarse, k0, half, excess_of(coarse, sq_norms))
    return Index(
        fitted,
        levels,
        edges,
        coarse,
        fine,
        center,
        y_max=y_max + value_error,
        row_error=relative * (y_max + value_error) + value_error,
        fingerprint=source.fingerprint,
        layout=layout,
    )


def _kind(basis: str, shape: Sequence[int], dim: int) -> type[Cosine] | type[Principal]:
    """The basis asked for, or the one that suits the rows."""
    if basis not in BASES:
        raise ValueError(f"expected basis one of {', '.join(map(repr, BASES))}, got {basis!r}")
    if dim <= SMALL_DIM:
        raise ValueError(
            f"expected rows of more than {SMALL_DIM} features for an index, got {dim}: the dense "
            "sweep needs none there"
        )
    flat = image_shape(dim) if len(shape) == 1 else None
    hint = "" if flat is None else f" (here with shape={flat}, if they are images)"
    if basis == "auto":
        if is_image(shape):
            basis = "dct"
        elif dim <= PCA_DIM:
            basis = "pca"
            if flat is not None:
                warn(
                    f"flat rows of {dim} features take basis 'pca'; if they are images, an index "
                    f"is built some ten times faster for a training set made with shape={flat}"
                )
        else:
            raise ValueError(
                f"no basis by default for rows {list(shape)}: give images as [C, H, W], [H, W, C] "
                f"or [H, W]{hint}; basis='dct' takes any [C, H, W]; basis='pca' up to {PCA_DIM} "
                "features"
            )
    if basis == "dct" and len(shape) not in (2, 3):
        raise ValueError(
            f"expected rows [H, W], [C, H, W] or [H, W, C] for basis='dct', got {list(shape)}: use "
            "basis='pca', or reshape the rows"
        )
    if basis == "pca" and dim > PCA_DIM:
        raise ValueError(
            f"expected rows of at most {PCA_DIM} features for basis='pca', got {dim}: use "
            "basis='dct', for rows reshaped to [C, H, W] or [H, W] if they are not"
        )
    return Cosine if basis == "dct" else Principal


def default_levels(dim: int) -> list[int]:
    """How many coordinates the levels use unless the caller says so.

    Example:
        >>> from memokern.index.build import default_levels
        >>> default_levels(64), default_levels(3072)
        ([32, 64], [32, 64, 128, 256, 512])
    """
    if dim <= DEFAULT_DIMS[0]:
        return [dim // 2, dim]
    levels = [k for k in DEFAULT_DIMS if k < dim]
    return levels if len(levels) == len(DEFAULT_DIMS) else [*levels, dim]


def bytes_per_row(levels: Sequence[int], dim: int) -> int:
    """What an index with these levels keeps of a row of so many features, with float16: level 0
    twice, in the order of the rows and in that of blocks.

    Example:
        >>> from memokern.index.build import bytes_per_row
        >>> bytes_per_row([32, 64, 128], 3072), bytes_per_row([32, 64, 128, 256, 512], 3072)
        (519, 1296)
    """
    bands = len(_edges(levels, dim)) - 1
    boxes = 8 * box_numbers(levels[0], bands) // BLOCK_ROWS
    return 8 * (levels[0] + bands + 1) + 8 + boxes + 2 * (levels[-1] - levels[0])


def _levels(dims: Sequence[int] | None, dim: int) -> list[int]:
    """How many coordinates each level uses, ascending, at most D."""
    if dims is None:
        return default_levels(dim)
    levels = [checks.integer("dims", k, 1, dim, hint=": numbers of dimensions") for k in dims]
    if not levels or any(b <= a for a, b in pairwise(levels)):
        raise ValueError(f"expected dims ascending, such as (32, 64, 128), got {tuple(dims)}")
    return levels


def _edges(levels: Sequence[int], dim: int) -> list[int]:
    """Where the bands are cut: where each level ends, and at 3/2, 2, 8, 32, ... times the last.

    As measured on CIFAR-10 (D = 3072), the first two cuts beyond the last level halve the rows that
    are left at it. A cut between every two levels would drop 2 % more rows at the first level, but
    the scan would take as much longer.
    """
    edges = set(levels)
    last = levels[-1]
    edge = 3 * last // 2
    while 4 * edge <= 3 * dim:
        edges.add(edge)
        edge = 2 * last if edge < 2 * last else 4 * edge
    return sorted(edges | {dim})
