"""What a training set keeps of its rows: copies of it work, changed rows are never taken for the
old ones, and inference mode leaves nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from memokern import Denoiser, TrainingSet, nearest, posterior

pytestmark = pytest.mark.usefixtures("one_thread")


def images(n: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def answer(data: TrainingSet, method: str = "auto") -> list[torch.Tensor]:
    found = posterior(images(4, 5), data, 0.3, method=method)
    return [found.mean, found.log_z, nearest(images(4, 5), data).distance]


def saved(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
    "spawn": lambda value: pickle.loads(bytes(ForkingPickler.dumps(value))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("basis", ["dct", "pca", None])
def test_a_used_set_can_be_copied(how, basis) -> None:
    data = TrainingSet(images(), labels=torch.arange(60) % 3)
    if basis is not None:
        data.build_index(basis)
    expected = answer(data)
    part = data.where(1)
    expected_part = answer(part)
    for original, wanted in ((data, expected), (part, expected_part)):
        made = COPIES[how](original)
        assert (made.index is None) == (basis is None)
        for method in ["dense"] + ["pruned"] * (basis is not None):
            for a, b in zip(answer(made, method), wanted, strict=True):
                torch.testing.assert_close(a, b)
    denoiser = Denoiser(data, method="auto")
    x = images(4, 5)
    wanted = [denoiser(x, 0.3), denoiser(x, 0.3, 1)]
    made = COPIES[how](denoiser)
    torch.testing.assert_close([made(x, 0.3), made(x, 0.3, 1)], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
@pytest.mark.parametrize("change", ["written", "slice", "base", "replaced"])
def test_changed_rows_are_new_rows(dtype, change) -> None:
    old, new = (images(seed=s).mul(40).add(100).clamp(0, 255).to(dtype) for s in (0, 1))
    rows = old.clone()
    data = TrainingSet(rows, scale=0.02, shift=-2.0)
    answer(data)
    if change == "written":
        data.rows.copy_(new.flatten(1))
    elif change == "slice":
        data.rows[:].copy_(new.flatten(1))
    elif change == "base":
        rows.copy_(new)
    else:
        data.rows = new.flatten(1)
    fresh = TrainingSet(new, scale=0.02, shift=-2.0)
    for a, b in zip(answer(data), answer(fresh), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(data.center, fresh.center) and torch.equal(data.sq_norms, fresh.sq_norms)


def test_an_index_of_changed_rows_is_an_error(tmp_path) -> None:
    rows = images()
    data = TrainingSet(rows).build_index(dims=(16, 64))
    made = copy.deepcopy(data)
    answer(data)
    rows[3] += 1
    for use in (
        lambda: answer(data),
        lambda: data.index,
        lambda: data.sq_norms,
        lambda: data.save(tmp_path / "a.safetensors"),
        lambda: data.subset([1, 2]),
        lambda: data.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"rows changed after the index.*build_index\(\) anew"):
            use()
    repr(data)
    assert made.index is not None  # a copy has rows of its own
    made.rows[3] += 1
    with pytest.raises(ValueError, match="rows changed"):
        answer(made)
    data.build_index(dims=(16, 64))
    torch.testing.assert_close(answer(data, "pruned"), answer(TrainingSet(rows), "dense"))


def test_a_denoiser_follows_its_buffers() -> None:
    old, new, x = images(), images(seed=1), images(4, 5)
    labels = torch.arange(60) % 3
    expected = Denoiser(TrainingSet(new, labels=labels))
    wanted = [expected(x, 0.3), expected(x, 0.3, 1)]

    def both(denoiser: Denoiser) -> list[torch.Tensor]:
        return [denoiser(x, 0.3), denoiser(x, 0.3, 1)]

    replaced = Denoiser(TrainingSet(old, labels=labels))
    before = both(replaced)
    replaced.rows = new
    assert all(map(torch.equal, both(replaced), wanted))
    written = Denoiser(TrainingSet(old.clone(), labels=labels))
    both(written)
    written.rows.copy_(new)
    assert all(map(torch.equal, both(written), wanted))
    called = Denoiser(TrainingSet(old, labels=labels))
    both(called)
    given = {"rows": new}
    found = [torch.func.functional_call(called, given, (x, 0.3, *more)) for more in ((), (1,))]
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, both(called), before))
    # Labels, weights and scale too.
    other = (labels + 1) % 3
    changed = Denoiser(TrainingSet(old, labels=labels.clone()))
    both(changed)
    changed.labels.copy_(other)
    fresh = Denoiser(TrainingSet(old, labels=other))
    assert all(map(torch.equal, both(changed), both(fresh)))
    changed.affine.mul_(2)
    assert torch.equal(changed(x, 0.3), Denoiser(TrainingSet(old, scale=2.0))(x, 0.3))


def test_a_replica_has_its_own_data() -> None:
    """As torch.nn.DataParallel makes them: other buffers in a shallow copy."""
    denoiser = Denoiser(TrainingSet(images()))
    x = images(4, 5)
    denoiser(x, 0.3)
    replica = denoiser._replicate_for_data_parallel()
    for name, value in denoiser._buffers.items():
        copied = None if value is None else value.clone()
        replica._buffers[name] = copied
    assert torch.equal(replica(x, 0.3), denoiser(x, 0.3))
    assert replica.data.rows.data_ptr() == replica.rows.data_ptr() != denoiser.rows.data_ptr()
    assert denoiser.data.rows.data_ptr() == denoiser.rows.data_ptr()


@pytest.mark.parametrize("inside", ["use", "set and use", "rows"])
@pytest.mark.parametrize("index", [False, True])
def test_inference_mode_first_breaks_no_training(inside, index) -> None:
    x, labels = images(4, 5), torch.arange(60) % 3

    def fill(denoiser: Denoiser) -> None:
        if index and denoiser.data.index is None:
            denoiser.data.build_index(dims=(16, 64))
        for label in (None, 1, torch.tensor([0, 1, 2, 1])):
            denoiser(x, 0.3, label)
        nearest(x, denoiser.data)

    rows = images()
    if inside == "use":
        denoiser = Denoiser(TrainingSet(rows, labels=labels))
        with torch.inference_mode():
            fill(denoiser)
    else:
        with torch.inference_mode():
            given = rows.clone() if inside == "rows" else rows
            held = labels.clone() if inside == "rows" else labels
            denoiser = Denoiser(TrainingSet(given, labels=held))
            fill(denoiser)
    fresh = Denoiser(TrainingSet(rows, labels=labels))
    for label in (None, 1, torch.tensor([0, 1, 2, 1])):
        grads = []
        for model in (denoiser, fresh):
            q = x.clone().requires_grad_()
            model(q, 0.3, label).square().sum().backward()
            grads.append(q.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch.func.jvp(lambda q: denoiser(q, 0.3), (x,), (torch.ones_like(x),))
