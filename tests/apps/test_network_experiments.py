"""The experiments with networks: tiny ones can be drawn and concluded; the paper's qualitative
statements hold at sizes that take minutes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from memokern.apps import experiments
from memokern.apps.experiments import conditional_network, network_squares, networks
from memokern.training import LearnedDenoiser

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
    "network-conditional": {
        "points": 6, "asked": 3, "starts": 8, "width": 8, "steps": 4, "evaluations": 2,
        "held_out": 20, "batch": 4, "sampler_steps": 3,
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
    never = {"epochs": [1, 2], "fraction": [0.1, 0.2]}
    assert network_squares.memorised_from(never) == np.inf
    assert network_squares.memorised_from({"epochs": [2, 4], "fraction": [0.1, 0.9]}) == 3
    p = networks.NetworkSweep()
    assert (p.points, p.width, p.depth, p.lr, p.ema) == (20, 256, 2, 1e-3, 0.9999)
    assert p.strengths == (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    assert dataclasses.asdict(network_squares.NetworkSquares())["size"] == 64


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


def test_effective_rows_are_right_in_the_mean():
    """Of ten samples each, of rows drawn with known weights."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.1])
    drawn = torch.multinomial(p.expand(20000, 4), 10, True, generator=torch.manual_seed(0))
    pairs = 1 / conditional_network.effective_rows(drawn)
    assert abs(float(pairs.mean()) - float(p.square().sum())) < 0.005
    one = torch.zeros(2, 10, dtype=torch.int64)
    assert conditional_network.effective_rows(one).tolist() == [1.0, 1.0]
    assert conditional_network.effective_rows(torch.arange(10)[None]).tolist() == [90.0]


def test_no_noise_is_added_to_a_condition():
    """The loss is that of y with c held: another c of the same y and noise is another loss."""
    network = networks.made(conditional_network.WithCondition, 0, 8, 1)
    model = LearnedDenoiser(network, output="edm", sigma_data=1.0)
    loss = conditional_network.ConditionalDenoising("x0")
    rows = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.4, -1.0]])
    noise, t = torch.randn(2, 3, generator=torch.manual_seed(0)), torch.tensor([0.5, 2.0]).double()
    found = loss.at(model, rows, noise, t)
    other = noise.clone()
    other[:, 2] += 1
    assert torch.equal(loss.at(model, rows, other, t), found)
    for i in range(2):
        x = rows[i : i + 1, :2] + float(t[i]) * noise[i : i + 1, :2]
        x0 = conditional_network.at_conditions(model, rows[i : i + 1, 2:])(x, t[i])
        torch.testing.assert_close(found[i], (x0 - rows[i, :2]).square().mean())
    shifted = rows + torch.tensor([0.0, 0.0, 1.0])
    assert not torch.allclose(loss.at(model, shifted, noise, t), found)


@pytest.mark.long
def test_stopped_early_a_conditional_network_keeps_the_variance_that_it_loses_in_the_end():
    """The quick size."""
    experiment = experiments.get("network-conditional")
    n = experiment.run(experiment.parameters(**experiment.quick))
    assert not any("does NOT hold" in line for line in experiment.conclude(n))
    assert n["held_out"][-1] > 3 * min(n["held_out"]) and n["loss"][-1] < 0.5 * n["loss"][0]


@pytest.mark.long
def test_all_sizes_copy_the_squares_in_the_end_and_larger_ones_sooner():
    """The quick size."""
    experiment = experiments.get("network-squares")
    n = experiment.run(experiment.parameters(**experiment.quick))
    small, middle, large = n["runs"]
    for run in n["runs"]:
        assert run["fraction"][0] == 0.0  # stopped early, no copies
        assert run["fraction"][-1] >= 0.9  # all memorise in the end,
        assert run["differing_pixels"][-1] == 0
    when = [network_squares.memorised_from(run) for run in n["runs"]]
    assert when[0] > when[1] >= when[2] and when[0] > 1.2 * when[2]  # larger ones sooner
    assert small["parameters"] < middle["parameters"] < large["parameters"]
    assert not any("does NOT hold" in line for line in experiment.conclude(n))
    assert torch.tensor(large["shown"]).shape[1:] == (4, 32, 32)
