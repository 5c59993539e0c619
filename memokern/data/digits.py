"""The handwritten digits that travel with the package, so that examples, tests and the demo need no
download.

`digits.npz` has images uint8 [1797, 8, 8] (0..16 ink counts) and labels uint8 [1797] (0..9). It is
the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998),
UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), in the order in which scikit-learn's `load_digits`
gives it. Nothing but the container and the type was changed. It was made with

    d = sklearn.datasets.load_digits()
    memokern.data.files.write_npz("digits.npz", images=d.images.astype("uint8"),
    labels=d.target.astype("uint8"))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memokern.data import files

# A pixel counts the ink in a 4 x 4 block, 0..16, so that y = r / 8 - 1 lies in [-1, 1], exactly.
DIGITS_SCALE = 1 / 8
DIGITS_SHIFT = -1.0


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 8 x 8 handwritten digits: images uint8 [1797, 8, 8] with values 0..16, labels uint8
    [1797] with values 0..9.

    Source: E. Alpaydin, C. Kaynak, doi 10.24432/C50P49, CC BY 4.0. `TrainingSet.digits()` gives
    them scaled to [-1, 1].

    Example:
        >>> from memokern.data.digits import digits
        >>> images, labels = digits()
        >>> images.shape, images.dtype, labels[:5].tolist()
        ((1797, 8, 8), dtype('uint8'), [0, 1, 2, 3, 4])
    """
    table = files.read_table(Path(__file__).parent / "digits.npz")
    return table["images"], table["labels"]
