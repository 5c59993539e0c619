"""Predictions of the CUDA sweep and Triton's, side by side."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from memokern.backends.cuda.core.variant import ROW_CODES
from tools import roofline_cuda


def test_one_sweep_is_three_launches_that_read_the_rows_once() -> None:
    for rows in ROW_CODES:
        _, found = roofline_cuda.cuda(8, 50_000, 3072, rows)
        size = 50_000 * 3072 * rows.itemsize
        assert found.launches == 3 and size < found.bytes < 1.2 * size
        assert found.seconds > found.floor >= found.bytes / roofline_cuda.GPU.memory


def test_more_queries_than_a_launch_takes_read_the_rows_again() -> None:
    tile, found = roofline_cuda.cuda(64, 50_000, 12_288, torch.uint8)
    assert found.launches == 3 * -(-64 // tile.queries) > 3


def test_triton_is_what_its_launchers_do() -> None:
    """77 launches for 50,000 rows of 3072 features, as its own page says."""
    found = roofline_cuda.triton(1, 50_000, 3072, torch.uint8)
    assert found.launches == 77 and found.bytes >= 50_000 * 3072


def test_the_page_has_the_table() -> None:
    page = (roofline_cuda.roofline.ROOT / "docs" / "cuda.md").read_text()
    between = page.split(roofline_cuda.BEGIN)[1].split(roofline_cuda.END)[0]
    rows = [line for line in between.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(roofline_cuda.SIZES) * 4 * len(ROW_CODES)
    _, found = roofline_cuda.cuda(1, 50_000, 3072, torch.uint8)
    ms = roofline_cuda.roofline.milliseconds
    wanted = f"| 1 | 50,000 | 3072 | uint8 | 3 | {found.bytes / 1e6:,.0f} | {ms(found.floor)} | "
    assert wanted + ms(found.seconds) in between
