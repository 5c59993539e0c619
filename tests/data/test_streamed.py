"""Rows that are read chunk by chunk give what rows in memory do."""

from __future__ import annotations

import copy
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import memokern
from memokern import Denoiser, StreamedSet, TrainingSet, memorization
from memokern.calls import Rows
from memokern.index import build as index_build
from memokern.index import unfinished
from memokern.index.basis import Cosine
from memokern.index.build import Source, build
from memokern.strategies import streamed
from memokern.util.mapped import is_file
from tests.distributed import programs
from tests.resident import forget_file, pages_in_memory
from tools import stream_file

ROW = 5 * 4


def sources(tmp_path, rows):
    path = tmp_path / "rows.npy"
    np.save(path, rows.numpy())
    return {
        "file": str(path),
        "list": list(rows.split(4)),
        "function": lambda: iter(rows.split(11)),
        "loader": DataLoader(TensorDataset(rows), batch_size=3),
    }


@pytest.mark.parametrize("source", ["file", "list", "function", "loader"])
@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.one_of(2)
def test_answers(tmp_path, source, size):
    rows, x = programs.problem()
    data = StreamedSet(sources(tmp_path, rows)[source], chunk_bytes=size * ROW)
    for sigma in (0.0, 0.4, 20.0):
        found, expected = (memokern.posterior(x, d, sigma) for d in (data, TrainingSet(rows)))
        for name, value in programs.numbers(expected).items():
            torch.testing.assert_close(
                programs.numbers(found)[name], value, rtol=1e-5, atol=1e-5, equal_nan=True
            )
    found, expected = (memokern.nearest(x, d, 20) for d in (data, rows))
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.distance, expected.distance)
    assert torch.equal(data.gather(torch.tensor([[3, 36]])), rows[[3, 36]][None])
    draws = [
        memokern.draw(x, d, 1.0, generator=torch.Generator().manual_seed(4)) for d in (data, rows)
    ]
    assert torch.equal(*draws)
    torch.testing.assert_close(
        memokern.row_weights(x, data, 1.0), memokern.row_weights(x, rows, 1.0)
    )
    torch.testing.assert_close(Denoiser(data)(x, 0.5), Denoiser(rows)(x, 0.5))
    torch.testing.assert_close(
        memorization.merged_ratio(x, data, 0.5, k=9).value,
        memorization.merged_ratio(x, rows, 0.5, k=9).value,
    )


def test_what_belongs_to_rows():
    whole = programs.labelled("one")
    assert whole.log_weights is not None
    data = StreamedSet(whole, chunk_bytes=64 * 50)
    x = whole[4:8] + 0.2
    for asked in (
        {"label": torch.tensor([3, 4, -1, 4])},
        {"leave_out": torch.tensor([4, 5, 100, -1])},
        {"condition": torch.tensor([0.1, 2.0]), "bandwidth": torch.tensor([0.5, 1, 2, 0.3])},
    ):
        found, expected = (memokern.posterior(x, d, 0.6, **asked) for d in (data, whole))
        for name, value in programs.numbers(expected).items():
            torch.testing.assert_close(programs.numbers(found)[name], value, rtol=1e-5, atol=1e-5)


def test_gradients():
    rows, x = programs.problem(b=4, kind=torch.float64)
    x[2] /= 20
    c = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(0))
    whole = TrainingSet(rows, conditions=c)
    found = []
    for data in (whole, StreamedSet(whole, chunk_bytes=8 * 5 * 9)):
        given = [x, *(torch.full((4,), v, dtype=torch.float64) for v in (0.8, 0.9, 1.3, 0.7))]
        given += [torch.linspace(-1, 1, len(rows), dtype=torch.float64), c[:4].double() + 0.1]
        y, s, a, t, h, bias, condition = (v.clone().requires_grad_() for v in given)
        p = memokern.posterior(y, data, s, a, t, bias=bias, condition=condition, bandwidth=h)
        loss = p.mean.sin().sum() + p.log_density.sum() + p.entropy.sum() + p.weight_sq.sum()
        loss = loss + memokern.nearest(y, data, 3).distance.sum()
        found.append(torch.autograd.grad(loss, [y, s, a, t, bias, condition, h]))
    for mine, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_an_index_reads_rows_that_matter(tmp_path, monkeypatch):
    digits = TrainingSet.digits()
    np.save(tmp_path / "digits.npy", digits.rows.reshape(-1, 8, 8).numpy())
    data = StreamedSet(
        tmp_path / "digits.npy", chunk_bytes=1 << 12, scale=digits.scale, shift=digits.shift
    ).build_index()
    x = digits[::40] + 0.03
    sigma = torch.full((len(x),), 0.1, dtype=torch.float64)
    passes = []
    chunks = StreamedSet.raw_chunks
    data.raw_chunks = lambda *a: passes.append(1) or chunks(data, *a)  # type: ignore[method-assign]
    found = memokern.posterior(x, data, sigma, method="pruned")
    want = memokern.nearest(x, digits, 2)
    # Queries that together would read more of the file here and there go through it once.
    for most, count in ((float("inf"), 0), (0.0, 1)):
        monkeypatch.setattr(streamed, "MOST_READ", most)
        near = memokern.nearest(x, data, 2, method="pruned")
        assert len(passes) == count
        assert torch.equal(near.index, want.index) and torch.equal(near.distance, want.distance)
    expected = memokern.posterior(x, digits, sigma)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    sigma[3], sigma[5] = 0.0, 30.0
    found, expected = (memokern.posterior(x, d, sigma) for d in (data, digits))
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_z, expected.log_z)


