"""Targets against the published formulas in float64, and where those divide by zero."""

from __future__ import annotations

import pytest
import torch

from memokern import Denoiser, TrainingSet, processes
from memokern.processes import FlowMatching
from memokern.training import targets

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 4, 4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def posterior_mean(x, rows, sigma, alpha, own=None):
    """By definition, one query at a time, with the own row as one row more."""
    found = []
    for i in range(len(x)):
        mine = rows if own is None else torch.cat([rows, own[i : i + 1]])
        square = (x[i] - alpha[i] * mine).flatten(1).square().sum(1)
        w = torch.softmax(-square / (2 * sigma[i] ** 2), 0)
        found.append(torch.einsum("n,n...->...", w, mine))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [False, True])
def test_stable_targets_are_the_posterior_mean_of_the_reference(dtype, own):
    y, z = normal(6, *SHAPE, seed=1), normal(6, *SHAPE, seed=2)
    sigma = torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0, 80.0], dtype=torch.float64)
    alpha = torch.linspace(0.3, 1.0, 6, dtype=torch.float64)
    reference = normal(9, *SHAPE, seed=3)
    reference = reference if own else torch.cat([y, reference])
    x = alpha.reshape(-1, 1, 1, 1) * y + sigma.reshape(-1, 1, 1, 1) * z
    right = posterior_mean(x, reference, sigma, alpha, y if own else None)
    got = targets.stable(
        x.to(dtype), reference.to(dtype), sigma, alpha, own=y.to(dtype) if own else None
    )
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_own_rows_at_sigma_zero():
    """The nearest takes all, the own row among them; equally near rows share."""
    rows = torch.tensor([[0.0], [2.0], [2.0]], dtype=torch.float64)
    x = torch.tensor([[0.125], [0.875], [1.75], [2.0], [-1.0]], dtype=torch.float64)
    own = torch.tensor([[5.0], [1.0], [1.5], [2.0], [-2.0]], dtype=torch.float64)
    # The last query is equally near to all rows, whose mean is nearer than any of them.
    x, own = torch.cat([x, x.new_tensor([[1.0]])]), torch.cat([own, own.new_tensor([[1.5]])])
    got = targets.stable(x, rows, 0.0, own=own)
    right = torch.tensor([[0.0], [1.0], [5.5 / 3], [2.0], [-1.0], [1.5]], dtype=torch.float64)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("own", [False, True])
def test_flow_matching_is_the_weighted_mean_of_paths(own):
    y, z = normal(5, *SHAPE, seed=1), normal(5, *SHAPE, seed=2)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    wide = t.reshape(-1, 1, 1, 1)
    reference = normal(7, *SHAPE, seed=3)
    reference = reference if own else torch.cat([reference, y])
    x = wide * y + (1 - wide) * z
    mean = posterior_mean(x, reference, 1 - t, t, y if own else None)
    right = (mean - x) / (1 - wide)
    for noise in (None, z) if own else (None,):
        got = targets.flow_matching(x, reference, t, own=y if own else None, noise=noise)
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_matching_is_finite_at_both_ends(dtype):
    y, z = normal(4, 6, dtype=dtype), normal(4, 6, seed=1, dtype=dtype)
    for t in (0.0, 1e-9, 1 - 1e-6, 1 - 1e-12, 1.0):
        x = targets.noised(y, z, t, FlowMatching())
        for own, noise in ((None, None), (y, None), (y, z)):
            reference = y if own is None else normal(5, 6, seed=2, dtype=dtype)
            got = targets.flow_matching(x, reference, t, own=own, noise=noise)
            assert bool(torch.isfinite(got).all()), (t, own is None)
        if t > 0.5:  # with the noise given: the own path, to the last bit of y and z
            torch.testing.assert_close(got, y - z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(targets.flow_matching(y, y, 1.0), y)


def test_the_mean_of_forced_targets_is_the_flow_of_the_whole_set():
    """What Bertrand et al. force the own sample in for. A small reference without it would pull
    to rows that did not make x_t: the mean over samples would be that of another flow. Monte Carlo
    over the rows that could have given one x_t, by importance: 40,000 references of 1 row."""
    rows = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)
    t, count = 0.5, 40_000
    g = torch.Generator().manual_seed(0)
    x = torch.full((count, 1), 0.3, dtype=torch.float64)
    right = targets.flow_matching(x[:1], rows, t)
    weight = torch.softmax(-(x[0] - t * rows)[:, 0].square() / (2 * (1 - t) ** 2), 0)
    own = rows[torch.multinomial(weight, count, replacement=True, generator=g)]
    other = rows[torch.randint(0, 3, (count,), generator=g)]
    found = []
    for row in rows:  # queries whose reference is this row
        mine = (other == row)[:, 0]
        found.append(targets.flow_matching(x[mine], row[None], t, own=own[mine]))
    found = torch.cat(found)
    error = (found.mean() - right).abs() / (found.std() / count**0.5)
    assert error < 4
    plain = targets.denoising(own, (x - t * own) / (1 - t), t, FlowMatching(), "velocity")
    assert found.std() < 0.9 * plain.std()  # and its variance is smaller


