"""`python -m bench.scaling`: the cost of one evaluation against the number of rows, as a picture.

Rows are images and augmented copies of them, queries x = y + sigma z of some rows, as in
training. Dense, pruned, and pruned by reading all of the index's first level, at a few small sigma;
beside them the time that this reading takes at the machine's read rate, and, while the rows fit in
a few gigabytes as float32, PyTorch's fused attention (sdpa), whose answer must be ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memokern
from bench import images, machine, peers, pruned, timing
from bench.images import Images
from memokern.util import writing

COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
ROUNDS = {"pruned": 9, "all rows": 9, "dense": 3, "read": 5, "sdpa": 3}
MOST_OFF = 1e-3  # what the peer's means, whose logits cancel, may differ from ours by
MOST_FLOATS = 1 << 29  # of rows that the peer has as float32


def measure(
    path: str | None, counts: list[int], b: int, sigmas: list[float], patience: float
) -> dict[str, Any]:
    """Seconds of each way for each number of rows and each sigma."""
    clock = timing.Clock(patience)
    source = images.load(path)
    found = []
    for n in counts:
        data = images.enlarged(source, n)
        rows, sdpa = memokern.TrainingSet(data.rows).build_index(progress=False), None
        if data.rows.numel() <= MOST_FLOATS:
            sdpa = peers.MEAN["sdpa"](images.values(data.rows))
        for sigma in sigmas:
            entry = _measure(data, rows, sdpa, b, sigma, clock)
            found.append(entry)
            ms = {name: 1e3 * entry[name] for name in ROUNDS if name in entry}
            peer = ""
            if sdpa is not None:
                peer = f"  sdpa {ms['sdpa']:8.1f} ms ({ms['sdpa'] / ms['pruned']:.0f}x)"
            print(
                f"N={n:>7} sigma={sigma:<5g} pruned {ms['pruned']:8.2f} ms  by all rows"
                f" {ms['all rows']:8.2f} ms  dense {ms['dense']:8.1f} ms"
                f" ({ms['dense'] / ms['pruned']:.0f}x){peer}  read {ms['read']:.2f} ms"
                f"  rows kept {entry['kept']:.1f}",
                flush=True,
            )
    return {
        "machine": machine.describe(), "b": b, "images": path or "synthetic",
        "shape": list(source.rows.shape[1:]), "counts": found,
    }  # fmt: skip


def _measure(
    data: Images,
    rows: memokern.TrainingSet,
    sdpa: peers.Mean | None,
    b: int,
    sigma: float,
    clock: timing.Clock,
) -> dict[str, float]:
    x = pruned.noisy_rows(data, b, sigma)
    index = rows.index
    assert index is not None
    read = torch.ones(index.coarse.numel())

    def by_all_rows() -> object:
        held, index.blocks = index.blocks, None
        try:
            return memokern.denoise(x, rows, sigma, method="pruned")
        finally:
            index.blocks = held

    calls: dict[str, Callable[[], object]] = {
        "pruned": lambda: memokern.denoise(x, rows, sigma, method="pruned"),
        "all rows": by_all_rows,
        "dense": lambda: memokern.denoise(x, rows, sigma, method="dense"),
        "read": read.sum,
    }
    if sdpa is not None:
        peer, flat, want = sdpa, x.flatten(1), memokern.denoise(x, rows, sigma).flatten(1)
        off = float((peer(flat, sigma) - want).norm() / want.norm())
        if off > MOST_OFF:
            raise ValueError(f"the peer's means differ from ours by {off:.2g} of their size")
        calls["sdpa"] = lambda: peer(flat, sigma)
    entry: dict[str, float] = {"n": len(data.rows), "sigma": sigma}
    for name, call in calls.items():
        call()
        times = [clock.time(call, lambda: None) for _ in range(ROUNDS[name])]
        entry[name] = timing.best(times)["seconds"]
    kept = memokern.posterior(x, rows, sigma, method="pruned", certificate=True).certificate
    assert kept is not None
    entry["kept"] = float(kept.rows_kept.double().mean())
    return entry


def draw(result: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sigmas = sorted({c["sigma"] for c in result["counts"]})
    figure, panels = plt.subplots(
        1, len(sigmas), figsize=(1.2 + 3 * len(sigmas), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, sigma in zip(panels[0], sigmas, strict=True):
        counts = [c for c in result["counts"] if c["sigma"] == sigma]
        n = [c["n"] for c in counts]
        for name, label, style in (
            ("sdpa", "PyTorch's fused attention (sdpa)", "d-"),
            ("dense", "dense sweep", "o-"),
            ("all rows", "pruned, all rows of the first level", "^-"),
            ("pruned", "pruned, by blocks of rows", "s-"),
            ("read", "read of the index's first level", ":"),
        ):
            axes.plot(n, [1e3 * c.get(name, math.nan) for c in counts], style, label=label)
        line = [1e3 * counts[0]["pruned"] * v / n[0] for v in n]
        axes.plot(n, line, "--", color="0.7", label="proportional to N")
        axes.set(xscale="log", yscale="log", xlabel="rows N", title=f"sigma = {sigma:g}")
    panels[0][0].set_ylabel("time of one evaluation, ms")
    threads = result["machine"]["threads"]
    figure.suptitle(f"B = {result['b']}, {threads} threads", fontsize=9)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
        frameon=False,
    )  # fmt: skip
    figure.savefig(out, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.scaling", description=__doc__)
    parser.add_argument("--data", help="a file of uint8 images (.npy, .npz, .safetensors)")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), metavar="N")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.05, 0.1, 0.3])
    parser.add_argument("--json", type=Path, default=Path("results/scaling.json"))
    parser.add_argument("--picture", type=Path, default=Path("results/scaling.png"))
    parser.add_argument("--patience", type=float, default=timing.PATIENCE, metavar="SECONDS",
                        help="how long to wait, in all, for a quiet machine")  # fmt: skip
    parser.add_argument("--load", action="store_true", help="draw the figures of --json again")
    args = parser.parse_args()
    try:
        if args.load:
            result = json.loads(args.json.read_text())
        else:
            result = measure(args.data, args.counts, args.batch, args.sigma, args.patience)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            writing.write_json(args.json, result)
    except (OSError, ValueError) as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        return 2
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(result, args.picture)
    print(f"figures in {args.json}, picture in {args.picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
