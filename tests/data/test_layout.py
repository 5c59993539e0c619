"""Layouts, shapes and units: samples that are not in the order or the unit of the rows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from memokern import StreamedSet, TrainingSet, memorization
from memokern.index.basis import image_shape
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LAST = IMAGES.permute(0, 2, 3, 1).contiguous()
CRITERIA = {
    "collapse": memorization.collapse,
    "ratio": memorization.ratio,
    "carlini": lambda s, d, **kw: memorization.carlini(s, d, 5, **kw),
    "exact_match": lambda s, d, **kw: memorization.exact_match(s, d, 0.0, **kw),
    "report": lambda s, d, **kw: memorization.report(s, d, **kw)["ratio"],
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_channels_last_is_an_error_or_converted(criterion) -> None:
    measure = CRITERIA[criterion]
    with pytest.raises(ValueError, match=r"\[S, 3, 8, 8\].*\[40, 8, 8, 3\].*layout='hwc'"):
        measure(LAST, IMAGES)
    assert measure(LAST, IMAGES, layout="hwc").fraction == 1
    assert (
        measure(LAST.numpy(), TrainingSet(LAST.numpy(), layout="hwc"), layout="hwc").fraction == 1
    )
    assert measure(LAST, LAST).fraction == 1
    with pytest.raises(ValueError, match="expected layout 'chw' or 'hwc'"):
        measure(LAST, IMAGES, layout="nhwc")
    with pytest.raises(ValueError, match=r"images \[N, H, W, C\]"):
        measure(LAST.flatten(1), IMAGES, layout="hwc")


def test_a_training_set_takes_shape_and_layout(tmp_path) -> None:
    np.save(tmp_path / "flat.npy", LAST.flatten(1).numpy())
    data = TrainingSet(tmp_path / "flat.npy", shape=(8, 8, 3), layout="hwc")
    assert data.shape == (3, 8, 8) and torch.equal(data[:], IMAGES)
    assert TrainingSet(tmp_path / "flat.npy", shape=[8, 8, 3]).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"\[3, 9, 9\] has 243 elements.*192"):
        TrainingSet(IMAGES, shape=(3, 9, 9))
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        TrainingSet(IMAGES.flatten(1), layout="hwc")


def test_an_index_is_for_one_order_of_the_features(tmp_path) -> None:
    path = tmp_path / "last.safetensors"
    TrainingSet(LAST).build_index(dims=(16, 32)).save(path)
    assert TrainingSet(path).index is not None
    assert TrainingSet(path, layout="hwc").index is None
    assert TrainingSet(path, shape=(192,)).index is None


ADVICE = {
    (8, 8, 3): "--samples-layout hwc",
    (192,): "--samples-shape 3,8,8",
    (3, 64): "--samples-shape 3,8,8",
    (8, 3, 8): "--samples-shape 3,8,8",
}


@pytest.mark.parametrize("shape", ADVICE)
def test_the_command_compares_no_samples_of_another_shape(tmp_path, shape) -> None:
    np.save(tmp_path / "data.npy", IMAGES.numpy())
    np.save(tmp_path / "samples.npy", IMAGES.numpy().reshape(40, *shape))
    done = call("memorization", tmp_path / "samples.npy", tmp_path / "data.npy")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert str([40, *shape]) in done.stderr and "[S, 3, 8, 8]" in done.stderr
    assert ADVICE[shape] in done.stderr


def test_the_command_converts_both_files(tmp_path) -> None:
    np.save(tmp_path / "first.npy", IMAGES.numpy())
    np.save(tmp_path / "last.npy", LAST.numpy())
    np.save(tmp_path / "flat.npy", LAST.flatten(1).numpy())
    first, last, flat = (tmp_path / f"{name}.npy" for name in ("first", "last", "flat"))
    for arguments in (
        [last, first, "--layout", "hwc"],
        [last, first, "--samples-layout", "hwc"],
        [first, last, "--data-layout", "hwc"],
        [flat, first, "--shape", "8,8,3", "--layout", "hwc"],
        [first, flat, "--data-shape", "8,8,3", "--data-layout", "hwc"],
    ):
        done = call("memorization", *arguments)
        assert done.exit_code == 0, done.output
        assert "40 of 40" in done.stdout and done.stderr == ""
    # Axes of one entry change the order of nothing.
    np.save(tmp_path / "grey.npy", TrainingSet.digits()[:20][:, None].numpy())
    assert "20 of 20" in call("memorization", tmp_path / "grey.npy", "digits").stdout
    out = tmp_path / "a.safetensors"
    done = call("index", flat, "--shape", "8,8,3", "--layout", "hwc", "-o", out)
    assert done.exit_code == 0 and TrainingSet(out).shape == (3, 8, 8)
    done = call("sample", "--data", flat, "--shape", "8,8,3", "--layout", "hwc", "--steps", 2)
    assert done.exit_code == 0 and "[3, 8, 8]" in done.stdout
    done = call("sample", "--data", flat, "--shape", "8,x", "--steps", 2)
    assert done.exit_code == 2 and "'8,x' is not a shape such as 3,32,32" in done.stderr
    assert call("sample", "--shape", "64").exit_code == 2


UNITS = {
    "0..1": lambda x: (x + 1) / 2,
    "0..255": lambda x: (x + 1) * 127.5,
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_samples_in_another_unit_get_a_warning_with_both_ranges(unit, criterion) -> None:
    samples, measure = UNITS[unit](IMAGES), CRITERIA[criterion]
    with pytest.warns(UserWarning, match=r"samples lie in \[.*the data in \[-(1|0\.99)"):
        measure(samples, IMAGES)
    with pytest.warns(UserWarning, match=r"samples lie in \[-(1|0\.99).*the data in \[\d"):
        measure(IMAGES, samples)


def test_samples_in_the_unit_of_the_data_get_no_warning() -> None:
    digits = TrainingSet.digits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (
            digits[:50],
            digits[:50] * 1.2,
            digits[:50] + 0.5 * torch.randn(50, 8, 8),
            digits[:].mean(0).expand(20, 8, 8),  # drawn together by regularisation
            IMAGES[:, 0] * 0.1,
        ):
            memorization.ratio(samples, digits)
        memorization.ratio(torch.rand(20, 2), torch.rand(100, 2) * 2 - 1)


def test_the_command_shows_the_warning_in_one_line(tmp_path) -> None:
    np.save(tmp_path / "samples.npy", 255 * np.random.default_rng(0).random((8, 8, 8)))
    done = call("memorization", tmp_path / "samples.npy", "digits")
    assert done.exit_code == 0 and done.stderr.count("\n") == 1
    assert "memorization: warning: the samples lie in [" in done.stderr
    assert "the data in [-1, 1]" in done.stderr


def test_flat_images_are_told_the_shape_to_give() -> None:
    rows = torch.rand(20, 784)
    for made in (TrainingSet(rows), StreamedSet(rows.split(8))):
        with pytest.warns(UserWarning, match=r"shape=\(28, 28\)") as caught:
            made.build_index()
        assert [w.filename for w in caught] == [__file__]
    with pytest.raises(ValueError, match=r"shape=\(3, 64, 64\)"):
        TrainingSet(torch.rand(2, 3 * 64 * 64)).build_index()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingSet(rows, shape=(28, 28)).build_index()
        TrainingSet(rows).build_index("pca")
        TrainingSet(rows[:, :768]).build_index()
    assert image_shape(1024) is None
