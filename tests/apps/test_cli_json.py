"""--json of every command: a file, or the standard output in place of the text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from memokern.apps.cli import main
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")

# Each command with little work, and what its JSON must have.
COMMANDS = {
    "sample": (["-n", 2, "--steps", 2], {"samples": 2, "solver": "exponential"}),
    "memorization": (["rows.npy", "rows.npy"], {"count": 6, "samples": "rows.npy"}),
    "index": (["wide.npy", "-o", "i.safetensors"], {"rows": 6, "output": "i.safetensors"}),
    "train": (
        ["--data", "rows.npy", "--epochs", 4, "--batch", 5, "-n", 2, "--width", 4],
        {"steps": 5, "stopped_early": False, "network": "MLP", "rows": 6},
    ),
    "info": ([], {"memokern": "0.1.0"}),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.save("rows.npy", random.standard_normal((6, 2)))
    np.save("wide.npy", random.standard_normal((6, 80)).astype(np.float32))


@pytest.mark.parametrize("command", COMMANDS)
def test_results_go_to_a_file_or_to_the_output(command, tmp_path) -> None:
    options, holds = COMMANDS[command]
    done = call(command, *options, "--json")
    assert done.exit_code == 0, done.output
    alone = json.loads(done.stdout)  # nothing else is there
    assert {name: alone[name] for name in holds} == holds
    done = call(command, *options, "--force", "--json", "out.json")
    assert done.exit_code == 0 and not done.stdout.startswith("{"), done.output
    assert json.loads((tmp_path / "out.json").read_text()).keys() == alone.keys()
    refused = call(command, *options, "--json", "out.json")
    assert refused.exit_code == 2 and "--force" in refused.stderr and not refused.stdout
    wrong = call(command, *options, "--json", "out.txt")
    assert wrong.exit_code == 2 and "must end in .json" in wrong.stderr


@pytest.mark.long
def test_an_experiment_says_its_conclusions_and_files() -> None:
    done = call("reproduce", "rate", "--quick", "--format", "png", "--json", "-")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["experiment"] == "rate" and len(found["conclusions"]) == 2
    assert found["files"] == ["reproduction/rate.png", "reproduction/rate.json"]


def test_every_command_that_says_results_has_it() -> None:
    without = {"demo", "help", "completion"}
    for name, command in main.commands.items():
        options = {option for param in command.params for option in param.opts}
        assert ("--json" in options) == (name not in without), name
