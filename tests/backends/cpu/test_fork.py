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
def test_a_forked_process_computes_on_one_thread_instead_of_waiting_for_ever() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Queue(), context.Queue()
    _posterior(here)  # the threads exist now
    child = context.Process(target=_posterior, args=(there,))
    child.start()
    got = there.get(timeout=60)
    child.join(10)
    assert child.exitcode == 0
    # One thread adds in another order than two.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(here.get()), rtol=1e-5, atol=1e-5)
