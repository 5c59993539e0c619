"""`memokern train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from memokern import Denoiser, TrainingSet, processes, regularizers
from memokern.apps import curves, figures
from memokern.apps.cli import as_json, asked, common, labels, pages
from memokern.training import (
    MLP,
    EarlyStopping,
    LearnedDenoiser,
    Trainer,
    UNet,
    losses,
    memorised,
)
from memokern.training.networks import parameter_count

STEPS = 2000
OUTPUTS = {"edm": "edm", "flow-matching": "velocity", "cosine": "v"}


@click.command(cls=pages.Command, short_help="Train a small network, and watch it memorise.")
@click.option(
    "--data", default=common.DIGITS, show_default=True, metavar="FILE",
    help="Training rows: .npy, .npz, .safetensors or a folder of PNG or JPEG pictures, or "
    "'digits'.",
)  # fmt: skip
@click.option("--key", metavar="NAME", help="Which array of an .npz or .safetensors file.")
@common.arrangement("the rows", "--")
@labels.labels_options
@click.option("--label", type=int, metavar="INT", help="Train on the rows of this class only.")
@click.option(
    "--process", default="edm", show_default=True, type=click.Choice(sorted(processes.NAMES)),
    help="The diffusion process.",
)  # fmt: skip
@click.option(
    "--network", "kind", default="auto", show_default=True,
    type=click.Choice(["auto", "mlp", "unet"]), help="auto: a U-Net for images whose sides are "
    "multiples of 4, else a perceptron.",
)  # fmt: skip
@click.option("--width", type=click.IntRange(min=1), help="Of its layers.  [default: 256; unet 32]")
@click.option("--depth", default=2, show_default=True, type=click.IntRange(min=1),
              help="Hidden layers of a perceptron, resolutions of a U-Net.")  # fmt: skip
@click.option(
    "--tikhonov", default=0.0, show_default=True, metavar="C",
    help="The loss is |sigma s + eps|^2 + C |s|^2 (arXiv 2501.15785).",
)  # fmt: skip
@click.option(
    "--learn", "regularizer_text", metavar="REGULARIZER",
    help="Learn a closed-form score instead: none, or a regulariser as of 'sample'.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1),
              help="Steps of the optimiser in all.  [default: 2000]")  # fmt: skip
@click.option("--epochs", type=click.IntRange(min=1), metavar="N",
              help="Instead of --steps: each row is seen so often.")  # fmt: skip
@click.option("--batch", default=128, show_default=True, type=click.IntRange(min=1),
              help="Rows per step.")  # fmt: skip
@click.option("--lr", default=1e-3, show_default=True, help="Of Adam.")
@click.option("--ema", default=0.9999, show_default=True, help="Decay of the averaged weights.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62),
              help="Of the weights, the order of the rows and the noise.")  # fmt: skip
@click.option("--every", type=click.IntRange(min=1), metavar="STEPS",
              help="Between two evaluations.  [default: a tenth of the steps]")  # fmt: skip
@click.option(
    "-n", "--samples", default=64, show_default=True, type=click.IntRange(min=1),
    help="Drawn at each evaluation; memorised: nearest / second nearest row < 1/3.",
)  # fmt: skip
@click.option("--held-out", default=0, show_default=True, type=click.IntRange(min=0), metavar="N",
              help="So many of the rows, drawn at random, are kept from the training.")  # fmt: skip
@click.option("--patience", type=click.IntRange(min=1), metavar="K",
              help="Stop after K evaluations without a new least held-out loss.")  # fmt: skip
@click.option("--stop-memorised", type=click.FloatRange(0, 1), metavar="FRACTION",
              help="Stop when more of the samples are memorised.")  # fmt: skip
@click.option("--device", "device_name", default="cpu", show_default=True, metavar="DEVICE",
              help="Where to compute, as of 'sample'.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.safetensors",
              help="Write the network, for memokern.training.LearnedDenoiser.load.")  # fmt: skip
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE.safetensors",
              help="Write the state of the run at each evaluation.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from --checkpoint, with the same options.")
@click.option("--csv", "table", type=click.Path(path_type=Path), metavar="FILE.csv",
              help="Write the evaluations.")  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Losses and memorised fraction against the step.")  # fmt: skip
@as_json.json_option
@click.option("--force", is_flag=True, help="Replace existing outputs.")
def train(
    data: str,
    key: str | None,
    shape: tuple[int, ...] | None,
    layout: str | None,
    labels_file: str | None,
    labels_key: str | None,
    label: int | None,
    process: str,
    kind: str,
    width: int | None,
    depth: int,
    tikhonov: float,
    regularizer_text: str | None,
    steps: int | None,
    epochs: int | None,
    batch: int,
    lr: float,
    ema: float,
    seed: int,
    every: int | None,
    samples: int,
    held_out: int,
    patience: int | None,
    stop_memorised: float | None,
    device_name: str,
    output: Path | None,
    checkpoint: Path | None,
    resume: bool,
    table: Path | None,
    picture: Path | None,
    report: Path | None,
    force: bool,
) -> None:
    """Train a small denoising network on rows, and report at each evaluation the loss and how many
    of its samples are memorised.

    Example: memokern train --steps 3000 --held-out 300 --picture run.png

    Example: memokern train --data pictures --label 2 --epochs 200 --stop-memorised 0.1

    Example: memokern train --learn tikhonov:c=0.03 --checkpoint run.safetensors --resume
    """
    if steps is not None and epochs is not None:
        raise common.WrongInput("--epochs: takes the place of --steps; give one of them")
    _check_options(regularizer_text, tikhonov, resume, checkpoint, patience, held_out)
    outputs = [
        ("--output", output, (".safetensors",)), ("--csv", table, (".csv",)),
        ("--picture", picture, figures.FORMATS), ("--json", report, (".json",)),
    ]  # fmt: skip
    common.check_outputs(outputs, force)
    common.check_outputs([("--checkpoint", checkpoint, (".safetensors",))], force or resume)
    if picture is not None:
        with common.wrong_input("--picture"):
            figures.require()
    device = common.device(device_name)
    common.check_machine(device)
    rows = common.load(data, key, "--data", shape=shape, layout=layout, index=False)
    labels.give_labels(rows, labels_file, labels_key)
    if label is not None:
        rows = asked.of_label(rows, label)
    common.check_two_rows(rows, "--data")
    rows, kept = _split(rows, held_out, seed)
    with common.wrong_input():
        model = _model(rows, process, kind, width, depth, seed).to(device)
        rows = rows.to(device)
        loss: losses.Loss = losses.ScoreMatching(tikhonov)
        if regularizer_text is not None:
            with common.wrong_input("--learn"):
                regularizer = regularizers.parse(regularizer_text)
            loss = losses.Regression(Denoiser(rows, processes.get(process), regularizer))
        stop = None
        if patience is not None:
            stop = EarlyStopping("held_out", patience=patience)
        if stop_memorised is not None:
            stop = EarlyStopping("memorised", above=stop_memorised)
        trainer = Trainer(
            model, loss, rows, batch_size=batch, lr=lr, ema=ema, seed=seed, held_out=kept,
            stop=stop, metrics={"memorised": memorised(rows, samples)},
        )  # fmt: skip
    if resume and checkpoint is not None and checkpoint.exists():
        with common.wrong_input("--checkpoint"):
            trainer.load(checkpoint)
        as_json.say(f"goes on from step {trainer.step}", report)
    elif resume:
        as_json.say(f"no {str(checkpoint)!r} yet: starts from step 0", report)
    as_json.say(
        f"{type(model.network).__name__} of {parameter_count(model.network):,} numbers on"
        f" {rows.n} rows {list(rows.shape)}, {process}, batches of {batch}",
        report,
    )
    started = time.perf_counter()
    steps = _steps(steps, epochs, rows.n, batch)
    every = every or max(1, steps // 10)
    with common.failure("training", (OSError, MemoryError, RuntimeError)):
        history = trainer.fit(
            steps, every=every, save=checkpoint, progress=common.progress_wanted()
        )
    as_json.say(_render(history.rows), report)
    if trainer.stopped and stop is not None:
        as_json.say(f"stopped early, by {stop.monitor}", report)
    with common.failure("cannot write"):
        if output is not None:
            trainer.result().to("cpu").save(output)
        if table is not None:
            history.write_csv(table)
        if picture is not None:
            figures.save(curves.training(history, f"{type(model.network).__name__}"), picture)
    elapsed = time.perf_counter() - started
    files = as_json.written(report, output, checkpoint, table, picture)
    as_json.write(
        report,
        {
            "data": data, "rows": rows.n, "shape": rows.shape, "label": label, "held_out": held_out,
            "network": type(model.network).__name__,
            "parameters": parameter_count(model.network), "process": process,
            "tikhonov": tikhonov,
            "learn": regularizer_text, "steps": trainer.step, "stopped_early": trainer.stopped,
            "seed": seed, "evaluations": history.rows, "files": files, "seconds": elapsed,
        },
    )  # fmt: skip
    for path in files:
        as_json.say(f"wrote {path}", report)
    as_json.say(f"{trainer.step} steps, {common.seconds(elapsed)}", report)


def _steps(steps: int | None, epochs: int | None, rows: int, batch: int) -> int:
    """Steps of the optimiser, in which each row is seen `epochs` times."""
    if epochs is not None:
        return -(-epochs * rows // batch)
    return STEPS if steps is None else steps


def _check_options(
    learn: str | None,
    tikhonov: float,
    resume: bool,
    checkpoint: Path | None,
    patience: int | None,
    held_out: int,
) -> None:
    """Refuses options that do not go together."""
    if learn is not None and tikhonov:
        raise common.WrongInput("--learn has its regulariser: tikhonov:c=... instead of --tikhonov")
    if resume and checkpoint is None:
        raise common.WrongInput("--resume needs --checkpoint, the file to go on from")
    if patience is not None and not held_out:
        raise common.WrongInput("--patience needs --held-out, rows to measure the loss on")


def _split(rows: TrainingSet, held_out: int, seed: int) -> tuple[TrainingSet, TrainingSet | None]:
    """The rows to train on, and those that are held out."""
    if not held_out:
        return rows, None
    if held_out > rows.n - 2:
        raise common.WrongInput(f"--held-out: of {rows.n} rows at most {rows.n - 2}")
    order = torch.randperm(rows.n, generator=torch.Generator().manual_seed(seed))
    return rows.subset(order[held_out:].sort().values), rows.subset(order[:held_out].sort().values)


def _model(
    rows: TrainingSet, process: str, kind: str, width: int | None, depth: int, seed: int
) -> LearnedDenoiser:
    """A new network for these rows."""
    shape = rows.shape
    image = figures.image_layout(shape) in ("gray", "chw") and len(shape) > 1
    if kind == "auto":
        kind = "unet" if image and all(n % 4 == 0 for n in shape[-2:]) else "mlp"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any
        if kind == "unet":
            network = UNet(shape, 32 if width is None else width, depth)
        else:
            network = MLP(shape, 256 if width is None else width, depth)
    spread = float(rows[: min(rows.n, 1000)].std())
    return LearnedDenoiser(
        network, processes.get(process), output=OUTPUTS.get(process, "eps"),
        sigma_data=spread if spread > 0 else 1.0,
    )  # fmt: skip


def _render(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{row[n]:.6g}" if n in row else "" for n in names] for row in rows]
    return common.table(names, cells, range(len(names)))
