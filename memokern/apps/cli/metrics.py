"""`memokern memorization`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from memokern import memorization as metrics
from memokern.apps import curves, figures
from memokern.apps import report as reports
from memokern.apps.cli import as_json, common, pages, ranks, room
from memokern.data import folders
from memokern.strategies.pruned_nearest import MOST_ASKED


@click.command(cls=pages.Command, short_help="Measure how many samples are copies of rows.")
@click.argument("samples", metavar="SAMPLES")
@click.argument("data", metavar="DATA")
@click.option(
    "--samples-key", metavar="NAME", help="Which array of the samples' .npz or .safetensors file."
)
@click.option(
    "--data-key", metavar="NAME", help="Which array of the data's .npz or .safetensors file."
)
@common.arrangement("the samples", "--samples-", "--")
@common.arrangement("the data", "--data-")
@common.method_option
@ranks.nproc_option
@common.criteria
@click.option(
    "--neighbours",
    default=50,
    show_default=True,
    type=click.IntRange(min=2),
    help="Carlini's distance is normalised by the mean over this many rows.",
)
@click.option(
    "--binary",
    type=float,
    metavar="LEVEL",
    help="Also compare exactly after thresholding both at this value (binary images).",
)
@click.option(
    "--merge-radius",
    type=float,
    metavar="L2",
    help="Also take the ratio to the nearest row farther than this from the nearest one: for data "
    "with near-duplicates.",
)
@click.option(
    "--show",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Closest samples to list.",
)
@as_json.json_option
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="A histogram of each criterion; .png, .pdf or .svg.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="A page to look at in a browser, in one file: the closest samples beside their nearest "
    "rows, the rows that are copied most, histograms, definitions, settings.",
)
@click.option("--force", is_flag=True, help="Replace existing files; without it they are refused.")
def memorization(
    samples: str,
    data: str,
    samples_key: str | None,
    data_key: str | None,
    shape: tuple[int, ...] | None,
    layout: str | None,
    data_shape: tuple[int, ...] | None,
    data_layout: str | None,
    method: str,
    tolerance: float,
    ratio_threshold: float,
    neighbours: int,
    binary: float | None,
    merge_radius: float | None,
    show: int,
    report: Path | None,
    picture: Path | None,
    page: Path | None,
    force: bool,
) -> None:
    """Measure how many of SAMPLES are copies of rows of DATA (.npy, .npz, .safetensors, or folders
    of PNG or JPEG pictures; DATA may be 'digits').

    Both in the same units; uint8 DATA are pixels in [-1, 1].

    Example: memokern memorization samples.npz digits

    Example: memokern memorization generated training --report report.html

    Example: memokern memorization samples.npy training.safetensors --json - --show 0
    """
    common.check_positive({"--tolerance": tolerance, "--ratio": ratio_threshold})
    if merge_radius is not None and not 0 <= merge_radius < float("inf"):
        raise common.WrongInput(f"--merge-radius: expected a number >= 0, got {merge_radius:g}")
    common.check_outputs(
        [
            ("--json", report, (".json",)),
            ("--picture", picture, figures.FORMATS),
            ("--report", page, (".html",)),
        ],
        force,
    )
    for option, path in (("--picture", picture), ("--report", page)):
        if path is not None:
            with common.wrong_input(option):
                figures.require()
    common.check_machine()
    training = common.load(
        data, data_key, "DATA", "--data-",
        shape=data_shape, layout=data_layout, index=method != "dense", check=False,
    )  # fmt: skip
    if not ranks.launched():
        training = room.checked(training, "DATA")
    rows = common.load_samples(samples, samples_key, training, shape=shape, layout=layout)
    training = ranks.shared(training)
    common.check_two_rows(training, "DATA")
    # Where many neighbours of few rows are wanted, all rows are swept even with an index.
    helps = min(neighbours, training.n) <= MOST_ASKED * training.n
    room.index_for(training, method, helps * len(rows), progress=ranks.progress())
    meanings = {
        "collapse": f"distance to the nearest row < {tolerance:g}",
        "ratio": f"nearest / second nearest < {ratio_threshold:.3g}",
        "merged": f"nearest / next distinct row < {ratio_threshold:.3g}",
        "neighbourhood": "distance / mean distance to the next rows <= 0.5",
        "carlini": f"distance / mean distance to {min(neighbours, training.n)} rows",
        "exact": "" if binary is None else f"equal after thresholding at {binary:g}",
    }
    with common.warnings_in_lines():
        found = metrics.report(
            rows, training, tol=tolerance, threshold=ratio_threshold, k=neighbours, level=binary,
            method=method, progress=ranks.progress(), merge_radius=merge_radius,
        )  # fmt: skip
    shown = None if page is None else reports.gather(rows, training, found, method)
    names = [folders.names(source) if os.path.isdir(source) else None for source in (samples, data)]
    facts = _facts(found, meanings, samples, data, names)
    if (path := ranks.written_here(picture)) is not None:
        with common.failure("cannot write"):
            figures.save(curves.criteria(found), path)
    if (path := ranks.written_here(page)) is not None and shown is not None:
        settings = {
            "samples": f"{samples}: {len(rows)} of shape {list(training.shape)}",
            "data": f"{data}: {training.n} rows, {str(training.dtype).removeprefix('torch.')}",
            "collapse below": f"{tolerance:g}",
            "ratio below": f"{ratio_threshold:.4g}",
            "neighbours": min(neighbours, training.n),
            "near-duplicates merged within": "-" if merge_radius is None else f"{merge_radius:g}",
            "thresholded at": "-" if binary is None else f"{binary:g}",
            "method": f"{method}, {training.index or 'no index'}",
        }
        with common.failure("cannot write"):
            reports.write(
                path, found, shown, sample_names=names[0], row_names=names[1], settings=settings
            )
    as_json.write(report, facts)
    as_json.say(_table(found, meanings), report)
    if show:
        as_json.say("\nclosest samples\n" + _closest(found, show, names), report)
    written = as_json.written(report, picture, page)
    if written:
        as_json.say("\n" + "\n".join(f"wrote {path}" for path in written), report)


Names = list[list[str] | None]


def _facts(
    found: Mapping[str, metrics.Memorization],
    meanings: Mapping[str, str],
    samples: str,
    data: str,
    names: Names,
) -> dict[str, Any]:
    """What --json writes."""
    nearest = found["collapse"].index.tolist()
    files: dict[str, Any] = {}
    if names[0] is not None:
        files["sample_files"] = names[0]
    if names[1] is not None:
        files["nearest_files"] = [names[1][row] for row in nearest]
    return {
        "samples": samples,
        "data": data,
        "count": len(nearest),
        **files,
        **{
            name: {
                "meaning": meanings[name],
                "fraction": float(result.fraction),
                "memorized": result.memorized,
                "value": result.value,
                "index": result.index,
                "distance": result.distance,
            }
            for name, result in found.items()
        },
    }


def _table(found: Mapping[str, metrics.Memorization], meanings: Mapping[str, str]) -> str:
    """What each criterion finds, in a line each."""
    lines = [
        [
            name,
            f"{float(result.fraction):.1%}",
            f"{int(result.memorized.sum())} of {len(result.memorized)}",
            f"{float(result.value.median()):.4g}",
            f"{float(result.value.min()):.4g}",
            meanings[name],
        ]
        for name, result in found.items()
    ]
    header = ["criterion", "memorised", "count", "median", "smallest", "meaning"]
    return common.table(header, lines, (1, 2, 3, 4))


def _closest(found: Mapping[str, metrics.Memorization], count: int, names: Names) -> str:
    """The samples that are nearest to a row, with the names of pictures of a folder."""
    collapse = found["collapse"]
    lines = []
    for i in torch.argsort(collapse.distance, stable=True)[:count].tolist():
        row = int(collapse.index[i])
        lines.append(
            [
                str(i),
                str(row),
                f"{float(collapse.distance[i]):.4g}",
                f"{float(found['ratio'].value[i]):.4g}",
                f"{float(found['carlini'].value[i]):.4g}",
                *(given[k] for given, k in zip(names, (i, row), strict=True) if given is not None),
            ]
        )
    header = ["sample", "row", "distance", "ratio", "carlini"]
    header += [
        title
        for given, title in zip(names, ("picture", "nearest picture"), strict=True)
        if given is not None
    ]
    return common.table(header, lines, range(5))