@pytest.mark.parametrize("name", ["vp", "edm", "flow-matching"])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "score", "velocity"])
def test_one_sample_targets_are_those_of_a_training_set_of_one_row(name, prediction):
    process = processes.get(name)
    y, z = normal(5, 3), normal(5, 3, seed=1)
    t = process.time_of_sigma(torch.tensor([0.01, 0.1, 0.3, 0.5, 0.8], dtype=torch.float64))
    x = targets.noised(y, z, t, process)
    got = targets.denoising(y, z, t, process, prediction)
    for i in range(5):
        right = Denoiser(y[i : i + 1], process, prediction=prediction)(x[i : i + 1], t[i])
        torch.testing.assert_close(got[i : i + 1], right, rtol=1e-9, atol=1e-9)


def test_stable_velocities_use_the_rows_of_the_class():
    rows, labels = normal(30, *SHAPE), torch.arange(30) % 4
    bank = TrainingSet(rows, labels=labels)
    label = torch.tensor([3, 0, 0, 2, 1])
    t = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.95], dtype=torch.float64)
    wide = t.reshape(-1, 1, 1, 1)
    x = (1 - wide) * rows[label] + wide * normal(5, *SHAPE, seed=1)
    right = []
    for i in range(5):
        own = rows[labels == label[i]]
        mean = posterior_mean(x[i : i + 1], own, t[i : i + 1], 1 - t[i : i + 1])
        right.append((x[i : i + 1] - mean) / t[i])  # v = z - y averaged
    once = Denoiser(bank, FlowMatching(reverse=True), prediction="x0")
    for given in (bank, once):
        got = targets.stable_velocity(x, given, t, label)
        torch.testing.assert_close(got, torch.cat(right), rtol=1e-9, atol=1e-9)
    at_data = targets.stable_velocity(rows[:1], bank, 0.0, labels[:1])
    assert bool(torch.isfinite(at_data).all())


def test_logits_are_not_cut_off():
    """12288 features at sigma 0.05: logits near -1e6, which a floor at -1e4 ties."""
    rows = normal(3, 12288, dtype=torch.float32)
    x = rows[1:2] + 0.05 * normal(1, 12288, seed=2, dtype=torch.float32)
    torch.testing.assert_close(targets.stable(x, rows, 0.05), rows[1:2])


def test_targets_have_no_gradient_and_wrong_arguments_are_told():
    y = normal(4, 3)
    x = y.clone().requires_grad_()
    found = [targets.stable(x, y, 1.0), targets.flow_matching(x, y, 0.5)]
    found += [targets.stable_velocity(x, y, 0.5), targets.denoising(x, y, 0.5, FlowMatching())]
    assert not any(v.requires_grad for v in found[:3])
    with pytest.raises(ValueError, match="one row for each"):
        targets.stable(y, y, 1.0, own=y[:2])
    with pytest.raises(ValueError, match=r"expected t in \[0, 1\], got 1.5"):
        targets.flow_matching(y, y, 1.5)
    with pytest.raises(ValueError, match="give own as well"):
        targets.flow_matching(y, y, 0.5, noise=y)
    with pytest.raises(ValueError, match="process of its own"):
        targets.stable_velocity(y, Denoiser(y), 0.5, process=FlowMatching())
    with pytest.raises(ValueError, match="expected prediction one of"):
        targets.denoising(y, y, 0.5, FlowMatching(), "noise")
