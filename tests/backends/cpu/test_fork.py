"""A process that was forked after the kernels have run on several threads."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

import memokern


def _posterior(results: object) -> None:
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    results.put(memokern.posterior(rows[:64], rows, 0.3).log_z.tolist())  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Queue(), context.Queue()
    _posterior(here)  # the threads exist now, and no fork copies them
    child = context.Process(target=_posterior, args=(there,))
    child.start()
    got = there.get(timeout=60)
    child.join(10)
    assert child.exitcode == 0
    assert got == here.get()
