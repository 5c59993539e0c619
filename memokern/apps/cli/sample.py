"""`memokern sample`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from memokern import Denoiser, TrainingSet, memorization, processes, regularizers, samplers
from memokern.apps import figures
from memokern.apps.cli import as_json, asked, common, labels, log, pages, ranks, room
from memokern.data import files

SOLVERS = (*samplers.SOLVERS, "sde")
REGULARIZER_HELP = (
    "none, tikhonov:c=1e-2, empirical-bayes:log_tau=-3, temperature:sigma_c=0.5, "
    "smoothing:h=0.1,samples=16, bank:h=0.1, "
    "unconditioned; joined with + or given several times."
)


@click.command(
    cls=pages.Command, short_help="Sample a training set, and report how much is memorised."
)
@click.option(
    "--data",
    default=common.DIGITS,
    show_default=True,
    metavar="FILE",
    help="Training rows: .npy, .npz, .safetensors or a folder of PNG or JPEG pictures; uint8 rows "
    "are read as pixels in [-1, 1]. 'digits': the embedded 8 x 8 handwritten digits.",
)
@click.option("--key", metavar="NAME", help="Which array of an .npz or .safetensors file.")
@common.arrangement("the rows", "--")
@labels.labels_options
@click.option(
    "--process",
    default="edm",
    show_default=True,
    type=click.Choice(sorted(processes.NAMES)),
    help="The diffusion process.",
)
@click.option(
    "--regularizer", "regularizer_texts", multiple=True, metavar="TEXT", help=REGULARIZER_HELP
)
@click.option(
    "--solver",
    default="exponential",
    show_default=True,
    type=click.Choice(SOLVERS),
    help="exponential (both ends in closed form: as exact as heun for a third of the evaluations), "
    "euler, heun, rk45: probability-flow ODE; sde: reverse SDE (Euler-Maruyama).",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=None,
    help="Steps of the solver (rk45 chooses its own).  "
    f"[default: {samplers.ODE_STEPS}; {samplers.SDE_STEPS} for sde]",
)
@click.option(
    "-n",
    "--samples",
    "--count",
    "count",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many samples.",
)
@asked.asked_options
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the noise."
)
@click.option(
    "--sigma-min", type=float, metavar="SIGMA", help="Stop early, at this level of noise."
)
@click.option(
    "--device",
    "device_name",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="Where to compute: cpu, or a device that PyTorch has here (cuda, cuda:1, mps, ...). "
    "The same seed starts from the same noise on all of them.",
)
@common.method_option
@ranks.nproc_option
@common.criteria
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Say after each evaluation of the score what was done: rows kept of all (mean over the "
    "samples, at most), samples swept densely, dimensions of the index used, the proven error of "
    "the denoised mean (L2), time; of the solver exponential also the part that it belongs to "
    "(gaussian, middle, end), and how many samples have no proven end yet.",
)
@click.option(
    "--log",
    "log_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the same, and more, as .json or .csv.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Write samples and matches.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Each sample beside its nearest training image (2-D points: a scatter plot); "
    ".png, .pdf or .svg.",
)
@as_json.json_option
@click.option(
    "--force", is_flag=True, help="Replace existing outputs; without it they are refused."
)
def sample(
    data: str,
    key: str | None,
    shape: tuple[int, ...] | None,
    layout: str | None,
    labels_file: str | None,
    labels_key: str | None,
    process: str,
    regularizer_texts: tuple[str, ...],
    solver: str,
    steps: int | None,
    count: int,
    label: str | None,
    condition: str | None,
    bandwidth: float | None,
    guidance: float | None,
    seed: int,
    sigma_min: float | None,
    device_name: str,
    method: str,
    tolerance: float,
    ratio_threshold: float,
    verbose: bool,
    log_file: Path | None,
    output: Path | None,
    picture: Path | None,
    report: Path | None,
    force: bool,
) -> None:
    """Sample with the closed-form score of a training set and report how much of it is memorised.

    Example: memokern sample --regularizer tikhonov:c=0.1 -n 24 --picture samples.png

    Example: memokern sample --label 3,5 --guidance 1.5 --output digits.npz

    Example: memokern sample --method pruned --verbose
    """
    if solver == "rk45" and steps is not None:
        raise common.WrongInput("--steps: rk45 chooses its own steps; leave --steps out")
    common.check_positive(
        {"--tolerance": tolerance, "--ratio": ratio_threshold, "--sigma-min": sigma_min}
    )
    with common.wrong_input("--regularizer"):
        regularizer = regularizers.parse("+".join(regularizer_texts) or "none")
    outputs = (
        ("--output", output, (".npz",)),
        ("--picture", picture, figures.FORMATS),
        ("--json", report, (".json",)),
        ("--log", log_file, log.FORMATS),
    )
    common.check_outputs(outputs, force)
    if picture is not None:
        with common.wrong_input("--picture"):
            figures.require()
    device = common.device(device_name)
    common.check_machine(device)
    if ranks.launched() and (verbose or log_file is not None):
        raise common.WrongInput("--nproc: --verbose and --log say what one process does")
    training = common.load(
        data, key, "--data", shape=shape, layout=layout, index=method != "dense",
        check=not ranks.launched(),
    )  # fmt: skip
    labels.give_labels(training, labels_file, labels_key)
    training = ranks.shared(training)
    wanted = asked.read(training, count, label, condition, bandwidth, guidance)
    if picture is not None and figures.image_layout(training.shape) is None:
        raise common.WrongInput(
            f"--picture: rows of shape {list(training.shape)} are neither images ([H, W], [C, H, "
            f"W], [H, W, C]) "
            "nor points in the plane"
        )
    common.check_two_rows(training, "--data")

    flow = processes.get(process)
    start = torch.tensor(flow.t_noise, dtype=torch.float64)
    sigma_from = float(flow.sigma(start))
    if sigma_min is not None and sigma_min >= sigma_from:
        raise common.WrongInput(
            f"--sigma-min: {process} starts at sigma = {sigma_from:.4g}; expected less, got "
            f"{sigma_min:g}"
        )
    with common.wrong_input(), torch.no_grad():
        training = training.to(device)
        evaluations = _evaluations(solver, steps) * count
        room.index_for(training, method, evaluations, progress=common.progress_wanted())
        denoiser = Denoiser(training, process=flow, regularizer=regularizer, method=method)
        # A first query refuses what cannot be combined before the long work, and fills the caches
        # of the training set, which then stay out of the times.
        wanted.try_one(denoiser, flow.prior((1, *training.shape), device=device), start)
        given = wanted.given(denoiser)
    index = training.index
    watch = log.Log(() if index is None else index.dims, show=verbose)
    options: dict[str, Any] = {
        "sigma_min": sigma_min,
        "seed": seed,
        "progress": common.progress_wanted() and not verbose,
        "watch": watch if verbose or log_file is not None else None,
    }
    started = time.perf_counter()
    # A RuntimeError comes from rk45 where it cannot go on, and from a device that is out of memory.
    stopped = (OSError, MemoryError, RuntimeError)
    with common.failure("sampling", stopped), torch.no_grad():
        if solver == "sde":
            found = samplers.sde(given, count, steps or samplers.SDE_STEPS, **options)
        else:
            found = samplers.ode(given, count, steps, solver=solver, **options)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    elapsed = time.perf_counter() - started
    facts = measure(found, training, tolerance, ratio_threshold)
    facts |= {
        "data": {
            "name": training.name,
            "rows": training.n,
            "shape": list(training.shape),
            "dtype": str(training.dtype),
        },
        **wanted.facts(),
        "device": str(device),
        "process": process,
        "solver": solver,
        "method": method,
        "index": None if index is None else repr(index),
        "regularizer": "+".join(regularizer_texts) or "none",
        "seed": seed,
        "sigma_from": float(found.sigmas[0]),
        "sigma_to": float(found.sigmas[-1]),
        "score_evaluations": found.nfe,
        "seconds": elapsed,
        "seconds_per_evaluation": elapsed / max(1, found.nfe),
    }
    _write(found, training, facts, output, picture)
    as_json.write(report, facts)
    if not ranks.first():
        return
    if log_file is not None:
        with common.failure("cannot write"):
            watch.write(log_file)
    as_json.say(render(facts), report)
    for path in as_json.written(report, output, picture, log_file):
        as_json.say(f"wrote        {path}", report)


def _evaluations(solver: str, steps: int | None) -> int:
    """About how often the score is evaluated."""
    if solver == "sde":
        return steps or samplers.SDE_STEPS
    return (steps or samplers.ODE_STEPS) * (2 if solver in ("heun", "rk45") else 1)


def measure(
    found: samplers.Samples, data: TrainingSet, tolerance: float, threshold: float
) -> dict[str, Any]:
    """Memorisation by both criteria; per-sample values under "each"."""
    criteria = memorization.report(found.x, data, tol=tolerance, threshold=threshold, k=2)
    collapse, ratio = criteria["collapse"], criteria["ratio"]
    return {
        "samples": len(found.x),
        "collapse": {"tolerance": tolerance, "fraction": float(collapse.fraction)},
        "ratio": {"threshold": threshold, "fraction": float(ratio.fraction)},
        "median_distance": float(collapse.distance.median()),
        "each": {
            "index": collapse.index.tolist(),
            "distance": collapse.distance.tolist(),
            "ratio": ratio.value.tolist(),
            "collapsed": collapse.memorized.tolist(),
            "memorized": (collapse.memorized | ratio.memorized).tolist(),
        },
    }


def render(facts: dict[str, Any]) -> str:
    """The report as lines to read."""
    data, count = facts["data"], facts["samples"]
    rate = count * facts["rows_swept"] / facts["seconds_per_evaluation"]
    return "\n".join(
        [
            f"data         {data['name'] or 'unnamed'}: {data['rows']} rows of shape "
            f"{data['shape']}, {data['dtype']}; sampled from "
            f"{asked.described(facts)}",
            f"sampler      {facts['process']}, {facts['solver']}, {facts['score_evaluations']} "
            f"score evaluations, "
            f"sigma {facts['sigma_from']:.4g} to {facts['sigma_to']:.4g}, seed {facts['seed']}, "
            f"on {facts['device']}",
            f"method       {facts['method']}, {facts['index'] or 'no index'}",
            f"regulariser  {facts['regularizer']}",
            f"memorised    collapse {facts['collapse']['fraction']:7.1%} of {count}: "
            f"nearest training row closer than {facts['collapse']['tolerance']:g}",
            f"             ratio    {facts['ratio']['fraction']:7.1%} of {count}: "
            f"nearest closer than {facts['ratio']['threshold']:.3g} of the second nearest",
            f"             median distance to the nearest row {facts['median_distance']:.4g}",
            f"time         {common.seconds(facts['seconds'])} in all, "
            f"{common.seconds(facts['seconds_per_evaluation'])} per score evaluation of {count} "
            f"queries "
            f"({rate:.3g} query-row pairs/s)",
        ]
    )


def _write(
    found: samplers.Samples,
    data: TrainingSet,
    facts: dict[str, Any],
    output: Path | None,
    picture: Path | None,
) -> None:
    each = facts["each"]
    index = torch.tensor(each["index"])
    memorized = torch.tensor(each["memorized"])
    near: Any = None
    if picture is not None:  # of all processes, wherever the rows are
        points = figures.image_layout(data.shape) == "points"
        near = data.gather(torch.arange(data.n) if points else index.to(data.device)).cpu().numpy()
    output, picture = ranks.written_here(output), ranks.written_here(picture)
    with common.failure("cannot write"):
        if picture is not None:
            samples, title = found.x.cpu().numpy(), _title(facts)
            if figures.image_layout(data.shape) == "points":
                figure = figures.scatter(
                    samples,
                    near,
                    memorized.numpy(),
                    title=title,
                )
            else:
                limits = (-1.0, 1.0) if data.dtype == torch.uint8 else None
                figure = figures.pairs(
                    samples,
                    near,
                    memorized.numpy(),
                    limits=limits,
                    title=title,
                )
            figures.save(figure, picture)
        if output is not None:
            files.write_npz(
                output,
                samples=found.x,
                nearest_index=index,
                nearest_distance=torch.tensor(each["distance"]),
                ratio=torch.tensor(each["ratio"]),
                collapsed=torch.tensor(each["collapsed"]),
                memorized=memorized,
            )


def _title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['process']}, {facts['solver']}, regulariser {facts['regularizer']}: "
        f"memorised {facts['collapse']['fraction']:.0%} (collapse), "
        f"{facts['ratio']['fraction']:.0%} (ratio)"
    )
