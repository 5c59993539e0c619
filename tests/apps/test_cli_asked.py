"""What samples are asked for on the command line: labels, a condition, guidance."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.apps.cli_calls import call


@pytest.fixture
def rows(tmp_path):
    """Nine points, three of each label, with a condition each."""
    points = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    path = tmp_path / "points.npz"
    labels, conditions = np.arange(9) % 3, np.linspace(0, 1, 9)[:, None]
    np.savez(path, rows=points, labels=labels, conditions=conditions)
    return path


def sample(rows, tmp_path, *options):
    report = tmp_path / "report.json"
    done = call(
        "sample", "--data", rows, "-n", 6, "--steps", 10, "--json", report, "--force", *options
    )
    return done, json.loads(report.read_text()) if done.exit_code == 0 else None


def test_several_labels_take_turns(rows, tmp_path) -> None:
    done, facts = sample(rows, tmp_path, "--label", "2,0")
    assert done.exit_code == 0, done.output
    assert [index % 3 for index in facts["each"]["index"]] == [2, 0] * 3
    assert facts["label"] == [0, 2] and "the 3 rows of labels 0, 2" in done.stdout


def test_a_condition_chooses_the_rows(rows, tmp_path) -> None:
    done, facts = sample(rows, tmp_path, "--condition", "0.5", "--bandwidth", "0.01", "-v")
    assert done.exit_code == 0, done.output
    assert facts["each"]["index"] == [4] * 6
    assert "given a condition within 0.01 of 0.5" in done.stdout
    done, facts = sample(rows, tmp_path, "--label", "1", "--guidance", "1.2")
    assert done.exit_code == 0 and facts["guidance"] == 1.2 and "guidance 1.2" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--condition", "0.5"), "needs --bandwidth"),
        (("--bandwidth", "0.5"), "--bandwidth: is that of a --condition"),
        (("--condition", "0.5,1", "--bandwidth", "1"), "expected 1 numbers, got 2"),
        (("--condition", "near", "--bandwidth", "1"), "'near' is not a number"),
        (("--guidance", "2"), "needs a --label or a --condition"),
        (("--condition", "0.51", "--bandwidth", "0"), "no row has it"),
        (("--data", "digits", "--condition", "1", "--bandwidth", "1"), "have no conditions"),
    ],
)
def test_what_does_not_fit_is_one_line(rows, tmp_path, options, message) -> None:
    done, _ = sample(rows, tmp_path, *options)
    assert done.exit_code == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
