"""Memorisation criteria against hand-made distances and a plain float64 computation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from memokern import memorization
from memokern.data import storage as rows
from memokern.data.training_set import TrainingSet
from memokern.memorization import distances

pytestmark = pytest.mark.usefixtures("one_thread")

# Rows on a line: distances can be read off.
LINE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])


def brute(samples: torch.Tensor, data: TrainingSet) -> tuple[torch.Tensor, torch.Tensor]:
    """All distances [S, N] float64, sorted, with their rows."""
    rows = data.dequantize(data.rows).double()
    x = samples.double().flatten(1)
    distance = (x[:, None] - rows[None]).square().sum(-1).sqrt()
    return tuple(distance.sort(dim=1, stable=True))


def random_case(dtype: torch.dtype) -> tuple[torch.Tensor, TrainingSet]:
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.uint8:
        rows = torch.randint(0, 256, (60, 3, 4, 4), generator=generator, dtype=torch.uint8)
    else:
        rows = torch.randn(60, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    data = TrainingSet(rows)
    # From exact copies to far away.
    noise = (
        torch.randn(25, 3, 4, 4, generator=generator)
        * torch.linspace(0, 1, 25)[:, None, None, None]
    )
    return data.gather(torch.arange(25)) + noise, data


def test_collapse_by_hand():
    samples = torch.tensor([[0.0, 0.0], [1.0, 0.005], [0.4, 0.0], [2.5, 0.0]])
    found = memorization.collapse(samples, LINE, tol=1e-2)
    assert found.memorized.tolist() == [True, True, False, False]
    assert found.fraction == 0.5
    assert found.index.tolist() == [0, 1, 0, 2]
    torch.testing.assert_close(
        found.distance, torch.tensor([0, 0.005, 0.4, 0.5], dtype=torch.float64), rtol=1e-7, atol=0
    )
    assert torch.equal(found.value, found.distance)
    # Strictly below: a sample at the tolerance is not memorised.
    half = torch.tensor([[0.5, 0.0]])
    assert not memorization.collapse(half, LINE, tol=0.5).memorized.any()
    assert memorization.collapse(half, LINE, tol=0.5001).memorized.all()


def test_ratio_by_hand():
    samples = torch.tensor([[0.25, 0.0], [0.125, 0.0], [1.0, 0.0], [0.5, 7.0]])
    found = memorization.ratio(samples, LINE)
    torch.testing.assert_close(
        found.value, torch.tensor([1 / 3, 1 / 7, 0, 1], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert found.memorized.tolist()[1:] == [True, True, False]
    assert not memorization.ratio(samples[:1], LINE, threshold=0.33).memorized.any()
    assert memorization.ratio(samples[:1], LINE, threshold=0.34).memorized.all()


def test_duplicate_rows():
    rows = torch.tensor([[0.0], [0.0], [1.0]])
    found = memorization.ratio(torch.tensor([[0.0], [0.1]]), rows)
    assert found.value.tolist() == [0.0, 1.0]
    assert found.index.tolist() == [0, 0]
    assert memorization.carlini(torch.tensor([[0.0]]), rows[:2], k=2).value.tolist() == [0.0]


def test_carlini_by_hand():
    # Distances 0.5, 0.5, 2.5 and 0.25, 0.75, 2.75.
    samples = torch.tensor([[0.5, 0.0], [0.25, 0.0]])
    found = memorization.carlini(samples, LINE, k=3)
    expected = torch.tensor([0.5 / (3.5 / 3), 0.25 / (3.75 / 3)], dtype=torch.float64)
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=0)
    assert found.memorized.tolist() == [True, True]
    assert memorization.carlini(samples, LINE, k=3, threshold=0.3).memorized.tolist() == [
        False,
        True,
    ]


def test_exact_match_by_hand():
    rows = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    samples = torch.tensor([[0.4, 0.9, 0.6, -3.0], [0.4, 0.9, 0.4, 0.1], [9.0, 0.9, 0.6, 0.1]])
    found = memorization.exact_match(samples, rows, 0.5)
    assert found.memorized.tolist() == [True, False, False]
    assert found.value.tolist() == [0, 1, 1]
    assert found.index.tolist() == [0, 0, 0]
    assert found.distance.tolist() == [0, 1, 1]
    # The same rows as uint8 pixels in [-1, 1]: the threshold is in the data's units.
    pixels = TrainingSet((rows * 255).to(torch.uint8))
    again = memorization.exact_match(samples * 2 - 1, pixels, 0.0)
    assert torch.equal(again.value, found.value)


def test_exact_match_counts_in_chunks(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 3 * 48)
    samples, data = random_case(torch.float32)
    found = memorization.exact_match(samples, data, 0.1)
    bits, sample_bits = data[:] > 0.1, samples > 0.1
    differing = (bits[None] ^ sample_bits[:, None]).flatten(2).sum(-1)
    assert torch.equal(found.value, differing.min(dim=1).values.double())
    assert found.memorized.any()
    assert not found.memorized.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_all_criteria_against_all_distances(dtype, monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 7)  # 25 samples: a ragged last chunk
    samples, data = random_case(dtype)
    distance, index = brute(samples, data)
    collapse = memorization.collapse(samples, data, tol=2.0)
    ratio = memorization.ratio(samples, data)
    carlini = memorization.carlini(samples, data, k=10)
    # Distances are exact up to a few roundings of float64 and, for the dequantised rows, of the
    # float32 value of a pixel: 2^-24 in each of 48 features, against distances of 0.1 and more;
    # copies come out at that rounding instead of 0.
    atol = 48**0.5 * 2**-22
    for found in (collapse, ratio, carlini):
        torch.testing.assert_close(found.distance, distance[:, 0], rtol=1e-6, atol=atol)
        assert torch.equal(found.index, index[:, 0])
        assert found.distance.dtype == found.value.dtype == torch.float64
        assert torch.equal(found.memorized, found.value < found.threshold)
        assert found.fraction == found.memorized.sum() / 25
        assert 0 < found.fraction < 1
    torch.testing.assert_close(ratio.value, distance[:, 0] / distance[:, 1], rtol=1e-5, atol=atol)
    expected = distance[:, 0] / distance[:, :10].mean(1)
    torch.testing.assert_close(carlini.value, expected, rtol=1e-5, atol=atol)


def test_report_is_the_criteria_from_one_search(monkeypatch):
    samples, data = random_case(torch.float32)
    single = {
        "collapse": memorization.collapse(samples, data, 0.5),
        "ratio": memorization.ratio(samples, data, 0.4),
        "merged": memorization.merged_ratio(samples, data, 1.0, 0.4, k=20),
        "neighbourhood": memorization.neighbourhood(samples, data, k=20),
        "carlini": memorization.carlini(samples, data, k=20),
        "exact": memorization.exact_match(samples, data, 0.0),
    }
    searches = []
    nearest = distances.functional.nearest

    def counted(*args, **how):
        searches.append(args)
        return nearest(*args, **how)

    monkeypatch.setattr(distances.functional, "nearest", counted)
    report = memorization.report(
        samples, data, tol=0.5, threshold=0.4, k=20, level=0.0, merge_radius=1.0
    )
    assert len(searches) == 2  # one for the distances, one for the thresholded images
    assert list(report) == list(single)
    for name, found in report.items():
        for field in dataclasses.fields(found):
            got, expected = getattr(found, field.name), getattr(single[name], field.name)
            same = torch.equal(got, expected) if torch.is_tensor(got) else got == expected
            assert same, (name, field.name)
    # Few rows: k is cut to N; one row: only what one distance allows.
    assert report["carlini"].threshold == 0.5
    names = ["collapse", "ratio", "neighbourhood", "carlini"]
    assert list(memorization.report(torch.zeros(2, 2), LINE)) == names
    assert list(memorization.report(torch.zeros(2, 2), LINE[:1])) == ["collapse"]


def test_a_sample_that_is_not_a_number_is_no_copy_and_harms_no_other():
    samples = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    report = memorization.report(samples, LINE, level=0.5)
    assert len(report) == 5
    for found in report.values():
        assert found.memorized.tolist() == [False, True]
        assert math.isnan(found.value[0])
        assert math.isnan(found.distance[0])
        assert found.value[1] == 0


def test_copies_and_noise_on_digits():
    """Copies are found by every criterion; noise of half the pixels' range by none."""
    data = TrainingSet.digits()
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(data.n, generator=generator)[:20]
    copies = data.gather(index)
    for found in memorization.report(copies, data, level=0.0).values():
        assert found.fraction == 1
        assert torch.equal(data.gather(found.index), copies) or found.criterion == "exact"
    noise = torch.randn(20, 8, 8, generator=generator)
    for found in memorization.report(noise, data, level=0.0).values():
        assert found.fraction == 0


