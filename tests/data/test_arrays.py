"""Arrays of numpy in any order of axes and bytes, and calls under another default device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from memokern import (
    Denoiser,
    TrainingSet,
    kde,
    memorization,
    nearest,
    posterior,
    processes,
    regularizers,
    samplers,
)
from memokern.data import files
from memokern.likelihood import log_likelihood
from memokern.training import MLP, LearnedDenoiser, Trainer, losses

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
ORDERS = {
    "rows reversed": lambda a: a[::-1],
    "columns reversed": lambda a: a[..., ::-1],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "Fortran": np.asfortranarray,
    "every second": lambda a: a[::2],
    "moved": lambda a: np.moveaxis(a, 1, 3),
    "all": lambda a: np.asfortranarray(a.astype(a.dtype.newbyteorder(">")))[::-1, ..., ::-1],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8])
@pytest.mark.parametrize("writeable", [True, False])
def test_rows_and_samples_in_any_order(order, dtype, writeable) -> None:
    array = ORDERS[order]((PLAIN * 20 + 100).astype(dtype))
    array.flags.writeable = writeable
    plain = np.array(array, dtype=dtype, order="C", copy=True)
    data, same = TrainingSet(array), TrainingSet(torch.from_numpy(plain))
    assert data.shape == same.shape and torch.equal(data.rows, same.rows)
    x = same[:3]
    assert torch.equal(posterior(x, data, 1.0).mean, posterior(x, same, 1.0).mean)
    if dtype != np.uint8:
        assert memorization.collapse(array, data).fraction == 1


@pytest.mark.parametrize("order", ["rows reversed", "big-endian", "every second"])
def test_whatever_chooses_or_describes_rows(order) -> None:
    numbers = ORDERS[order](np.arange(20))
    plain = numbers.astype(np.int64).copy()
    data = TrainingSet(PLAIN, labels=np.arange(20))
    taken = torch.from_numpy(PLAIN)[torch.from_numpy(plain)]
    assert torch.equal(data.subset(numbers)[:], taken)
    assert torch.equal(data.gather(numbers), taken) and torch.equal(data[numbers], taken)
    assert len(data.where(numbers)) == len(plain)
    mask = np.zeros(20, bool)[::-1]
    mask[3] = True
    assert torch.equal(data.subset(mask)[:], data[mask]) and len(data[mask]) == 1
    part = TrainingSet(PLAIN[: len(plain)], labels=numbers, log_weights=numbers / 9)
    assert part.labels.tolist() == plain.tolist()
    assert torch.allclose(part.log_weights, torch.from_numpy(plain / 9))


def test_a_mask_is_not_lost() -> None:
    with pytest.raises(TypeError, match="masked array"):
        TrainingSet(np.ma.masked_array(PLAIN, PLAIN > 0))
    with pytest.raises(TypeError, match="masked array"):
        TrainingSet(PLAIN, labels=np.ma.masked_array(np.arange(20), np.arange(20) > 3))


def asked(numbers: np.ndarray) -> list[torch.Tensor]:
    """What functions give that take numbers for each of four queries, or describe a process."""
    whole, shares = numbers, numbers / 8
    rows = torch.from_numpy(PLAIN).flatten(1)
    x = rows[:4] + 0.1
    data = TrainingSet(rows, labels=torch.arange(20) % 5, conditions=torch.arange(20.0))
    return [
        posterior(x, data, shares).mean,
        posterior(x, data, 1.0, alpha=shares, temperature=shares).mean,
        Denoiser(data)(x, shares, whole),
        posterior(x, data, 1.0, label=whole).mean,
        posterior(x, data, 1.0, condition=shares, bandwidth=shares).mean,
        posterior(x, data, 1.0, leave_out=whole).mean,
        kde.score(x, data, shares),
        processes.DDPM(shares).alpha(torch.arange(4.0, dtype=torch.float64)),
    ]


def test_numbers_for_queries_in_any_order() -> None:
    numbers = np.array([4, 3, 2, 1])
    expected = asked(numbers)
    for other in (numbers[::-1].copy()[::-1], numbers.astype(">i8"), np.repeat(numbers, 2)[::2]):
        assert all(map(torch.equal, asked(other), expected))


@pytest.mark.parametrize(
    "name", ["sigma", "alpha", "temperature", "label", "condition", "bandwidth", "leave_out"]
)
def test_a_mask_of_numbers_for_queries_is_not_lost(name) -> None:
    rows = torch.from_numpy(PLAIN).flatten(1)
    data = TrainingSet(rows, labels=torch.arange(20), conditions=torch.arange(20.0))
    numbers = {"sigma": 1.0}
    if name == "bandwidth":
        numbers["condition"] = 1.0
    if name == "condition":
        numbers["bandwidth"] = 1.0
    numbers[name] = np.ma.masked_array([1, 2, 3], [False, True, False])
    with pytest.raises(TypeError, match=f"{name} is a masked array"):
        posterior(rows[:3], data, **numbers)


def test_a_mask_of_a_bandwidth_or_schedule_is_not_lost() -> None:
    numbers = np.ma.masked_array([0.9, 0.5, 0.1], [False, True, False])
    rows = torch.from_numpy(PLAIN).flatten(1)
    for leave_one_out in (False, True):
        with pytest.raises(TypeError, match="bandwidth is a masked array"):
            kde.log_density(rows[:3], rows[:3], numbers, leave_one_out=leave_one_out)
    with pytest.raises(TypeError, match="alphas_cumprod is a masked array"):
        processes.DDPM(numbers)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_files_of_such_arrays(tmp_path, order, suffix) -> None:
    array, path = ORDERS[order](PLAIN), tmp_path / f"a{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, array)
    assert np.array_equal(TrainingSet(path)[:].numpy(), array)
    files.write_npz(tmp_path / "b.npz", rows=array)
    assert np.array_equal(files.read_array(tmp_path / "b.npz"), array)


TEXTS = ["smoothing:h=0.1,samples=4", "bank:h=0.1", "tikhonov:c=0.1", "temperature:sigma_c=0.5"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_default_device_elsewhere_changes_no_regulariser(text) -> None:
    """meta stands for an accelerator: nothing on it can be mixed with what is on the CPU."""
    x = torch.randn(2, 3, 8, 8)
    denoiser = Denoiser(TrainingSet(PLAIN), regularizer=regularizers.parse(text))
    expected = denoiser(x, 0.3)
    with torch.device("meta"):
        assert torch.equal(denoiser(x, 0.3), expected)


@pytest.mark.parametrize("basis", ["dct", "pca"])
def test_a_default_device_elsewhere_changes_no_index(basis) -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = TrainingSet(PLAIN).build_index(basis)
    with torch.device("meta"):
        made = TrainingSet(PLAIN).build_index(basis)
        assert torch.equal(made.index.coarse, expected.index.coarse)
        found = posterior(x, made, 0.3, method="pruned").mean
        assert nearest(x, made, method="pruned").index.device.type == "cpu"
    assert torch.equal(found, posterior(x, expected, 0.3, method="pruned").mean)


def test_a_default_device_elsewhere_moves_no_data(tmp_path) -> None:
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(PLAIN), torch.arange(20))
    with torch.device("meta"):
        data = TrainingSet(dataset)
        assert data.device.type == "cpu" and data.labels.tolist() == list(range(20))
        assert len(data.where([1, 2])) == 2
        memorization.report(torch.from_numpy(PLAIN), data)
        data.save(tmp_path / "a.safetensors")
        assert torch.equal(TrainingSet(tmp_path / "a.safetensors")[:], torch.from_numpy(PLAIN))


def used(rows: torch.Tensor, network: torch.nn.Module) -> list[torch.Tensor]:
    """What samplers, likelihoods, density estimates and a trainer give."""
    data, start = TrainingSet(rows), rows[:2] + 0.5
    denoiser, vp = Denoiser(data), Denoiser(data, processes.VP())
    sampled = [
        samplers.ode(denoiser, start, steps=steps, solver=solver)
        for solver, steps in (("exponential", 3), ("heun", 3), ("rk45", None))
    ]
    sampled.append(samplers.sde(vp, 2, steps=3, seed=0))
    model = LearnedDenoiser(copy.deepcopy(network), processes.VP(), output="eps")
    trainer = Trainer(model, losses.Denoising(), data, batch_size=4)
    trainer.fit(2)
    found = [s.x for s in sampled] + [s.times for s in sampled] + [s.sigmas for s in sampled]
    return [
        *found,
        log_likelihood(vp, start, sigma_min=0.5, rtol=1e-3, atol=1e-3).log_density,
        kde.log_density(rows, data, 0.5, leave_one_out=True),
        torch.tensor([denoiser.sigma_max, trainer.loss_of(data)], device="cpu"),
        *trainer.result().parameters(),
    ]


def test_a_default_device_elsewhere_changes_no_use_of_data() -> None:
    rows = torch.from_numpy(PLAIN).flatten(1)[:7, :3].contiguous()
    network = MLP((3,), width=4)
    expected = used(rows, network)
    with torch.device("meta"):
        got = used(rows, network)
    assert all(map(torch.equal, got, expected))
