"""The predictions, by hand, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from memokern.backends.triton import variants as listing
from tools import roofline

ROOT = Path(__file__).resolve().parents[2]
H100 = next(g for g in roofline.GPUS if g.name == "H100")
U8, F32 = torch.uint8, torch.float32


def test_predictions_by_hand() -> None:
    """One query waits for the rows; many for the tensor cores."""
    one = roofline.Problem("mean", 1, 50_000, 3072, U8).on(H100)
    rows = 50_000 * 3072 / H100.memory
    assert rows <= one.seconds <= 1.05 * rows and one.memory > 0.95
    many = roofline.Problem("mean", 256, 50_000, 3072, F32).on(H100)
    # Both products, three of tf32 each.
    products = 3 * 4 * 256 * 50_000 * 3072 / H100.rates["tf32"]
    assert products <= many.seconds <= 1.05 * products and many.memory < 0.05
    half = roofline.Problem("mean", 256, 50_000, 3072, torch.bfloat16).on(H100)
    # The query is three terms, a weight two.
    assert half.seconds == pytest.approx(5 * 2 * 256 * 50_000 * 3072 / H100.rates["half"], rel=0.05)
    near = roofline.Problem("nearest", 64, 50_000, 3072, F32).on(H100)
    assert near.launches == 2 and 1.0 <= near.seconds / (4 * rows) <= 1.1


def test_every_kernel_that_reads_all_rows_has_a_cost() -> None:
    names = {roofline.kernel_name(v) for v in listing.variants() if "rows" in v.signature}
    # These look at few rows only, or at rows that are in the L2 cache, or are not the forward pass.
    few = {
        "exact_kernel", "weigh_kernel", "coefficients_kernel", "tie_sums_kernel", "sq_norms_kernel",
        "tie_gradients_kernel", "row_gradient_kernel", "far_sums_kernel",
    }  # fmt: skip
    assert names <= roofline.COSTS.keys() | few
    assert roofline.COSTS.keys() <= {roofline.kernel_name(v) for v in listing.variants()}


def test_the_page_has_the_predictions_of_the_model() -> None:
    """If this fails: python -m tools.roofline --markdown docs/triton.md"""
    page = (ROOT / "docs" / "triton.md").read_text()
    said = page.split(roofline.BEGIN)[1].split(roofline.END)[0]
    assert said.strip() == roofline.table().strip()
    assert "Predicted, never measured" in said