def test_embeddings_and_numpy_samples():
    """In a feature space: the same functions on embedded samples and rows."""
    samples, data = random_case(torch.float32)
    project = torch.linspace(-1, 1, 48 * 5).reshape(48, 5)
    embedded = samples.flatten(1) @ project
    found = memorization.ratio(embedded.numpy(), data[:].flatten(1) @ project)
    assert torch.equal(
        found.value, memorization.ratio(embedded, data[:].flatten(1) @ project).value
    )
    assert found.memorized.shape == (25,)


def test_gradients_and_half_precision_samples():
    samples, data = random_case(torch.float32)
    found = memorization.collapse(samples.requires_grad_(), data)
    assert not found.value.requires_grad
    half = memorization.collapse(samples.detach().half(), data)
    torch.testing.assert_close(half.distance, found.distance, rtol=0, atol=48**0.5 * 4 * 2**-11)


def test_text():
    found = memorization.collapse(torch.tensor([[0.0, 0.0], [0.5, 0.0], [9.0, 0.0]]), LINE)
    assert str(found) == repr(found) == "collapse: 1 of 3 memorised (33.3%)"


@pytest.mark.parametrize(
    "call",
    [
        memorization.collapse,
        memorization.ratio,
        lambda x, y: memorization.carlini(x, y, k=2),
        lambda x, y: memorization.exact_match(x, y, 0.5),
        memorization.report,
    ],
    ids=["collapse", "ratio", "carlini", "exact_match", "report"],
)
def test_wrong_samples(call):
    with pytest.raises(TypeError, match=r"floating type.*uint8.*dequantize"):
        call(torch.zeros(2, 2, dtype=torch.uint8), LINE)
    with pytest.raises(TypeError, match="tensor or array, got list"):
        call([[0.0, 0.0]], LINE)
    for shape in ((2, 3), (2,), (2, 1, 2), ()):
        with pytest.raises(ValueError, match=r"expected samples \[S, 2\]"):
            call(torch.zeros(shape), LINE)
    with pytest.raises(ValueError, match="at least one sample"):
        call(torch.zeros(0, 2), LINE)
    with pytest.raises(ValueError, match="finite rows"):
        call(torch.zeros(1, 2), torch.full((2, 2), math.nan))


