"""`memokern memorization`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from memokern import memorization as metrics
from memokern.apps import curves, figures
from memokern.apps.cli import common, ranks
from memokern.strategies.pruned_nearest import MOST_ASKED
from memokern.util import writing


@click.command(short_help="Measure how many samples are copies of rows.")
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
@click.option(
    "--json",
    "report",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write fractions and per-sample values as JSON.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="A histogram of each criterion; .png, .pdf or .svg.",
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
    force: bool,
) -> None:
    """Measure how many of SAMPLES are copies of rows of DATA (.npy, .npz, .safetensors, or folders
    of PNG or JPEG pictures; DATA may be 'digits').

    Both in the same units; uint8 DATA are pixels in [-1, 1].
    """
    common.check_positive({"--tolerance": tolerance, "--ratio": ratio_threshold})
    if merge_radius is not None and not 0 <= merge_radius < float("inf"):
        raise common.WrongInput(f"--merge-radius: expected a number >= 0, got {merge_radius:g}")
    outputs = [("--json", report, (".json",)), ("--picture", picture, figures.FORMATS)]
    common.check_outputs(outputs, force)
    if picture is not None:
        with common.wrong_input("--picture"):
            figures.require()
    common.check_machine()
    training = common.load(
        data, data_key, "DATA", "--data-",
        shape=data_shape, layout=data_layout, index=method != "dense",
        check=not ranks.launched(),
    )  # fmt: skip
    rows = common.load_samples(samples, samples_key, training, shape=shape, layout=layout)
    training = ranks.shared(training)
    report, picture = ranks.written_here(report), ranks.written_here(picture)
    common.check_two_rows(training, "DATA")
    # Where many neighbours of few rows are wanted, all rows are swept even with an index.
    helps = min(neighbours, training.n) <= MOST_ASKED * training.n
    common.index_for(training, method, helps * len(rows), progress=ranks.progress())
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
    if picture is not None:
        with common.failure("cannot write"):
            figures.save(curves.criteria(found), picture)
    if report is not None:
        with common.failure("cannot write"):
            writing.write_json(
                report,
                {
                    "samples": samples,
                    "data": data,
                    "count": len(rows),
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
                },
            )
    lines = []
    for name, result in found.items():
        statistic = result.value
        lines.append(
            [
                name,
                f"{float(result.fraction):.1%}",
                f"{int(result.memorized.sum())} of {len(rows)}",
                f"{float(statistic.median()):.4g}",
                f"{float(statistic.min()):.4g}",
                meanings[name],
            ]
        )
    ranks.say(
        common.table(
            ["criterion", "memorised", "count", "median", "smallest", "meaning"],
            lines,
            (1, 2, 3, 4),
        )
    )
    if show:
        collapse = found["collapse"]
        order = torch.argsort(collapse.distance, stable=True)[:show].tolist()
        each = [
            [
                str(i),
                str(int(collapse.index[i])),
                f"{float(collapse.distance[i]):.4g}",
                f"{float(found['ratio'].value[i]):.4g}",
                f"{float(found['carlini'].value[i]):.4g}",
            ]
            for i in order
        ]
        ranks.say("\nclosest samples")
        ranks.say(common.table(["sample", "row", "distance", "ratio", "carlini"], each, range(5)))
    written = [path for path in (report, picture) if path is not None]
    if written:
        click.echo("\n" + "\n".join(f"wrote {path}" for path in written))