@pytest.mark.parametrize("source", ["file", "list"])
def test_a_row_that_is_no_number_is_named(tmp_path, source):
    rows, _ = programs.problem()
    rows[30, 2] = torch.nan
    with pytest.raises(ValueError, match="in row 30"):
        _ = StreamedSet(sources(tmp_path, rows)[source], chunk_bytes=7 * ROW).center


@pytest.mark.parametrize("kept", [0, 1 << 28])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_a_query_at_small_noise_reads_the_pages_of_few_rows(tmp_path, monkeypatch, kind, kept):
    """Pages, as the disk gives them, and not what the system would read around each. kept: bytes of
    listed rows that are copied."""
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    pixels = stream_file.images(4000, 16, torch.Generator().manual_seed(0))
    rows = pixels if kind == torch.uint8 else pixels / 127.5 - 1
    path = tmp_path / "rows.npy"
    np.save(path, rows.numpy())
    data = StreamedSet(path).build_index()
    mapped = data.file("a test").rows
    picked = torch.tensor([5, 1234, 3999])
    x = data.gather(picked) + 0.02 * torch.randn(3, 3, 16, 16)
    memokern.posterior(x, data, 0.1, method="pruned")  # whatever is measured once
    calls = {
        "posterior": lambda: memokern.posterior(x, data, 0.1, method="pruned").mean,
        "gradient": lambda: torch.autograd.grad(
            memokern.posterior(x.requires_grad_(), data, 0.1, method="pruned").mean.sum(), x
        ),
        "nearest": lambda: memokern.nearest(x.detach(), data, 1, method="pruned"),
        "rows": lambda: data[picked],
    }
    for name, call in calls.items():
        forget_file(path, mapped)
        call()
        # The rows kept, and for each query those that are evaluated on the way; on two pages at
        # most. Around one page the system would read 32 (its default).
        read = pages_in_memory(mapped)
        assert len(picked) <= read <= len(picked) * 16 * 2, name


@pytest.mark.parametrize("source", ["file", "chunks"])
@pytest.mark.parametrize("basis", ["dct", "pca"])
def test_an_index_is_that_of_rows_in_memory(tmp_path, source, basis):
    digits = TrainingSet.digits()
    images = digits.rows.reshape(-1, 8, 8)
    np.save(tmp_path / "digits.npy", images.numpy())
    given = {"scale": digits.scale, "shift": digits.shift, "labels": digits.labels}
    made = str(tmp_path / "digits.npy") if source == "file" else lambda: iter(images.split(100))
    data = StreamedSet(made, chunk_bytes=64 * 300, **given).build_index(basis)
    # The center and the norms are its own; from these on everything is the same, to the bit.
    rows = Rows(digits.rows, digits.scale, digits.shift, data.center64, data.sq_norms)
    plain = build(Source.of(rows), data.center, (8, 8), basis=basis)
    assert same_index(data.index, plain)
    data.save(tmp_path / "saved.safetensors")
    for again in (
        TrainingSet.load(tmp_path / "saved.safetensors"),
        StreamedSet(tmp_path / "saved.safetensors", chunk_bytes=64 * 300),
    ):
        assert same_index(again.index, plain) and torch.equal(again.labels, digits.labels)
        assert torch.equal(again.sq_norms, data.sq_norms)
        x = digits[::40] + 0.03
        for method in ("pruned", "auto"):
            found = memokern.posterior(x, again, 0.3, method=method, certificate=True)
            expected = memokern.posterior(x, digits, 0.3)
            torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
            assert bool((found.certificate.weight < 1e-6).all())


