"""The embedded data: what the source's own documentation says of it."""

from __future__ import annotations

import numpy as np

from memokern.data import digits


def test_digits_are_the_uci_test_set():
    images, labels = digits.digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    # Class counts published with the data set (optdigits.names).
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts
    # The first image, a zero, as printed in scikit-learn's documentation of load_digits.
    assert images[0, :3].tolist() == [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
    ]
    assert len(np.unique(images.reshape(1797, -1), axis=0)) == 1797


def test_scale_and_shift_take_ink_counts_to_minus_one_and_one():
    assert 0 * digits.DIGITS_SCALE + digits.DIGITS_SHIFT == -1
    assert 16 * digits.DIGITS_SCALE + digits.DIGITS_SHIFT == 1
