"""Plain arguments: what passes, and what the errors say."""

import math

import numpy as np
import pytest

from memokern.util import checks


def test_integers():
    for value in (3, np.int64(3), np.uint8(3)):
        found = checks.integer("k", value, 1, 3)
        assert found == 3 and type(found) is int
    assert checks.integer("k", -5) == -5


@pytest.mark.parametrize(
    ("value", "low", "high", "error", "message"),
    [
        (True, None, None, TypeError, "expected k as an int, got bool; count them"),
        (2.0, None, None, TypeError, "expected k as an int, got float; count them"),
        (np.float64(2), None, None, TypeError, "expected k as an int, got float64; count them"),
        ("2", None, None, TypeError, "expected k as an int, got str; count them"),
        (0, 1, None, ValueError, "expected k >= 1, got 0; count them"),
        (0, 1, 3, ValueError, "expected k in 1..3, got 0; count them"),
        (4, 1, 3, ValueError, "expected k in 1..3, got 4; count them"),
    ],
)
def test_wrong_integers(value, low, high, error, message):
    with pytest.raises(error) as caught:
        checks.integer("k", value, low, high, hint="; count them")
    assert str(caught.value) == message


def test_numbers():
    for value in (2, 2.0, np.float32(2), np.int16(2)):
        found = checks.number("h", value, 2.0)
        assert found == 2.0 and type(found) is float
    assert checks.number("h", math.inf, 0.0, strict=True, infinite=True) == math.inf
    assert checks.number("h", -1e300) == -1e300


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (False, {}, TypeError, "expected h as a number, got bool"),
        ("2", {}, TypeError, "expected h as a number, got str"),
        (None, {}, TypeError, "expected h as a number, got NoneType"),
        (math.nan, {}, ValueError, "expected h finite, got nan"),
        (math.inf, {}, ValueError, "expected h finite, got inf"),
        (math.nan, {"infinite": True}, ValueError, "expected h not NaN, got nan"),
        (math.nan, {"low": 0.0}, ValueError, "expected h finite and >= 0, got nan"),
        (-1, {"low": 0.0}, ValueError, "expected h finite and >= 0, got -1"),
        (0, {"low": 0.0, "strict": True}, ValueError, "expected h finite and > 0, got 0"),
        (-1, {"low": 0.5, "infinite": True}, ValueError, "expected h >= 0.5, got -1"),
        (0, {"low": 1.0, "hint": "; wide"}, ValueError, "expected h finite and >= 1, got 0; wide"),
    ],
)
def test_wrong_numbers(value, options, error, message):
    with pytest.raises(error) as caught:
        checks.number("h", value, **options)
    assert str(caught.value) == message
