"""Pictures for a paper: one style, a palette that colour-blind readers can tell apart, files
written whole or not at all.

matplotlib is optional (`pip install 'memokern[plot]'`) and imported only when a picture is made.
`require()` refuses early, before the long work, where it is missing. Figures are built without
pyplot, so that they need no global state, no window and no display.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memokern.util import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), in the order in which lines are drawn.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
GREY, BLACK = "#7F7F7F", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
FORMATS = (".png", ".pdf", ".svg")
COLUMN = 3.4  # width of a paper's column, inches
MISSING = "pictures need matplotlib, which is not installed: pip install 'memokern[plot]'"

_STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "mathtext.fontset": "dejavusans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    # Text stays text, so that it can be edited, and publishers who refuse Type 3 fonts accept it.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "memokern",  # else matplotlib draws the names of clip paths anew each time
}


def require() -> None:
    """Raise RuntimeError, saying what to install, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(MISSING)


def check_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, after checking that a picture can be written under that name.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: the name does not end in .png, .pdf or .svg.
    """
    require()
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a picture's name must end in {', '.join(FORMATS)}, got {str(path)!r}")
    return path


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's matplotlib settings for the block; the caller's settings are back
    afterwards.
    """
    require()
    import matplotlib
    from cycler import cycler

    # The defaults come first, so that a user's matplotlibrc does not change a figure that is
    # compared with a paper's.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)
        yield


