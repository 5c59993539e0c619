"""The paper's qualitative statements, on the numbers of the experiments; and that each can be drawn
and written.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

import memokern
from memokern.apps import experiments
from memokern.apps.experiments import (
    conditional,
    conditional_network,
    network_squares,
    networks,
    planar,
    squares,
    structured,
    sweeps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Those with networks are in test_network_experiments.py.
TRAINED = {e.name for m in (networks, network_squares, conditional_network) for e in m.EXPERIMENTS}
ANALYTIC = [name for name in experiments.EXPERIMENTS if name not in TRAINED]


@pytest.fixture(scope="module")
def numbers():
    """Numbers of an experiment, computed once per module, with the paper's sizes unless that takes
    long.
    """
    changes = {
        "trajectories-ve": {},
        "trajectories-vp": {},
        "weights": {},
        "rate": {"starts": 12},
        "tikhonov-sweep": {"starts": 400, "strengths": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)},
        "empirical-bayes-sweep": {"starts": 400, "strengths": (1e-2, 1e-1, 1.0, 10.0)},
        "structured": {},
        "squares": {"samples": 12},
        "conditional": {
            "seeds": 2,
            "queries": 8,
            "starts": 400,
            "digit_bandwidths": (0.4, 1.0, 3.0),
        },
    }
    assert list(changes) == ANALYTIC
    done: dict[str, dict] = {}

    def compute(name: str) -> dict:
        if name not in done:
            experiment = experiments.get(name)
            done[name] = experiment.run(experiment.parameters(**changes[name]))
        return done[name]

    return compute


@pytest.mark.parametrize("name", ["trajectories-ve", "trajectories-vp"])
def test_every_trajectory_ends_at_the_training_point_of_its_voronoi_cell(numbers, name) -> None:
    n = numbers(name)
    assert n["states"].shape[1:] == (30, 2) and n["data"].shape == (20, 2)
    assert n["collapsed_fraction"] == 1.0
    np.testing.assert_array_equal(n["cells"][-1], n["end_cell"])
    # The nearest point by definition, not by the library.
    distance = np.linalg.norm(n["states"][-1][:, None] - n["data"], axis=2)
    np.testing.assert_array_equal(distance.argmin(1), n["end_cell"])
    # The cell is decided at a finite level of noise: far above the last one, nothing changes any
    # more.
    assert n["settled_sigma"].min() > 10 * n["sigmas"][-1]
    decided = n["sigmas"] < n["settled_sigma"].min()
    assert decided.sum() > 5
    assert (n["cells"][decided] == n["end_cell"]).all()


def test_ve_and_vp_start_at_their_processes_noise(numbers) -> None:
    assert numbers("trajectories-ve")["sigmas"][0] == pytest.approx(np.sqrt(99 / (2 * np.log(10))))
    area = 0.001 + (3 - 0.001) / 2
    assert numbers("trajectories-vp")["sigmas"][0] == pytest.approx(np.sqrt(1 - np.exp(-area)))


def test_one_weight_takes_all(numbers) -> None:
    n = numbers("weights")
    np.testing.assert_allclose(n["weights"].sum(2), 1, rtol=1e-12)
    assert n["weights"][0].max() < 0.2  # nothing is decided while the noise covers the data
    assert n["end_weight"].min() > 1 - 1e-9
    assert (n["decided_sigma"] > n["sigmas"][-1]).all()


@pytest.mark.parametrize("process", ["ve", "vp"])
def test_distance_to_the_end_point_shrinks_like_sigma(numbers, process) -> None:
    found = numbers("rate")[process]
    # VE: x - y is proportional to sigma once one weight is left, slope 1 exactly; VP adds (1 -
    # alpha) y = O(sigma^2), which below sigma = 1e-2 is at most a few per cent of sigma.
    tolerance = {"ve": 0.005, "vp": 0.05}[process]
    assert np.abs(found["slope"] - 1).max() < tolerance
    assert found["constant"].max() < 10


def test_falling_allows_for_the_samples_noise_only() -> None:
    assert sweeps.falling([1.0, 0.5, 0.0025, 0.005, 0.0], 400)
    assert not sweeps.falling([0.1, 0.2], 400) and not sweeps.falling([0.0, 0.1], 400)


@pytest.mark.parametrize("name", ["tikhonov-sweep", "empirical-bayes-sweep"])
@pytest.mark.one_of(2)
def test_all_collapse_without_regularisation_and_fewer_the_stronger_it_is(numbers, name) -> None:
    n = numbers(name)
    assert n["unregularised_fraction"] == 1.0
    by_strength = [f for _, f in sorted(zip(n["strengths"], n["fractions"], strict=True))]
    assert sweeps.falling(by_strength, n["starts"])
    assert by_strength[0] > 0.9 and by_strength[-1] < 0.02


@pytest.mark.parametrize("name", ["tikhonov-sweep", "empirical-bayes-sweep"])
def test_fractions_follow_the_gaussian_guides(numbers, name) -> None:
    n = numbers(name)
    deviation = np.abs(np.subtract(n["fractions"], n["guide"]))
    # Binomial: standard deviation at most sqrt(1/4/400) = 0.025; the guides ignore how cells cut
    # the noise.
    assert np.isfinite(deviation).sum() >= 2
    assert np.nanmax(deviation) < 4 * 0.025


def test_symmetric_starts_stay_on_the_hyperplane_and_the_others_do_not(numbers) -> None:
    n = numbers("structured")
    for layout, starts in (("two", 2), ("four", 4)):
        found = n[layout]
        assert found["symmetric"].sum() == starts
        assert found["off_hyperplane"].max() < 1e-9
        assert found["end_distance"][found["symmetric"]].min() > 0.5
        assert found["end_distance"][~found["symmetric"]].max() < planar.TOLERANCE


def test_squares_are_copied_and_tikhonov_stops_it(numbers) -> None:
    n = numbers("squares")
    plain, cured = n["unregularised"], n["tikhonov"]
    assert plain["fraction"] == 1.0 and cured["fraction"] == 0.0
    assert plain["wrong_pixels"].max() == 0 and cured["wrong_pixels"].min() > 0
    assert set(plain["index"]) == {0, 1}  # both images are found, not one over and over


def test_conditional_measures_are_those_of_brute_force() -> None:
    """In float64, from the weights by their definition."""
    generator = torch.Generator().manual_seed(3)
    rows, conditions = conditional.linear_gaussian(200, 0.1, generator)
    _, asked = conditional.linear_gaussian(6, 0.1, generator)
    digits = memokern.TrainingSet.digits()[:120].double()
    cases = [(rows, conditions, asked, h) for h in (0.01, 0.1, 0.5)]
    half = digits[:, :, :4].flatten(1)
    cases += [(digits[:116], half[:116], half[116:], h) for h in (0.5, 2.0)]
    for y, c, wanted, h in cases:
        n_eff, trace = conditional.spread(y, c, wanted, h)
        w = torch.softmax(-torch.cdist(wanted, c).square() / (2 * h * h), 1)
        flat = y.flatten(1)
        square = (flat[None] - (w @ flat)[:, None]).square().sum(2)
        torch.testing.assert_close(n_eff, 1 / w.square().sum(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trace, (w * square).sum(1), rtol=1e-5, atol=1e-5)


def test_the_conditional_flow_ends_at_the_rows_as_often_as_their_weights_say(numbers) -> None:
    law = numbers("conditional")["end_law"]
    assert law["farthest"] < 1e-3 and law["count"].sum() == 400
    chi, freedom = conditional.deviation(law)
    assert freedom > 5 and stats.chi2.sf(chi, freedom) > 1e-4
    # Other weights are told apart.
    other = law | {"probability": np.roll(law["probability"], 1)}
    assert conditional.deviation(other)[0] > 10 * chi


def test_fewer_rows_and_less_variance_the_narrower_the_condition(numbers) -> None:
    n = numbers("conditional")
    digits = n["digits"]
    for values in (n["n_eff"].mean(0), digits["n_eff"], digits["trace"], digits["own_n_eff"]):
        assert (np.diff(values) > 0).all()
    # At its own condition a row counts most.
    assert digits["own_n_eff"][0] < digits["n_eff"][0]
    assert n["trace"].mean(0)[0] < n["trace"].mean(0)[-1]
    assert digits["trace"][-1] < digits["variance"]
    # The published means, of other draws: the same size.
    for h, n_eff, trace in zip(
        n["bandwidths"], n["n_eff"].mean(0), n["trace"].mean(0), strict=True
    ):
        published = conditional.PUBLISHED[h]
        assert 0.5 < n_eff / published[1] < 2 and 0.6 < trace / published[0] < 1.6, h


def test_inpainting_of_the_images_in_a_file(numbers, tmp_path) -> None:
    """Against the weights by their definition; the published values are drawn beside them."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (50, 3, 4, 6), dtype=torch.uint8, generator=generator)
    np.savez(tmp_path / "some.npz", images=images.numpy(), labels=np.zeros(50))
    p = conditional.Conditional(
        data=str(tmp_path / "some.npz"), images=40, queries=6, image_bandwidths=(1.0, 2.0), seed=2
    )
    found = conditional.of_file(p)
    assert (found["name"], found["shape"], found["rows"]) == ("some.npz", [3, 4, 6], 40)
    first = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:46]
    pixels = images[first].double() * 2 / 255 - 1
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(46, generator=generator)
    kept, fresh = pixels[order[:40]], pixels[order[40:]]
    c, asked = (v[..., :3].flatten(1) for v in (kept, fresh))
    own = c[:6] + 0.1 * torch.randn(6, 36, generator=generator, dtype=torch.float64)
    flat = kept.flatten(1)
    for prefix, wanted in (("", asked), ("own_", own)):
        for k, h in enumerate((1.0, 2.0)):
            w = torch.softmax(-torch.cdist(wanted, c).square() / (2 * h * h), 1)
            square = (flat[None] - (w @ flat)[:, None]).square().sum(2)
            n_eff, trace = (1 / w.square().sum(1)).mean(), (w * square).sum(1).mean()
            assert found[f"{prefix}n_eff"][k] == pytest.approx(float(n_eff), rel=1e-5)
            assert found[f"{prefix}trace"][k] == pytest.approx(float(trace), rel=1e-4, abs=1e-5)
    whole = numbers("conditional") | {"images": found}
    assert len(conditional.draw_conditional(whole).axes) == 4
    lines = conditional.conclude_conditional(whole)
    assert sum(line.startswith("some.npz, 40 rows, the left half of") for line in lines) == 2
    assert conditional.of_file(conditional.Conditional()) is None
    np.save(tmp_path / "flat.npy", np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match="to take halves of"):
        conditional.of_file(conditional.Conditional(data=str(tmp_path / "flat.npy")))