def test_a_pruned_query_of_chunks_reads_them_once():
    digits = TrainingSet.digits()
    reads = []

    def chunks():
        reads.append(1)
        return iter(digits.rows.reshape(-1, 8, 8).split(100))

    given = {"scale": digits.scale, "shift": digits.shift, "log_weights": torch.arange(1797) / 1e3}
    data = StreamedSet(chunks, chunk_bytes=64 * 300, **given).build_index()
    reads.clear()
    x = (digits[::40] + 0.03).requires_grad_()
    sigma = torch.linspace(0.05, 0.4, len(x), dtype=torch.float64)
    sigma[3], sigma[4] = 0.0, 30.0
    found = memokern.posterior(x, data, sigma, method="pruned")
    assert len(reads) <= 3  # those that are listed, and those that have to be swept
    whole = TrainingSet(digits.rows.reshape(-1, 8, 8), **given)
    expected = memokern.posterior(x, whole, sigma)
    for name, value in programs.numbers(expected).items():
        torch.testing.assert_close(
            programs.numbers(found)[name], value, rtol=1e-4, atol=1e-4, equal_nan=True
        )
    gradients = [torch.autograd.grad(p.mean[5:].sin().sum(), x)[0] for p in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        memokern.nearest(x, data, 2, method="pruned").index, memokern.nearest(x, whole, 2).index
    )


def same_index(one, other):
    names = ("dims", "edges", "y_max", "row_error", "fingerprint", "basis")
    return all(getattr(one, v) == getattr(other, v) for v in names) and all(
        torch.equal(getattr(one, v), getattr(other, v)) for v in ("coarse", "fine", "center")
    )


@pytest.mark.parametrize("source", ["memory", "file", "chunks"])
def test_a_build_that_was_stopped_goes_on(tmp_path, monkeypatch, source):
    monkeypatch.setattr(index_build, "CHUNK_ELEMENTS", 64 * 50)
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    digits = TrainingSet.digits()
    images = digits.rows.reshape(-1, 8, 8)
    np.save(tmp_path / "digits.npy", images.numpy())

    def made():
        given = {"scale": digits.scale, "shift": digits.shift}
        if source == "memory":
            return TrainingSet(images, **given)
        if source == "file":
            return StreamedSet(tmp_path / "digits.npy", chunk_bytes=64 * 300, **given)
        return StreamedSet(lambda: iter(images.split(70)), chunk_bytes=64 * 300, **given)

    expected = made().build_index().index
    projected = []
    coordinates = Cosine.coordinates

    def counted(self, rows, limit=None):
        projected.append(len(rows))
        if limit is not None and len(projected) > limit:
            raise KeyboardInterrupt
        return coordinates(self, rows)

    folder = tmp_path / "kept"
    monkeypatch.setattr(Cosine, "coordinates", lambda self, rows: counted(self, rows, 12))
    with pytest.raises(KeyboardInterrupt):
        made().build_index(resume=folder)
    projected.clear()
    monkeypatch.setattr(Cosine, "coordinates", counted)
    assert same_index(made().build_index(resume=folder).index, expected)
    assert 0 < sum(projected) < 1797 - 400  # not what was done, nor the fit
    projected.clear()
    again = made().build_index(resume=folder)
    assert same_index(again.index, expected) and not projected  # all was done
    again.save(tmp_path / "saved.safetensors")
    assert same_index(TrainingSet.load(tmp_path / "saved.safetensors").index, expected)
    with (
        unfinished.unfinished(folder, {}, {}),
        pytest.raises(RuntimeError, match="another process builds"),
    ):
        made().build_index(resume=folder)
    unfinished.remove(folder)
    assert not folder.exists()
    # Other rows, or another choice, start anew.
    made().build_index(resume=folder)
    projected.clear()
    made().build_index(resume=folder, dims=(8, 16))
    assert sum(projected) >= 1797
    images[5, 3, 3] += 1
    projected.clear()
    made().build_index(resume=folder, dims=(8, 16))
    assert source == "file" or sum(projected) >= 1797
    images[5, 3, 3] -= 1