def new(
    width: float = COLUMN,
    height: float = 2.6,
    rows: int = 1,
    columns: int = 1,
    layout: Literal["constrained"] | None = "constrained",
) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches and its axes as an array [rows, columns].

    Call inside `style()`. `layout` None: the caller places the axes (`subplots_adjust`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write `figure` as .png, .pdf or .svg, whole or not at all. Equal figures give equal bytes,
    because no date is written.
    """
    path = check_path(path)
    kind = path.suffix.lower()[1:]
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with style(), writing.atomic(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)
    return path


def image_layout(shape: Sequence[int]) -> str | None:
    """How rows of this shape can be shown: "gray", "chw", "hwc", "points" (2 numbers), or None.

    A flat row is an image where its length is a square of at least 8 x 8, or three such squares,
    one for each colour.

    Example:
        >>> from memokern.apps.figures import image_layout
        >>> shapes = [(8, 8), (3, 32, 32), (32, 32, 3), (3072,), (64,), (2,), (5,)]
        >>> [image_layout(shape) for shape in shapes]
        ['gray', 'chw', 'hwc', 'chw', 'gray', 'points', None]
    """
    shape = tuple(shape)
    if shape == (2,):
        return "points"
    if len(shape) == 1:
        size = shape[0]
        if size >= 64 and math.isqrt(size) ** 2 == size:
            return "gray"
        if size % 3 == 0 and size >= 192 and math.isqrt(size // 3) ** 2 == size // 3:
            return "chw"
        return None
    if len(shape) == 2:
        return "gray" if min(shape) > 1 else None
    if len(shape) == 3 and shape[0] in (1, 3):
        return "gray" if shape[0] == 1 else "chw"
    if len(shape) == 3 and shape[-1] in (1, 3):
        return "gray" if shape[-1] == 1 else "hwc"
    return None


def as_images(rows: np.ndarray) -> np.ndarray:
    """Rows [N, ...shape] as pictures [N, H, W] or [N, H, W, 3], values unchanged.

    Raises:
        ValueError: the shape is not an image's (`image_layout`).
    """
    rows = np.asarray(rows)
    shape = rows.shape[1:]
    layout = image_layout(shape)
    if layout not in ("gray", "chw", "hwc"):
        raise ValueError(
            f"rows of shape {list(shape)} are not images: expected [H, W], [C, H, W] or [H, W, C] "
            f"with C = 1 or 3"
        )
    if len(shape) == 1:
        side = math.isqrt(shape[0] // (3 if layout == "chw" else 1))
        rows = rows.reshape(len(rows), *((3, side, side) if layout == "chw" else (side, side)))
    if layout == "gray":
        return rows.reshape(len(rows), *[s for s in rows.shape[1:] if s != 1])
    return np.moveaxis(rows, 1, -1) if layout == "chw" else rows


def value_range(rows: np.ndarray) -> tuple[float, float]:
    """The smallest and largest value of the training rows, which their pictures show as black and
    white. The range is never empty.
    """
    low, high = float(np.min(rows)), float(np.max(rows))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def pairs(
    samples: np.ndarray,
    neighbours: np.ndarray,
    memorised: np.ndarray,
    *,
    limits: tuple[float, float] | None = None,
    columns: int = 6,
    title: str | None = None,
) -> Figure:
    """A figure of each sample (left) beside its nearest training image (right). Memorised samples
    have a frame and an M.

    Args:
        samples, neighbours: [S, ...shape], images by `image_layout`.
        memorised: [S] bool.
        limits: the values shown as black and white, by default the range of the neighbours.
        columns: how many pairs a row of the figure has. title: above all of them.

    Raises: ValueError unless there are as many samples as neighbours and marks, and at least one.
    """
    count = len(samples)
    if count == 0 or len(neighbours) != count or len(memorised) != count:
        raise ValueError(
            "expected as many samples as neighbours and marks, and at least one, "
            f"got {count}, {len(neighbours)} and {len(memorised)}"
        )
    low, high = limits or value_range(neighbours)
    left, right = as_images(samples), as_images(neighbours)
    gap = np.ones_like(left[:, :, : max(1, left.shape[2] // 12)])
    shown = [np.clip((x - low) / (high - low), 0, 1) for x in (left, right)]
    tiles = np.concatenate([shown[0], gap, shown[1]], axis=2)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    with style():
        aspect = tiles.shape[1] / tiles.shape[2]
        width = max(COLUMN, 1.15 * columns)
        cell = width / columns
        heading = 0.22 * (1 + (title or "").count("\n")) if title else 0.0
        figure, axes = new(width, rows * cell * aspect * 1.14 + 0.3 + heading, rows, columns)
        for index, axis in enumerate(axes.flat):
            axis.set(xticks=[], yticks=[])
            if index >= count:
                axis.set_axis_off()
                continue
            axis.imshow(tiles[index], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            for spine in axis.spines.values():
                spine.set(visible=bool(memorised[index]), color=VERMILION, linewidth=2.0)
            if memorised[index]:
                axis.text(
                    0.5,
                    0.99,
                    "M",
                    color="white",
                    fontsize=7,
                    weight="bold",
                    ha="center",
                    va="top",
                    transform=axis.transAxes,
                    bbox={"facecolor": VERMILION, "edgecolor": "none", "pad": 1.2},
                )
        if title:
            figure.suptitle(title, fontsize=9)
        figure.supxlabel(
            "each sample (left) beside its nearest training image (right); framed, M: memorised",
            fontsize=7,
        )
    return figure


def scatter(
    samples: np.ndarray, data: np.ndarray, memorised: np.ndarray, *, title: str | None = None
) -> Figure:
    """A figure of planar samples [S, 2] over the training points [N, 2]. Memorised samples have
    another colour and marker.

    Raises: ValueError for other shapes.
    """
    samples, data = np.asarray(samples), np.asarray(data)
    if samples.ndim != 2 or samples.shape[1] != 2 or data.shape[1:] != (2,):
        raise ValueError(
            f"expected points [S, 2] and [N, 2], got {list(samples.shape)} and {list(data.shape)}"
        )
    memorised = np.asarray(memorised, dtype=bool)
    with style():
        figure, axes = new(COLUMN, COLUMN)
        axis = axes[0, 0]
        axis.plot(*samples[~memorised].T, "o", color=BLUE, alpha=0.6, mew=0, label="new sample")
        axis.plot(*samples[memorised].T, "x", color=VERMILION, label="memorised sample")
        training_points(axis, data)
        axis.set(aspect="equal", xlabel="$x_1$", ylabel="$x_2$", title=title)
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3, columnspacing=1.0)
    return figure


def training_points(axis: Axes, data: np.ndarray) -> None:
    """Draw the training points as black dots above everything else."""
    axis.plot(*np.asarray(data).T, ".", color=BLACK, markersize=6, zorder=5, label="training point")


def legend_below(figure: Figure, axis: Axes) -> None:
    """What this axis' marks mean, in a line below all axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handletextpad=0.4)


def voronoi(axis: Axes, points: np.ndarray, color: str = GREY) -> None:
    """Draw the Voronoi diagram of points [N, 2], cut at the axis' limits, which must be set before.

    Four points far outside close the unbounded cells without moving the edges inside.
    """
    from scipy.spatial import Voronoi

    points = np.asarray(points, dtype=np.float64)
    centre, reach = points.mean(0), 1e3 * (np.ptp(points, axis=0).max() + 1.0)
    angle = np.linspace(0, 2 * np.pi, 5)[:4] + 0.1
    far = centre + reach * np.stack([np.cos(angle), np.sin(angle)], 1)
    diagram = Voronoi(np.concatenate([points, far]))
    for pair, edge in zip(diagram.ridge_points, diagram.ridge_vertices, strict=True):
        if max(pair) < len(points) and -1 not in edge:
            axis.plot(
                *diagram.vertices[edge].T,
                "-",
                color=color,
                lw=0.7,
                zorder=1,
                scalex=False,
                scaley=False,
            )