def test_squares_are_the_papers() -> None:
    pictures = squares.images(64)
    assert pictures.sum((1, 2)).tolist() == [12 * 12, 14 * 14]
    assert pictures[0, 6:18, 6:18].all() and pictures[1, 40:54, 40:54].all()
    with pytest.raises(ValueError, match="at least 16"):
        squares.images(8)


def test_starts_of_the_structured_points_lie_on_the_square() -> None:
    start = structured.square(2.1, 21)
    assert start.shape == (80, 2) and len({tuple(p) for p in start.tolist()}) == 80
    assert torch.equal(start.abs().amax(1), torch.full((80,), 2.1, dtype=torch.float64))


@pytest.mark.parametrize("name", ANALYTIC)
@pytest.mark.one_of(2)
def test_every_experiment_can_be_drawn_and_concluded(numbers, name, tmp_path) -> None:
    experiment, n = experiments.get(name), numbers(name)
    figure = experiment.figure(n)
    assert any(axis.lines or axis.images for axis in figure.axes)
    from memokern.apps import figures

    assert figures.save(figure, tmp_path / "f.pdf").stat().st_size > 2000
    lines = experiment.conclude(n)
    assert lines and all("nan" not in line for line in lines)
    assert "does NOT" not in " ".join(lines)


@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_defaults_are_frozen_seeded_and_quick_is_known(name) -> None:
    experiment = experiments.get(name)
    parameters = experiment.parameters()
    assert parameters.seed == (1 if hasattr(parameters, "points") else 0)
    assert dataclasses.replace(parameters, **experiment.quick) != parameters
    with pytest.raises(dataclasses.FrozenInstanceError):
        parameters.seed = 1


