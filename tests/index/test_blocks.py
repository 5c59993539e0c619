"""The blocks of an index: every row once, each in its box, and the box no larger than its rows."""

import json

import pytest
import torch

from memokern import TrainingSet
from memokern.calls.checks import BLOCK_ROWS, PANEL_BLOCKS
from memokern.index import blocks, index
from memokern.index.index import Index
from tests.cases import F64, U8, normal

ROWS = 2000  # more than a unit that is split at once, and no multiple of a block


def images(n: int = ROWS, shape: tuple[int, ...] = (3, 8, 8)) -> TrainingSet:
    rows = normal(n, *shape, seed=3) * torch.linspace(1, 0.1, shape[-1])
    return TrainingSet((rows * 40 + 128).clamp(0, 255).to(U8)).build_index()


def numbers(found: Index) -> torch.Tensor:
    """[N, box] float64: what a box bounds of every row."""
    k0, single = found.dims[0], min(16, found.dims[0])
    coarse = found.coarse.to(F64)
    others = [coarse[:, single:k0].norm(dim=1, keepdim=True)] * (k0 > single)
    return torch.cat([coarse[:, :single], *others, coarse[:, k0:-1]], 1)


def each(boxes: torch.Tensor) -> torch.Tensor:
    """[count, 2, box]: of one block after the other."""
    return boxes.permute(0, 3, 2, 1).flatten(0, 1).to(F64)


@pytest.mark.parametrize("dims", [None, (8, 20), (16,)])
def test_every_row_is_in_one_block_and_in_its_box(dims: tuple[int, ...] | None) -> None:
    data = images().build_index(dims=dims)
    found = data.index.blocks
    assert sorted(found.order.tolist()) == list(range(ROWS))
    order = found.order.long()
    assert torch.equal(found.coarse, data.index.coarse[order])
    assert torch.equal(found.half, (-0.5 * data.sq_norms[order]).float())
    own = numbers(data.index)[order]
    boxes = each(found.boxes)
    for block, rows in enumerate(own.split(BLOCK_ROWS)):
        low, high = boxes[block]
        assert bool((low <= rows).all() and (rows <= high).all())
        # No larger than the rounding of the one number that is no float's own.
        assert bool((rows.amin(0) - low <= 1e-6 * low.abs()).all())
        assert bool((high - rows.amax(0) <= 1e-6 * high.abs() + 1e-30).all())
    used = len(own.split(BLOCK_ROWS))
    assert bool(boxes[used:].isinf().all())  # which no query comes near
    for panel, part in enumerate(boxes[:used].split(PANEL_BLOCKS)):
        low, high = each(found.hulls)[panel]
        assert torch.equal(low, part[:, 0].amin(0)) and torch.equal(high, part[:, 1].amax(0))


def test_the_excess_covers_what_rounding_up_added() -> None:
    data = images()
    over = data.index.coarse[:, :-1].to(F64).square().sum(1) - data.sq_norms
    assert 0 < over.max() <= data.index.blocks.excess < 1e-5 * data.sq_norms.max()


def test_blocks_are_small_beside_the_rows() -> None:
    """Split where the rows differ most, a block extends less than any 24 rows do."""
    data = images()
    boxes = each(data.index.blocks.boxes)[: ROWS // BLOCK_ROWS]
    own = numbers(data.index)[: ROWS // BLOCK_ROWS * BLOCK_ROWS]
    chance = own.view(-1, BLOCK_ROWS, own.shape[1])
    mine = (boxes[:, 1] - boxes[:, 0])[:, :6].mean()
    assert mine < 0.9 * (chance.amax(1) - chance.amin(1))[:, :6].mean()


def test_equal_rows() -> None:
    """Which no cut tells apart."""
    data = TrainingSet(torch.ones(1500, 20)).build_index()
    assert sorted(data.index.blocks.order.tolist()) == list(range(1500))


def test_few_rows_have_none() -> None:
    assert images(blocks.FEWEST - 1).index.blocks is None
    assert images(blocks.FEWEST).index.blocks is not None


def test_blocks_are_kept_in_files(tmp_path) -> None:
    data = images()
    path = tmp_path / "data.safetensors"
    data.save(path)
    loaded = TrainingSet.load(path)
    for got, want in zip(loaded.index.blocks, data.index.blocks, strict=True):
        assert got == want if isinstance(want, float) else torch.equal(got, want)
    assert loaded.index.nbytes == data.index.nbytes > 0


def test_an_index_of_a_file_without_blocks_is_used_without(tmp_path) -> None:
    """As an earlier version wrote it."""
    data = images()
    data.index._layout = None
    path = tmp_path / "data.safetensors"
    data.save(path)
    loaded = TrainingSet.load(path)
    assert loaded.index.blocks is None and torch.equal(loaded.index.fine, data.index.fine)


def test_a_subset_has_blocks_of_its_own() -> None:
    data = images()
    assert data.index.mean_square > 0 and data.index.blocks is not None
    part = data.subset(slice(0, 1500, 1))
    own = part.index.blocks
    assert sorted(own.order.tolist()) == list(range(1500))
    assert torch.equal(own.half, (-0.5 * part.sq_norms[own.order.long()]).float())
    assert torch.equal(own.coarse, part.index.coarse[own.order.long()])
    assert part.index.mean_square != data.index.mean_square
    assert data.subset(slice(0, 20)).index.blocks is None
    assert data.index.take(slice(0, 1500), "", for_once=True).blocks is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": torch.zeros(ROWS, dtype=torch.int32)}, "every row once"),
        ({"order": torch.arange(1, ROWS + 1, dtype=torch.int32)}, "every row once"),
        ({"half": torch.zeros(3)}, "half must be"),
        ({"boxes": torch.zeros(3)}, "boxes must be"),
        ({"excess": -1.0}, "excess"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(change, words) -> None:
    """A scan would read beyond its arrays."""
    data = images()
    said, tensors = data.index.state(data.rows, data.sq_norms)
    known = json.loads(said) | {k: v for k, v in change.items() if isinstance(v, float)}
    tensors = tensors | {k: v for k, v in change.items() if not isinstance(v, float)}
    with pytest.raises(ValueError, match=words):
        index.restored(json.dumps(known), tensors, data.shape)
