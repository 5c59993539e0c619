"""`memokern reproduce`, `memokern index`, `memokern demo` and `memokern info`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from memokern.apps import demo as _demo
from memokern.apps import experiments
from memokern.apps import info as _info
from memokern.apps.cli import as_json, common, labels, pages, ranks, room
from memokern.index import unfinished
from memokern.index.build import BASES


def _experiment_list() -> str:
    """The experiments with their titles, for the help."""
    width = max(map(len, experiments.EXPERIMENTS))
    return "\n".join(f"  {name:<{width}}  {e.title}" for name, e in experiments.EXPERIMENTS.items())


@click.command(
    cls=pages.Command,
    short_help="Reproduce an experiment of arXiv:2501.15785.",
    epilog=f"\b\nExperiments:\n{_experiment_list()}",
)
@click.argument("name", metavar="NAME|all")
@click.option(
    "--out",
    default=Path("reproduction"),
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=True),
    help="Folder for figures and JSON; made if missing.",
)
@click.option(
    "--format",
    "suffix",
    default="pdf",
    show_default=True,
    type=click.Choice(["pdf", "png", "svg"]),
    help="Of the figures.",
)
@click.option(
    "--data",
    metavar="FILE",
    help="Images whose halves `conditional` takes too: .npy, .npz, .safetensors or a folder of "
    "pictures.",
)
@click.option("--key", metavar="NAME", help="Which array of an .npz or .safetensors file.")
@click.option("--quick", is_flag=True, help="Smaller sizes for a first look: rougher numbers.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=None,
    help="Instead of the experiments' own seed.",
)
@as_json.json_option
@click.option(
    "--force", is_flag=True, help="Replace existing results; without it they are refused."
)
def reproduce(
    name: str,
    out: Path,
    suffix: str,
    data: str | None,
    key: str | None,
    quick: bool,
    seed: int | None,
    report: Path | None,
    force: bool,
) -> None:
    """Reproduce an experiment of arXiv:2501.15785: a figure fit for a paper, and a JSON of its
    numbers. Those with networks take a minute or two with --quick, and half an hour and more
    without.

    Example: memokern reproduce rate --quick --format png --out figures

    Example: memokern reproduce all --out reproduction
    """
    with common.wrong_input("NAME"):
        if name == "all":
            chosen = list(experiments.EXPERIMENTS.values())
        elif name in experiments.EXPERIMENTS:
            chosen = [experiments.get(name)]
        else:
            raise ValueError(
                f"unknown experiment {name!r}; known: {', '.join(experiments.EXPERIMENTS)}, all"
            )
    if data is None and key is not None:
        raise common.WrongInput("--key says which array of --data FILE: give that too")
    if data is not None:
        if not any(experiment.takes_data for experiment in chosen):
            takers = ", ".join(n for n, e in experiments.EXPERIMENTS.items() if e.takes_data)
            raise common.WrongInput(f"--data is for {takers}, not for {name}")
        common.load(data, key, "--data", index=False)  # a wrong file is said before all else
    common.check_outputs([("--json", report, (".json",))], force)
    common.picture_folder(out)
    common.check_outputs(
        [
            ("--out", path, (f".{suffix}", ".json"))
            for experiment in chosen
            for path in experiments.output_paths(experiment, out, f".{suffix}")
        ],
        force,
    )
    done = []
    for experiment in chosen:
        as_json.say(f"{experiment.name}: {experiment.title}", report)
        with common.failure("cannot write"):
            outcome = experiments.reproduce(
                experiment, out, suffix=f".{suffix}", quick=quick, seed=seed,
                data=(data, key) if data is not None and experiment.takes_data else None,
            )  # fmt: skip
        for line in outcome.conclusions:
            as_json.say(f"  {line}", report)
        paths = " and ".join(map(str, outcome.paths))
        as_json.say(f"  wrote {paths} ({common.seconds(outcome.seconds)})", report)
        done.append(
            {
                "experiment": experiment.name,
                "title": experiment.title,
                "conclusions": outcome.conclusions,
                "files": outcome.paths,
                "seconds": outcome.seconds,
            }
        )
    as_json.write(report, done)


@click.command(
    cls=pages.Command, short_help="Save data with an index that speeds up small noise levels."
)
@click.argument("data", metavar="DATA")
@click.option("--key", metavar="NAME", help="Which array of an .npz or .safetensors file.")
@common.arrangement("the rows", "--")
@labels.labels_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.safetensors",
    help="Where to write the rows, labels and index.",
)
@click.option(
    "--basis",
    default="auto",
    show_default=True,
    type=click.Choice(BASES),
    help="dct: cosines, for images; pca: principal directions, up to 4096 features.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what is done in OUTPUT.partial: the same command goes on there if it is killed.",
)
@as_json.json_option
@click.option("--force", is_flag=True, help="Replace an existing file; without it it is refused.")
@ranks.nproc_option
def index(
    data: str,
    key: str | None,
    shape: tuple[int, ...] | None,
    layout: str | None,
    labels_file: str | None,
    labels_key: str | None,
    output: Path,
    basis: str,
    resume: bool,
    report: Path | None,
    force: bool,
) -> None:
    """Save DATA (.npy, .npz, .safetensors, a folder of pictures, or 'digits') with an index, from
    which `sample` and `memorization` prove, at small noise levels, that most rows have no weight.

    With --nproc, FILE is a folder, which gets a file for each process. DATA may be larger than
    memory: .npy and .safetensors are read and written piece by piece.

    Example: memokern index digits --output digits.safetensors

    Example: memokern index photographs --output photographs.safetensors --resume
    """
    several = ranks.launched()
    common.check_outputs([("--json", report, (".json",))], force)
    if several:
        ranks.check_folder("--output", output, force)
    else:
        common.check_outputs([("--output", output, (".safetensors",))], force)
    training = common.load(data, key, "DATA", shape=shape, layout=layout, index=False, check=False)
    if not several:
        training = room.checked(training, "DATA")
    labels.give_labels(training, labels_file, labels_key)
    training = ranks.shared(training)
    started = time.perf_counter()
    kept = output.with_name(f"{output.name}.partial") if resume else None
    # Only what is kept is written so far.
    kinds = () if kept is None else (OSError,)
    with common.wrong_input("DATA"), common.failure(f"--resume: cannot write {kept}", kinds):
        training.build_index(basis, progress=None if ranks.progress() else False, resume=kept)
    elapsed = time.perf_counter() - started
    with common.failure(
        "cannot write", (OSError, MemoryError, *((ValueError,) if several else ()))
    ):
        training.save(output)
    if kept is not None and ranks.first():
        unfinished.remove(kept)
    as_json.write(
        report,
        {
            "data": data,
            "output": output,
            "rows": training.n,
            "shape": training.shape,
            "dtype": str(training.dtype),
            "index": repr(training.index),
            "seconds": elapsed,
        },
    )
    text = f"{training.index}\nwrote {output} (index built in {common.seconds(elapsed)})"
    as_json.say(text, report)


@click.command(cls=pages.Command, short_help="Versions, backends, and who runs a call.")
@as_json.json_option
@click.option("--force", is_flag=True, help="Replace an existing file; without it it is refused.")
def info(report: Path | None, force: bool) -> None:
    """Versions, instruction set, threads, which backends can run here, who would run typical calls,
    and why the others would not.

    Example: memokern info --json
    """
    common.check_outputs([("--json", report, (".json",))], force)
    with common.wrong_input():  # such as an environment variable with an unknown value
        facts = _info.collect()
    as_json.write(report, facts)
    as_json.say(_info.render(facts), report)


@click.command(cls=pages.Command, short_help="Sample the embedded digits three ways.")
@click.option(
    "--out",
    default=Path(".demo"),
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the pictures; made if missing. Pictures of an earlier demo are replaced.",
)
@click.option(
    "-n",
    "--samples",
    default=_demo.SAMPLES,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many samples of each kind.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Of the noise."
)
def demo(out: Path, samples: int, seed: int) -> None:
    """Sample the embedded handwritten digits three ways: not regularised, Tikhonov, empirical
    Bayes.

    Example: memokern demo --out pictures
    """
    common.picture_folder(out)
    click.echo(_demo.introduction(samples))
    results = _demo.run(samples, seed, progress=common.progress_wanted())
    click.echo("\n" + _demo.render(results))
    with common.failure("cannot write"):
        paths = _demo.write_pictures(results, out)
    click.echo(
        "\npictures: each sample beside its nearest training image, the memorised ones framed"
    )
    for path in paths:
        click.echo(f"  {path}")