def test_the_points_are_the_papers_own() -> None:
    points = planar.training_points(planar.Planar().points, planar.Planar().seed)
    assert points.tolist() == np.random.RandomState(1).randn(20, 2).tolist()


def test_defaults_are_the_papers() -> None:
    p, t, e = planar.Planar(), sweeps.TikhonovSweep(), sweeps.EmpiricalBayesSweep()
    assert (p.points, p.starts, t.points, t.starts, e.starts) == (20, 30, 20, 1000, 1000)
    np.testing.assert_allclose(t.strengths, np.logspace(-1, -5, 9))
    np.testing.assert_allclose(e.strengths, np.logspace(-2, 1, 7))
    s = squares.Squares()
    assert (s.size, s.steps) == (64, 40)


@pytest.mark.long
def test_reproduce_is_deterministic_and_writes_numbers(tmp_path) -> None:
    experiment = experiments.get("weights")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        outcome = experiments.reproduce(experiment, folder, suffix=".png", quick=True)
        assert outcome.paths == [folder / "weights.png", folder / "weights.json"]
    first, second = ((f / "weights.json").read_text() for f in folders)
    assert first == second
    table = json.loads(first)
    assert table["source"] == "arXiv:2501.15785" and table["parameters"]["starts"] == 2
    assert len(table["numbers"]["times"]) == len(table["numbers"]["weights"])
    other = experiments.reproduce(experiment, tmp_path / "c", suffix=".png", quick=True, seed=5)
    assert not np.array_equal(other.numbers["data"], np.asarray(table["numbers"]["data"]))


def test_unknown_experiment_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'x'; known: trajectories-ve, "):
        experiments.get("x")
