"""Wrong input: the error says what was expected and what came, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

import memokern

X, ROWS = torch.zeros(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memokern.score([0.0], ROWS, 1.0), TypeError, "expected x as a tensor"),
        (lambda: memokern.score(X.int(), ROWS, 1.0), TypeError, r"use x.float\(\)"),
        (lambda: memokern.score(X, ROWS.int(), 1.0), TypeError, "expected rows of type"),
        (lambda: memokern.score(X, "data.npy", 1.0), TypeError, "wrap arrays and files"),
        (lambda: memokern.score(X, ROWS[0], 1.0), ValueError, r"expected data \[N"),
        (lambda: memokern.score(X, ROWS[:0], 1.0), ValueError, "N >= 1"),
        (lambda: memokern.score(X[:, :3], ROWS, 1.0), ValueError, r"expected x \[\*batch, 4\]"),
        (lambda: memokern.score(X, ROWS, -1.0), ValueError, "sigma finite and >= 0, got -1"),
        (lambda: memokern.score(X, ROWS, math.nan), ValueError, "got nan"),
        (lambda: memokern.score(X, ROWS, torch.ones(2)), ValueError, "broadcasts to the batch"),
        (lambda: memokern.score(X, ROWS, "1"), TypeError, "sigma as a number"),
        (lambda: memokern.score(X, ROWS, 1.0, math.inf), ValueError, "expected alpha finite"),
        (lambda: memokern.score(X, ROWS, 1.0, 1.0, 0.0), ValueError, "temperature finite and > 0"),
        (lambda: memokern.score(X, ROWS, 1.0, bias=X), ValueError, r"expected bias \[5\]"),
        (lambda: memokern.score(X, ROWS, 1.0, bias=[0.0]), TypeError, "bias as a tensor"),
        (
            lambda: memokern.score(X, ROWS, 1.0, bias=torch.full((5,), torch.nan)),
            ValueError,
            "got NaN",
        ),
        (
            lambda: memokern.score(X, ROWS, 1.0, bias=torch.full((5,), -torch.inf)),
            ValueError,
            "no row is left",
        ),
        (lambda: memokern.score(X, ROWS, 1.0, method="fast"), ValueError, "auto, dense"),
        (lambda: memokern.posterior(X, ROWS, 1.0, weighting="box"), ValueError, "gaussian, log"),
        (lambda: memokern.nearest(X, ROWS, k=6), ValueError, "1 <= k <= N = 5"),
        (lambda: memokern.nearest(X, ROWS, k=1.5), TypeError, "k as an int"),
        (lambda: memokern.jvp(X, ROWS, X[:1], 1.0), ValueError, "v like x"),
        (
            lambda: memokern.weights(torch.zeros(1 << 26, 1), torch.ones(3, 1), 1.0),
            ValueError,
            "posterior",
        ),
        (lambda: memokern.score(X, ROWS.to("meta"), 1.0), ValueError, "move one with"),
    ],
)
def test_wrong_input_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memokern.posterior_state(X, ROWS, -1.0), ValueError, "sigma finite and >= 0"),
        (lambda: memokern.posterior_state(X[:, :3], ROWS, 1.0), ValueError, r"expected x"),
        (lambda: memokern.posterior_state(X, ROWS, 1.0, weighting="box"), ValueError, "gaussian"),
        (lambda: memokern.posterior_state(X, ROWS[:0], 1.0), ValueError, "N >= 1"),
        (
            lambda: memokern.posterior(X, ROWS, 1.0, precision="half"),
            ValueError,
            "precision one of",
        ),
        (lambda: memokern.merge(), ValueError, "at least one state"),
        (lambda: memokern.merge(X), TypeError, "expected states of memokern.posterior_state"),
    ],
)
def test_wrong_states_say_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
