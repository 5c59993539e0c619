"""Building an `Index`: the choice of basis and ladder, and one sweep over the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from memokern.index import basis as bases
from memokern.index.index import STORAGES, Index, fingerprint, spread
from memokern.index.projection import U64, band_norms, cuts_of, rounded_up
from memokern.util import checks

BASES = ("auto", "pca", "dct")
LADDER = (32, 64, 128, 256, 512)
# Up to here the dense sweep reads as little as an index would.
SMALL_DIM = 16
# Directions of more features than this take minutes.
PCA_DIM = 4096
# Numbers in a chunk of rows: 2 MiB as float64, which stays in the cache.
CHUNK_ELEMENTS = 1 << 18
# float16 holds the coordinates of rows of such norms with its full precision, float32 all others.
HALF_RANGE = (1e-2, 6e4)


@torch.no_grad()
def build(
    rows: Tensor,
    shape: Sequence[int],
    scale: float,
    shift: float,
    center: Tensor,
    sq_norms: Tensor,
    basis: str = "auto",
    dims: Sequence[int] | None = None,
    storage: str = "float16",
    progress: bool | None = None,
) -> Index:
    """The index of rows [N, D] as stored; arguments and errors as `TrainingSet.build_index`."""
    n, dim = rows.shape
    kind = _kind(basis, shape, dim)
    ladder = _ladder(dims, dim)
    edges = _edges(ladder, dim)
    if storage not in STORAGES:
        raise ValueError(f"expected storage 'float16' or 'float32', got {storage!r}")
    y_max = float(sq_norms.max().sqrt()) * (1 + (dim + 8) * U64)
    if not y_max < 1e15:
        raise ValueError(
            f"rows up to {y_max:.3g} from their mean leave float32 in products: scale them down"
        )
    if not HALF_RANGE[0] <= y_max <= HALF_RANGE[1]:
        storage = "float32"
    offset = shift - center.to(torch.float64)

    def centred(chunk: Tensor) -> Tensor:
        return chunk.to(torch.float64, copy=True).mul_(scale).add_(offset)

    # The last band is what the norm leaves, so its coordinates need not be computed.
    size = dim if ladder[-1] == dim else edges[-2]
    if kind is bases.Principal:
        size = ladder[-1]
        edges = [edge for edge in edges if edge <= size] + [dim] * (size < dim)
    with torch.autocast(rows.device.type, enabled=False):
        limit = bases.FIT_ROWS if kind is bases.Principal else bases.ORDER_ROWS
        sample = centred(rows.index_select(0, spread(n, limit).to(rows.device)))
        fitted = kind.fit(sample, shape, size)
        del sample
        k0, last, bands = ladder[0], ladder[-1], len(edges) - 1
        coarse = torch.empty(n, k0 + bands + 1, dtype=torch.float32, device=rows.device)
        fine = torch.empty(n, last - k0, dtype=STORAGES[storage], device=rows.device)
        cuts = cuts_of(edges, size, rows.device)
        # The values: raw * scale, shift - center and their sum are each rounded once; and so is
        # y = raw * scale + shift wherever it is made, far from zero more than y - center here.
        far = float(center.to(torch.float64).norm()) + abs(shift) * math.sqrt(dim)
        value_error = 3 * U64 * (float(offset.norm()) + far)
        relative = (size + 16) * U64 + 1.01 * fitted.error(torch.float64)
        step = max(1, CHUNK_ELEMENTS // dim)
        # Without a wish the bar appears only after two seconds, and only on a terminal.
        with tqdm(
            total=n,
            desc="building the index",
            unit=" rows",
            delay=2 if progress is None else 0,
            leave=False,
            disable=None if progress is None else not progress,
        ) as bar:
            for start in range(0, n, step):
                part = slice(start, min(start + step, n))
                coordinates = fitted.coordinates(centred(rows[part]))
                high = sq_norms[part].sqrt() * (1 + (dim + 8) * U64) + value_error
                error = relative * high + value_error
                norms = band_norms(coordinates, cuts, bands, high, error)
                norms[0] += error[:, None]
                head, tail = coarse[part], fine[part]
                head[:, :k0] = coordinates[:, :k0]
                tail.copy_(coordinates[:, k0:last])
                difference = coordinates[:, :last]
                difference[:, :k0] -= head[:, :k0]
                difference[:, k0:] -= tail
                pad = torch.linalg.vector_norm(difference, dim=1) * (1 + (last + 8) * U64) + error
                head[:, k0 : k0 + bands] = rounded_up(torch.cat(norms, dim=1))
                head[:, -1] = rounded_up(pad)
                bar.update(part.stop - part.start)
    return Index(
        fitted,
        ladder,
        edges,
        coarse,
        fine,
        center,
        y_max + value_error,
        relative * (y_max + value_error) + value_error,
        fingerprint(rows, scale, shift),
    )


def _kind(basis: str, shape: Sequence[int], dim: int) -> type[bases.Cosine] | type[bases.Principal]:
    if basis not in BASES:
        raise ValueError(f"expected basis one of {', '.join(map(repr, BASES))}, got {basis!r}")
    if dim <= SMALL_DIM:
        raise ValueError(
            f"expected rows of more than {SMALL_DIM} features for an index, got {dim}: the dense "
            "sweep needs none there"
        )
    if basis == "auto":
        if bases.is_image(shape):
            basis = "dct"
        elif dim <= PCA_DIM:
            basis = "pca"
        else:
            raise ValueError(
                f"no basis by default for rows {list(shape)}: give images as [C, H, W], [H, W, C] "
                f"or [H, W]; basis='dct' takes any [C, H, W]; basis='pca' up to {PCA_DIM} features"
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
    return bases.Cosine if basis == "dct" else bases.Principal


def _ladder(dims: Sequence[int] | None, dim: int) -> list[int]:
    """The dimensions of each level, ascending, at most D."""
    if dims is None:
        if dim <= LADDER[0]:
            return [dim // 2, dim]
        ladder = [k for k in LADDER if k < dim]
        return ladder if len(ladder) == len(LADDER) else [*ladder, dim]
    ladder = [checks.integer("dims", k, 1, dim, hint=": numbers of dimensions") for k in dims]
    if not ladder or any(b <= a for a, b in pairwise(ladder)):
        raise ValueError(f"expected dims ascending, such as (32, 64, 128), got {tuple(dims)}")
    return ladder


def _edges(ladder: Sequence[int], dim: int) -> list[int]:
    """Where the bands are cut: at the ladder, and beyond it at 3/2, 2, 8, 32, ... of its end.

    Measured on CIFAR-10 (D = 3072): a cut half-way up each step of the ladder drops 2 % more rows
    at the first level, which costs the scan as much; the two beyond it drop half of what is left
    at the last level.
    """
    edges = set(ladder)
    last = ladder[-1]
    edge = 3 * last // 2
    while 4 * edge <= 3 * dim:
        edges.add(edge)
        edge = 2 * last if edge < 2 * last else 4 * edge
    return sorted(edges | {dim})