@pytest.mark.parametrize("source", ["file", "function"])
def test_a_copy_has_the_rows_of_the_same_source(tmp_path, source):
    rows, x = programs.problem(n=4000)  # some pages of a file
    data = StreamedSet(sources(tmp_path, rows)[source], chunk_bytes=500 * ROW)
    again = copy.deepcopy(Denoiser(data)).data
    expected = memokern.posterior(x, rows, 0.5).mean
    for _ in range(2):
        torch.testing.assert_close(memokern.posterior(x, again, 0.5).mean, expected)
    assert source != "file" or again.file("a test").rows is data.file("a test").rows
    # Rows of a file that were copied to memory lie there, and stay as they are.
    some = data.subset(torch.arange(0, 4000, 2)) if source == "file" else data
    held = copy.deepcopy(some.file("a test")) if source == "file" else None
    if held is not None:
        assert not is_file(held.rows)
        before = held.rows.clone()
        memokern.posterior(x, StreamedSet(held, chunk_bytes=500 * ROW), 0.5)
        assert torch.equal(held.rows, before)


@pytest.mark.parametrize("source", ["file", "list", "function", "loader"])
def test_images_are_compared_after_thresholding(tmp_path, source):
    rows, x = programs.problem()
    data = StreamedSet(sources(tmp_path, rows)[source], chunk_bytes=7 * ROW)
    for own in (None, torch.arange(len(x))):
        found, expected = (memorization.exact_match(x, d, 0.1, own=own) for d in (data, rows))
        assert torch.equal(found.value, expected.value) and torch.equal(found.index, expected.index)


@pytest.mark.parametrize("shown", [True, False, None])
def test_a_pass_shows_how_far_it_is(capsys, shown):
    rows, x = programs.problem()
    memokern.posterior(x, StreamedSet(rows.split(4), progress=shown), 0.5)
    said = capsys.readouterr().err
    assert ("sweeping rows: " in said and "/37 " in said) if shown else not said


def test_transforms():
    rows, x = programs.problem()
    data = StreamedSet(rows.split(4))

    def mean(x):
        return memokern.posterior(x, data, 0.5).mean

    found = torch.func.vmap(mean)(x[:, None])[:, 0]
    torch.testing.assert_close(found, memokern.posterior(x, rows, 0.5).mean)
    for call in (
        lambda: torch.func.grad(lambda x: mean(x).sum())(x),
        lambda: torch.func.jvp(mean, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"no torch\.func transform but vmap"):
            call()


def test_errors(tmp_path):
    rows, x = programs.problem()
    with pytest.raises(TypeError, match="again and again"):
        StreamedSet(iter(rows.split(4)))
    with pytest.raises(ValueError, match="in row 3"):
        bad = rows.clone()
        bad[3] = torch.nan
        StreamedSet(bad.split(5))
    count = [0]

    def shrinks():
        count[0] += 1
        return iter(rows.split(4)[: 9 if count[0] <= 2 else 5])

    with pytest.raises(RuntimeError, match="there were before"):
        memokern.posterior(x, StreamedSet(shrinks), 1.0)

    def breaks():
        yield rows[:4]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        StreamedSet(breaks)
    data = StreamedSet(rows.split(4))
    bounds = memokern.posterior(x, data, 1.0, certificate=True).certificate
    assert bounds is not None and not bool(bounds.weight.any())
    assert bounds.rows_kept.tolist() == [37] * len(x)
    with pytest.raises(RuntimeError, match="file first"):
        data.subset(slice(0, 3))
    y = x.clone().requires_grad_()
    grad = torch.autograd.grad(memokern.posterior(y, data, 1.0).mean.sum(), y, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert not [t for t in threading.enumerate() if t.name == "memokern rows"]


def resident():
    """Bytes of this process's memory that are files' and its own."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * (int(lines["RssFile"].split()[0]) + int(lines["RssAnon"].split()[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (250_000, 256))
    data = StreamedSet(tmp_path / "rows.npy", chunk_bytes=1 << 20)
    x = torch.zeros(2, 256)
    memokern.posterior(x, StreamedSet(list(torch.ones(8, 1000, 256))), 5.0)  # needed once
    before, most = resident(), 0
    chunks = data.raw_chunks

    def watched(*args):
        nonlocal most
        for chunk in chunks(*args):
            most = max(most, resident())
            yield chunk

    data.raw_chunks = watched  # type: ignore[method-assign]
    memokern.posterior(x, data, 5.0)
    # What the allocator keeps differs by some tens of MB from run to run.
    assert most - before < 120e6 < data.n * data.dim * 4 / 2
