"""The experiments with networks: tiny ones can be drawn and concluded; the paper's qualitative
statements hold at sizes that take minutes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from memokern.apps import experiments
from memokern.apps.experiments import networks

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "network-sweep": {
        "widths": (4, 8), "strengths": (0.0, 0.1), "width": 8, "steps": 20, "evaluations": 2,
        "starts": 20, "held_out": 20, "batch": 20, "sampler_steps": 4,
    },
    "network-squares": {
        "size": 16, "widths": (4, 8), "patch": 4, "depth": 2, "steps": 4, "evaluations": 2,
        "samples": 2, "batch": 4, "sampler_steps": 3,
    },
}  # fmt: skip


def run(name: str, **changes) -> dict:
    experiment = experiments.get(name)
    return experiment.run(experiment.parameters(**changes))


@pytest.mark.parametrize("name", TINY)
def test_tiny_networks_are_drawn_and_say_what_does_not_hold(name, monkeypatch):
    asked = []
    real = networks.run_one
    monkeypatch.setattr(networks, "run_one", lambda *a: asked.append(a[1:3]) or real(*a))
    numbers, experiment = run(name, **TINY[name]), experiments.get(name)
    figure = experiment.figure(numbers)
    assert all(axis.lines or axis.images for axis in figure.axes)
    lines = experiment.conclude(numbers)
    # Nothing is learned in so few steps, and the conclusions say so.
    assert any("does NOT hold here" in line for line in lines)
    if name == "network-sweep":
        assert asked == [(4, 0.0), (8, 0.0), (8, 0.1)]  # what two parts share is run once
        assert numbers["by_width"][1] is numbers["by_c"][0]


def test_levels_and_statements():
    assert networks.levels(100, 4) == [12, 25, 50, 100]
    assert networks.levels(2, 9) == [1, 2]
    assert networks.grows([0.1, 0.5], 100) and not networks.grows([0.5, 0.55], 100)
    assert networks.memorised_from({"epochs": [1, 2], "fraction": [0.1, 0.2]}) == np.inf
    assert networks.memorised_from({"epochs": [1, 2], "fraction": [0.1, 0.6]}) == 2
    p = networks.NetworkSweep()
    assert (p.points, p.width, p.depth, p.lr, p.ema) == (20, 256, 2, 1e-3, 0.9999)
    assert p.strengths == (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    assert dataclasses.asdict(networks.NetworkSquares())["size"] == 64


@pytest.mark.long
def test_small_width_few_epochs_early_stopping_and_c_reduce_the_collapse():
    """The quick size. With 400 samples a fraction's standard error is at most 0.025."""
    experiment = experiments.get("network-sweep")
    n = experiment.run(experiment.parameters(**experiment.quick))
    assert n["closed_form"][0] == 1.0
    widths = [each["fraction"][-1] for each in n["by_width"]]
    assert networks.grows(widths, n["starts"])
    whole = n["by_c"][0]
    assert networks.grows(whole["fraction"], n["starts"])  # epochs
    assert networks.grows([each["fraction"][-1] for each in n["by_c"]][::-1], n["starts"])
    stop = networks.early(whole)
    assert stop < len(whole["fraction"]) - 1
    assert networks.grows([whole["fraction"][stop], whole["fraction"][-1]], n["starts"])


@pytest.mark.long
def test_larger_u_nets_copy_the_squares_sooner():
    n = run("network-squares", widths=(8, 32), steps=300, evaluations=6, samples=8)
    small, large = n["runs"]
    assert large["fraction"][0] == 0.0  # stopped early, no copies
    assert large["fraction"][-1] >= 0.5 and small["fraction"][-1] == 0.0
    assert large["differing_pixels"][-1] < small["differing_pixels"][-1]
    assert torch.tensor(large["shown"]).shape[1:] == (4, 64, 64)
