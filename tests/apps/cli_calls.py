"""How the tests call the command line: in this process, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import click.testing
import torch

from memokern.apps.cli import main


def call(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, [str(a) for a in arguments])


def settings() -> dict[str, str]:
    """Makes a process of its own import what is imported here, with as many threads."""
    threads = str(torch.get_num_threads())
    return {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": threads}


def process(*arguments: object, cwd=None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`memokern` in a process of its own, by its module so that the test sees the tree that is
    imported here.
    """
    return subprocess.run(
        [sys.executable, "-m", "memokern", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | settings() | environment,
        timeout=120,
    )
