"""The report of `memokern memorization --report`: one HTML file that needs no other.

It needs matplotlib (`pip install 'memokern[plot]'`), which draws the histograms. Whatever comes
from the user, such as names of files, is escaped by the template engine.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from torch import Tensor

import memokern
from memokern import TrainingSet
from memokern.apps import curves, figures
from memokern.memorization import Memorization
from memokern.util import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 24  # samples that are shown beside their nearest rows
BESIDE = 3  # rows beside each
COPIED = 12  # rows that most samples are nearest to
SIDE = 160  # pixels; larger pictures are made smaller


@dataclass(frozen=True)
class Definition:
    """What counts as a copy by a criterion, in one sentence, and who says so."""

    title: str
    sentence: str
    source: str
    option: str = ""  # of the command line, where the criterion is not computed without it


DEFINITIONS = {
    "collapse": Definition(
        "Collapse",
        "A sample is a copy where its distance to the nearest row is below a tolerance.",
        "arXiv 2501.15785",
    ),
    "ratio": Definition(
        "Ratio",
        "A sample is a copy where the nearest row is much nearer than the second nearest, which "
        "needs no scale of distances.",
        "arXiv 2310.02664, 2505.17638",
    ),
    "merged": Definition(
        "Merged ratio",
        "The same ratio with near-duplicates of the nearest row taken together with it, so that "
        "they do not hide a copy.",
        "this library",
        "--merge-radius",
    ),
    "neighbourhood": Definition(
        "Neighbourhood",
        "A sample is a copy where its distance to the nearest row is at most half of the mean "
        "distance to the next nearest rows.",
        "this library",
    ),
    "carlini": Definition(
        "Carlini's distance",
        "A sample is a copy where its distance to the nearest row is below half of the mean "
        "distance to its nearest rows, that one included.",
        "arXiv 2301.13188",
    ),
    "exact": Definition(
        "Exact match",
        "A sample is a copy where it equals a row in every feature once both are thresholded.",
        "arXiv 2501.15785, section 6",
        "--binary",
    ),
}


@dataclass(frozen=True, eq=False)
class Shown:
    """What the report shows of the samples and the rows, in memory of this process.

    Attributes:
        order: [K] int64, the samples that are nearest to a row, nearest first.
        samples: [K, ...shape], their values.
        index, distance: [K, R], their R nearest rows. rows: [K, R, ...shape].
        copied: (row, how many memorised samples are nearest to it), most first.
        copied_rows: [len(copied), ...shape].
        points: [N, 2] all rows where they are points of the plane, else None.
        limits: the values shown as black and white; None takes the rows' own.
    """

    order: Tensor
    samples: Tensor
    index: Tensor
    distance: Tensor
    rows: Tensor
    copied: list[tuple[int, int]]
    copied_rows: Tensor
    points: Tensor | None
    limits: tuple[float, float] | None


def gather(
    samples: Tensor, data: TrainingSet, found: Mapping[str, Memorization], method: str = "auto"
) -> Shown:
    """What to show of S samples. Where rows are shared over processes, all of them call this.

    Args:
        samples: [S, ...shape]. data: at least 2 rows. found: :func:`.memorization.report`'s.
        method: as :func:`memokern.nearest`.
    """
    order = torch.argsort(found["collapse"].distance, stable=True)[:SHOWN].cpu()
    chosen = samples[order]
    near = memokern.nearest(chosen.to(data.device), data, k=min(BESIDE, data.n), method=method)
    copies = copied(found).cpu()
    rows = found["collapse"].index.cpu()[copies].tolist()
    counts = sorted(Counter(rows).items(), key=lambda item: (-item[1], item[0]))[:COPIED]
    numbers = torch.tensor([row for row, _ in counts], dtype=torch.int64)
    plane = figures.image_layout(data.shape) == "points"
    flat = near.index.reshape(-1)
    return Shown(
        order,
        chosen.cpu(),
        near.index.cpu(),
        near.distance.cpu(),
        data.gather(flat).reshape(*near.index.shape, *data.shape).cpu(),
        counts,
        data.gather(numbers.to(data.device)).cpu(),
        data.gather(torch.arange(data.n, device=data.device)).cpu() if plane else None,
        (-1.0, 1.0) if data.dtype == torch.uint8 else None,
    )


def copied(found: Mapping[str, Memorization]) -> Tensor:
    """[S] bool: the samples that are copies by "collapse" or "ratio"."""
    one = found["collapse"].memorized
    return one | found["ratio"].memorized if "ratio" in found else one


def write(
    path: Path,
    found: Mapping[str, Memorization],
    shown: Shown,
    *,
    sample_names: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    settings: Mapping[str, Any],
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: ends in .html. found, shown: of :func:`gather`.
        sample_names, row_names: of all samples and rows, such as names of files.
        settings: what is told at the end, by name.

    Raises: RuntimeError where matplotlib is missing, OSError as :func:`.writing.write_bytes`.
    """
    figures.require()
    text = (importlib.resources.files("memokern.apps") / "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(text).render(
        version=memokern.__version__,
        count=len(found["collapse"].distance),
        copies=int(copied(found).sum()),
        criteria=[_criterion(name, one) for name, one in found.items()],
        missing=[d for name, d in DEFINITIONS.items() if name not in found],
        pairs=_pairs(found, shown, sample_names, row_names),
        rows_copied=_copied_rows(shown, row_names),
        scatter=_scatter(found, shown),
        settings=settings,
    )
    writing.write_bytes(path, page.encode())


