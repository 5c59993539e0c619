"""Figures: shapes that can be shown, files written whole, the same bytes for the same picture."""

from __future__ import annotations

import importlib.util
import itertools

import matplotlib
import numpy as np
import pytest
import torch

from memokern import TrainingSet, memorization
from memokern.apps import curves, figures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("shape", "layout", "picture"),
    [
        ((8, 8), "gray", (8, 8)),
        ((1, 5, 7), "gray", (5, 7)),
        ((5, 7, 1), "gray", (5, 7)),
        ((3, 5, 7), "chw", (5, 7, 3)),
        ((5, 7, 3), "hwc", (5, 7, 3)),
        ((64,), "gray", (8, 8)),
        ((3 * 64,), "chw", (8, 8, 3)),
    ],
)
def test_images_of_every_layout_keep_their_values(shape, layout, picture) -> None:
    rows = np.arange(2 * np.prod(shape), dtype=float).reshape(2, *shape)
    assert figures.image_layout(shape) == layout
    shown = figures.as_images(rows)
    assert shown.shape == (2, *picture)
    assert sorted(shown[1].ravel()) == sorted(rows[1].ravel())
    if layout == "chw":
        red = shown[0, ..., 0].ravel()  # first in the row, last of the axes in the picture
        np.testing.assert_array_equal(red, rows[0].ravel()[: red.size])


@pytest.mark.parametrize("shape", [(5,), (1, 8), (2, 5, 7), (2, 3, 4, 5)])
def test_other_shapes_are_no_pictures(shape) -> None:
    assert figures.image_layout(shape) is None
    with pytest.raises(ValueError, match="are not images"):
        figures.as_images(np.zeros((2, *shape)))


@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_pairs_are_written_and_equal_pictures_have_equal_bytes(tmp_path, suffix) -> None:
    rng = np.random.default_rng(0)
    samples, rows = rng.random((5, 8, 8)), rng.random((5, 8, 8))
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        marks = np.array([True, False, True, False, False])
        figures.save(figures.pairs(samples, rows, marks, columns=3, title="five"), path)
    first, second = (path.read_bytes() for path in paths)
    assert len(first) > 1000
    assert first == second
    assert {p.name for p in tmp_path.iterdir()} == {f"a{suffix}", f"b{suffix}"}


def test_memorised_pairs_are_framed() -> None:
    figure = figures.pairs(np.zeros((2, 4, 4)), np.ones((2, 4, 4)), np.array([True, False]))
    framed = [any(s.get_visible() for s in axis.spines.values()) for axis in figure.axes]
    assert framed == [True, False]
    assert [len(axis.texts) for axis in figure.axes] == [1, 0]


def test_pairs_show_sample_then_neighbour_between_the_limits() -> None:
    samples = np.full((1, 12, 12), -3.0)  # below the limits: black
    figure = figures.pairs(samples, np.full((1, 12, 12), 0.5), np.array([False]), limits=(0.0, 1.0))
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (12, 25)
    assert np.all(shown[:, :12] == 0) and np.all(shown[:, 13:] == 0.5)


def test_pairs_refuse_what_does_not_match() -> None:
    with pytest.raises(ValueError, match="as many samples as neighbours"):
        figures.pairs(np.zeros((2, 4, 4)), np.zeros((1, 4, 4)), np.zeros(2, bool))


def test_scatter_separates_memorised_samples() -> None:
    samples = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    figure = figures.scatter(samples, samples[:1], np.array([True, False, False]))
    new, old = figure.axes[0].lines[:2]
    assert len(new.get_xdata()) == 2 and len(old.get_xdata()) == 1
    with pytest.raises(ValueError, match="expected points"):
        figures.scatter(np.zeros((2, 3)), samples, np.zeros(2, bool))


@pytest.mark.parametrize("away", [0.0, 1.0, 4e4])
def test_numbers_along_the_axis_of_a_histogram_do_not_meet(away) -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = memorization.report(rows[:9] + away, TrainingSet(rows), level=0.0)
    for name in ("collapse", "ratio", "exact"):
        figure = curves.criteria({name: found[name]})
        with figures.style():
            figure.draw_without_rendering()
            numbers = [n for n in figure.axes[0].get_xticklabels() if n.get_text()]
            boxes = [number.get_window_extent() for number in numbers]
        assert len(boxes) > 1
        gap = 3 / 72 * figure.dpi  # three points
        assert all(left.x1 + gap < right.x0 for left, right in itertools.pairwise(boxes)), name


def test_voronoi_edges_are_equally_far_from_their_two_nearest_points() -> None:
    points = np.random.default_rng(1).standard_normal((12, 2))
    with figures.style():
        _, axes = figures.new()
        axes[0, 0].set(xlim=(-2, 2), ylim=(-2, 2))
        figures.voronoi(axes[0, 0], points)
        limits = axes[0, 0].get_xlim()
    assert limits == (-2, 2)  # the far corners of unbounded cells did not move the view
    lines = axes[0, 0].lines
    # A planar Voronoi diagram of n points in general position has 3n - 3 - (points on the hull)
    # edges.
    from scipy.spatial import ConvexHull

    assert len(lines) == 3 * 12 - 3 - len(ConvexHull(points).vertices)
    for line in lines:
        a, b = np.asarray(line.get_xydata())
        middle = a + (b - a) * min(0.5, 1 / np.linalg.norm(b - a))
        distance = np.sort(np.linalg.norm(points - middle, axis=1))
        # Where an edge reaches 1e3 spans out, the position is only known to 1e3 * eps *
        # (condition).
        assert distance[1] - distance[0] < 1e-6 * (1 + distance[0])


def test_style_does_not_leak() -> None:
    before = dict(matplotlib.rcParams)
    with figures.style():
        assert matplotlib.rcParams["pdf.fonttype"] == 42
    assert dict(matplotlib.rcParams) == before


def test_names_and_folders_are_checked(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png, \.pdf, \.svg"):
        figures.check_path(tmp_path / "a.jpg")
    with figures.style():
        figure, _ = figures.new()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        figures.save(figure, tmp_path / "missing" / "a.png")


def test_missing_matplotlib_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'memokern\[plot\]'"):
        figures.require()