def test_wrong_parameters():
    x = torch.zeros(1, 2)
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive tol"):
            memorization.collapse(x, LINE, value)
        with pytest.raises(ValueError, match="positive threshold"):
            memorization.ratio(x, LINE, value)
        with pytest.raises(ValueError, match="positive threshold"):
            memorization.carlini(x, LINE, 2, value)
        with pytest.raises(ValueError, match="positive tol"):
            memorization.report(x, LINE, tol=value)
    for k in (1, 4):
        with pytest.raises(ValueError, match="2 <= k <= 3"):
            memorization.carlini(x, LINE, k)
    with pytest.raises(ValueError, match="k >= 2"):
        memorization.report(x, LINE, k=1)
    with pytest.raises(ValueError, match="at least 2 training rows"):
        memorization.ratio(x, LINE[:1])
    with pytest.raises(ValueError, match="finite threshold"):
        memorization.exact_match(x, LINE, np.nan)


def test_progress_is_shown_on_request(capsys):
    memorization.collapse(torch.zeros(1, 2), LINE)
    assert capsys.readouterr().err == ""
    memorization.collapse(torch.zeros(1, 2), LINE, progress=True)
    assert "nearest rows" in capsys.readouterr().err


# --- rows that do not count, rows that are the same, features --------------------------------


