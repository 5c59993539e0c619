"""The demonstration: what it writes, and that what it says of the samples is so."""

from __future__ import annotations

import pytest
import torch

from memokern import TrainingSet, functional, memorization
from memokern.apps import demo
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_shows_the_cure(tmp_path) -> None:
    done = call("demo", "--out", tmp_path / "d", "-n", 4)
    assert (done.exit_code, done.stderr) == (0, "")
    for file in ("unregularised", "tikhonov", "empirical-bayes"):
        assert (tmp_path / "d" / f"{file}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{file}.png" in done.stdout
    results = demo.run(48)
    plain, tikhonov, bayes = results
    assert plain.collapse.fraction == plain.ratio.fraction == 1.0
    assert tikhonov.collapse.fraction == 0 and tikhonov.ratio.fraction < 0.1
    assert bayes.collapse.fraction < 0.25 and bayes.ratio.fraction < 0.35
    assert demo.render(results).splitlines()[1].startswith("not regularised")
    # What the texts say of Tikhonov's samples: a training image plus noise of std sqrt(c).
    noise = tikhonov.collapse.distance.square().mean().sqrt() / 8
    assert noise == pytest.approx(demo.TIKHONOV_C**0.5, rel=0.1)


def test_mean_at_floor_stays_on_a_training_point_and_blends_elsewhere() -> None:
    data = TrainingSet(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    x = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    mean = demo.mean_at_floor(x, data, log_tau=-2.0)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 0.0], [1.0, 0.0]]))


def test_demo_searches_neighbours_once_for_both_criteria(monkeypatch) -> None:
    searches, search = [], functional.nearest

    def counting(x, data, k=1, **options):
        searches.append((len(x), k))
        return search(x, data, k, **options)

    monkeypatch.setattr(functional, "nearest", counting)
    results = demo.run(3)
    assert searches == [(3, 2)] * 3
    for result in results:
        assert torch.equal(result.collapse.index, result.ratio.index)
        again = memorization.collapse(result.shown, TrainingSet.digits(), demo.TOLERANCE)
        assert torch.equal(result.collapse.distance, again.distance)
