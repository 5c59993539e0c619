"""The files that are larger than memory, small."""

import sys

import numpy as np

from memokern import memorization
from tools import stream_file


def test_rows_and_samples_of_which_half_are_rows(tmp_path):
    rows, samples = tmp_path / "rows.npy", tmp_path / "samples.npy"
    stream_file.make(rows, 500, 16, samples, 10)
    made = np.load(rows)
    assert made.shape == (500, 3, 16, 16) and made.dtype == np.uint8 and made.std() > 20
    found = memorization.ratio(np.load(samples), stream_file.memokern.TrainingSet(rows))
    assert found.memorized.tolist() == [True, False] * 5
    seconds = stream_file.stream(str(rows), 8, index=True)  # which checks the answers
    assert {"norms", "posterior", "nearest", "index", "pruned"} < set(seconds)


def test_a_command_says_what_it_took(capfd):
    took = "import sys; x = bytes(range(256)) * 200_000; sum(range(10**7)); sys.exit(len(x) % 255)"
    status, found = stream_file.limited([sys.executable, "-c", took], 1 << 30)
    assert status == 51_200_000 % 255 and 0 < found["of cores"] < 60 and found["seconds"] > 0
    _, next_one = stream_file.limited([sys.executable, "-c", ""], 1 << 30)
    assert 0 < next_one["of cores"] < found["of cores"]  # of this command, not of both
    if "GB of its own" in found:  # where a control group can be made
        assert found.get("GB with pages", 1) > 0.05
    else:
        assert "nothing limits the memory" in capfd.readouterr().err