def near_duplicates() -> TrainingSet:
    """Ten rows, of which the first has four copies 1e-3 apart and the second an exact one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    shifts = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    shifts = 1e-3 * shifts / shifts.norm(dim=1, keepdim=True)
    return TrainingSet(torch.cat([rows, rows[:1] + shifts, rows[1:2]]))


def test_the_own_row_does_not_count():
    data = near_duplicates()
    own = torch.arange(data.n)
    own[3] = -1  # for this one all rows count
    distance, index = brute(data[:], data)
    for i in range(data.n):
        kept = (index[i] != i) | (own[i] < 0)
        d, j = distance[i][kept], index[i][kept]
        one = {"own": own[i : i + 1]}
        x = data[i : i + 1]
        found = memorization.report(x, data, k=5, **one)
        assert found["collapse"].distance.item() == pytest.approx(float(d[0]), abs=1e-12)
        assert found["collapse"].index.item() == int(j[0])
        if i in (1, 3, data.n - 1):  # an exact copy elsewhere, or itself
            assert found["ratio"].value.item() == 0
            continue
        assert found["ratio"].value.item() == pytest.approx(float(d[0] / d[1]))
        assert found["carlini"].value.item() == pytest.approx(float(d[0] / d[:5].mean()))
        assert found["neighbourhood"].value.item() == pytest.approx(float(d[0] / d[1:5].mean()))
    whole = memorization.report(data[:], data, k=5, own=own)
    assert whole["collapse"].distance[4] > 0 and whole["collapse"].distance[3] == 0
    level = memorization.exact_match(data[:], data, 0.0, own=own)
    assert level.value[1] == 0 and level.value[3] == 0
    most = memorization.report(data[:], data, own=own)  # k is cut to the rows that count
    right = distance[5, 1] / distance[5, 1:].mean()
    assert most["carlini"].value[5].item() == pytest.approx(float(right))
    with pytest.raises(ValueError, match="expected 2 <= k <= 14"):
        memorization.carlini(data[:], data, k=15, own=own)
    with pytest.raises(ValueError, match=r"expected own as a tensor \[15\]"):
        memorization.ratio(data[:], data, own=own[:3])
    with pytest.raises(IndexError):
        memorization.ratio(data[:], data, own=own + 20)
    with pytest.raises(ValueError, match="no row left"):
        memorization.collapse(data[:1], data[:1], own=own[:1])


def test_merged_rows_do_not_hide_copies():
    data = near_duplicates()
    samples = data[:3] + 0.01
    plain, merged = (
        memorization.ratio(samples, data),
        memorization.merged_ratio(samples, data, 0.01),
    )
    assert plain.memorized.tolist() == [False, False, True]
    assert merged.memorized.all()
    distance, index = brute(samples, data)
    rows = data[:]
    for i in range(3):
        apart = [float(d) for d, j in zip(distance[i], index[i], strict=True)
                 if float((rows[j] - rows[index[i][0]]).norm()) > 0.01]  # fmt: skip
        assert merged.value[i].item() == pytest.approx(float(distance[i, 0]) / apart[0])
    torch.testing.assert_close(
        memorization.merged_ratio(samples, data, 0.0).value[2], plain.value[2]
    )
    # Fewer neighbours than copies: the last is a bound, and the value too large if anything.
    few = memorization.merged_ratio(samples, data, 0.01, k=3)
    bound = float(distance[0, 0] / distance[0, 2])
    assert few.value[0].item() == pytest.approx(bound) and bound > merged.value[0]
    with pytest.raises(ValueError, match="merge radius >= 0"):
        memorization.merged_ratio(samples, data, -1.0)


def test_rows_are_merged_in_chunks(monkeypatch):
    samples, data = near_duplicates()[:8] + 0.01, near_duplicates()
    whole = memorization.merged_ratio(samples, data, 0.01, k=7).value
    monkeypatch.setattr(distances, "COMPARED", 2 * 7 * 6)
    assert torch.equal(memorization.merged_ratio(samples, data, 0.01, k=7).value, whole)


def test_feature_space_is_the_same_criteria_on_embeddings():
    samples, data = random_case(torch.uint8)

    def embed(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :7].square()

    features = memorization.embedded(data, embed, batch=13)
    assert features.shape == (7,) and features.n == data.n
    right = memorization.report(embed(samples), features, k=9, merge_radius=0.1)
    for given in (None, features):
        found = memorization.report(
            samples, data, k=9, merge_radius=0.1, level=0.0, embed=embed, features=given
        )
        for name, expected in right.items():
            assert torch.equal(found[name].value, expected.value), name
        pixels = memorization.exact_match(samples, data, 0.0)
        assert torch.equal(found["exact"].value, pixels.value)
    with pytest.raises(ValueError, match="give embed"):
        memorization.report(samples, data, features=features)
    with pytest.raises(TypeError, match="expected embed to give floating-point rows"):
        memorization.embedded(data, lambda x: x.flatten(1).long())
    with pytest.raises(ValueError, match="a row for each of 60, got 1"):
        memorization.embedded(data, lambda x: x.flatten(1)[:1], batch=60)
    with pytest.raises(ValueError, match="expected features of 60 rows"):
        memorization.report(samples, data, embed=embed, features=features.subset(slice(0, 5)))


def test_near_duplicates_of_rows_are_told_apart():
    """Rows 4e-4 apart in 3072 features at a norm of 55, where expanded squares in float32 are off
    by far more: the criteria see which of them a sample copies."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 3072, generator=generator)
    shift = torch.randn(5, 3072, generator=generator)
    rows = base + 4e-4 * shift / shift.norm(dim=1, keepdim=True)
    found = memorization.ratio(rows + 1e-6, rows)
    assert found.index.tolist() == list(range(5)) and found.memorized.all()


@pytest.mark.parametrize("power", [0, 520, 1000, -540, -900])
def test_criteria_do_not_depend_on_units(power):
    """Though float64 cannot hold the squares of these distances."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    rows[30:] = rows[:30] + 0.01 * torch.randn(30, 4, generator=generator, dtype=torch.float64)
    samples = rows[:6] + 1e-3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    unit = 2.0**power

    def found(unit):
        data, x = TrainingSet(rows * unit), samples * unit
        return [
            memorization.ratio(x, data),
            memorization.ratio(x, data, own=torch.arange(6)),
            memorization.merged_ratio(x, data, 0.1 * unit, k=5),
            memorization.neighbourhood(x, data),
            memorization.exact_match(x, data, 0.01 * unit),
        ]

    for mine, plain in zip(found(unit), found(1.0), strict=True):
        assert torch.equal(mine.index, plain.index) and mine.fraction == plain.fraction