def _criterion(name: str, one: Memorization) -> dict[str, Any]:
    """What the page says of a criterion."""
    definition = DEFINITIONS[name]
    sign = "≤" if name == "neighbourhood" else "<"
    return {
        "definition": definition,
        "rule": f"{curves.STATISTICS[name]} {sign} {one.threshold:.3g}",
        "percent": f"{float(one.fraction):.1%}",
        "fraction": float(one.fraction),
        "copies": int(one.memorized.sum()),
        "median": f"{float(one.value.nanmedian()):.4g}",
        "smallest": f"{float(one.value.nan_to_num(nan=float('inf')).min()):.4g}",
        "histogram": _drawing(curves.criteria({name: one})),
    }


def _pairs(
    found: Mapping[str, Memorization],
    shown: Shown,
    sample_names: Sequence[str] | None,
    row_names: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Each shown sample with its nearest rows."""
    limits = _limits(shown)
    pairs = []
    for place, sample in enumerate(shown.order.tolist()):
        rows = [
            {
                "row": row,
                "name": None if row_names is None else row_names[row],
                "distance": f"{distance:.4g}",
                "picture": picture(shown.rows[place, i], limits),
            }
            for i, (row, distance) in enumerate(
                zip(shown.index[place].tolist(), shown.distance[place].tolist(), strict=True)
            )
        ]
        pairs.append(
            {
                "sample": sample,
                "name": None if sample_names is None else sample_names[sample],
                "picture": picture(shown.samples[place], limits),
                "rows": rows,
                "memorised": bool(copied(found)[sample]),
                "by": [DEFINITIONS[n].title for n, one in found.items() if one.memorized[sample]],
                "numbers": [
                    (DEFINITIONS[n].title, f"{float(one.value[sample]):.4g}")
                    for n, one in found.items()
                ],
            }
        )
    return pairs


def _copied_rows(shown: Shown, row_names: Sequence[str] | None) -> list[dict[str, Any]]:
    return [
        {
            "row": row,
            "count": count,
            "name": None if row_names is None else row_names[row],
            "picture": picture(shown.copied_rows[i], _limits(shown)),
        }
        for i, (row, count) in enumerate(shown.copied)
    ]


def _scatter(found: Mapping[str, Memorization], shown: Shown) -> str | None:
    """The shown samples over all rows, where both are points of the plane."""
    if shown.points is None:
        return None
    marks = copied(found).cpu()[shown.order].numpy()
    return _drawing(figures.scatter(shown.samples.numpy(), shown.points.numpy(), marks))


def _limits(shown: Shown) -> tuple[float, float]:
    return shown.limits or figures.value_range(shown.rows.float().numpy())


def picture(row: Tensor, limits: tuple[float, float]) -> str | None:
    """A row that is an image as a PNG in a data URI, at most `SIDE` pixels wide and high; None for
    other rows. limits: the values shown as black and white.

    Example:
        >>> import torch
        >>> from memokern.apps.report import picture
        >>> picture(torch.zeros(8, 8), (-1.0, 1.0))[:30]
        'data:image/png;base64,iVBORw0K'
    """
    if figures.image_layout(row.shape) in (None, "points"):
        return None
    from PIL import Image

    low, high = limits
    values = figures.as_images(row[None].float().numpy())[0]
    pixels = np.clip((values - low) / (high - low), 0, 1)
    drawn = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    drawn.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    drawn.save(content, "PNG", optimize=True)
    return _uri("image/png", content.getvalue())


def _drawing(figure: Figure) -> str:
    """A figure as an SVG in a data URI."""
    content = io.BytesIO()
    with figures.style():
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", content.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
