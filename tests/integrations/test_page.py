"""The examples of docs/integrations.md run, each where its client is installed."""

import re
from pathlib import Path

import pytest

from tests.integrations.clients import client

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
DISTRIBUTIONS = {
    "diffusers": "diffusers",
    "k_diffusion": "k-diffusion",
    "smalldiffusion": "smalldiffusion",
    "torchcfm": "torchcfm",
    "torchdiffeq": "torchdiffeq",
}
MODULES = {"k_diffusion": "k_diffusion.sampling", "smalldiffusion": "smalldiffusion.diffusion"}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of the clients
@pytest.mark.parametrize("block", BLOCKS, ids=[f"example {i + 1}" for i in range(len(BLOCKS))])
def test_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^(?:from|import) (\w+)", block, re.M):
        if package in DISTRIBUTIONS:
            client(DISTRIBUTIONS[package], MODULES.get(package, package))
    exec(compile(block, "docs/integrations.md", "exec"), {})


def test_every_model_has_an_example():
    from memokern import integrations

    models = {n for n in integrations.__all__ if n not in ("Adapter", "Seen")} | {"DiffusersModel"}
    assert models == set(re.findall(r"from memokern.integrations import (\w+)", "\n".join(BLOCKS)))
