"""What it learns, that it resumes to the bit, when it stops. The network as a denoiser."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import nn

from memokern import Denoiser, TrainingSet, processes, samplers
from memokern.likelihood import log_likelihood
from memokern.training import (
    MLP,
    EarlyStopping,
    History,
    LearnedDenoiser,
    Trainer,
    UNet,
    checkpoint,
    losses,
    memorised,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n: int = 6, dim: int = 2) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def model(process="vp", output="eps", width=32, **more) -> LearnedDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = more.pop("network", None) or MLP((2,), width=width)
    return LearnedDenoiser(network, processes.get(process), output=output, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_learns_the_score_of_the_rows():
    """Regression on the closed form comes near it; the loss falls."""
    teacher = Denoiser(rows(), processes.VP())
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    t = processes.VP().time_of_sigma(0.6)
    right = teacher.evaluate(x, t).x0
    trainer = Trainer(model(), losses.Regression(teacher), rows(), batch_size=64, lr=1e-2, ema=0.9)
    history = trainer.fit(90, every=30)
    got = trainer.result().evaluate(x, t).x0
    assert (got - right).square().mean() < 0.15 * right.var()
    assert history.column("step") == [30, 60, 90]
    assert history.column("loss")[-1] < history.column("loss")[0]


class Dropped(nn.Module):
    """Draws numbers of its own, and keeps a count in a buffer."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, c):
        self.calls += self.training
        return self.layers(torch.cat([x, c[:, None]], 1))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_run_that_was_interrupted_gives_the_same_bits(kind, tmp_path):
    def make():
        return Trainer(
            model(network=Dropped()), losses.Denoising(reference=TrainingSet(rows()), size=4),
            rows(), batch_size=4, held_out=rows(3), seed=5,
            stop=EarlyStopping("held_out", patience=50),
            metrics={"size": lambda m: float(m.network.layers[0].weight.norm())},
            optimizer=None if kind == "adam" else lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        )  # fmt: skip

    torch.manual_seed(0)
    whole = make()
    whole.fit(30, every=7)
    path = tmp_path / "run.safetensors"
    torch.manual_seed(0)
    first = make()
    first.fit(14, every=7, save=path)
    torch.manual_seed(99)  # what the interrupted process had does not matter
    second = make().load(path)
    assert second.step == 14 and len(second.history.rows) == 2
    second.fit(30, every=7)
    assert second.history.rows == whole.history.rows
    assert same(second.model, whole.model) and same(second.averaged, whole.averaged)
    assert same(second.result(), whole.result())
    assert second.model.network.calls == 30
    again = tmp_path / "again.safetensors"
    second.save(again)
    whole.save(path)
    (mine, numbers), (theirs, others) = checkpoint.read(path), checkpoint.read(again)
    assert numbers == others and mine.keys() == theirs.keys()
    for part, group in mine.items():
        assert all(torch.equal(value, theirs[part][name]) for name, value in group.items()), part


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Trainer(model(), losses.Denoising(), rows()).fit(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_take_every_row_once_per_pass():
    seen = []

    class Watched(losses.Denoising):
        def at(self, model, y, noise, t, label=None, reference=None):
            seen.append(y)
            return super().at(model, y, noise, t, label, reference)

    data = TrainingSet(torch.arange(10.0)[:, None].expand(10, 2))
    Trainer(model(), Watched(), data, batch_size=4).fit(5)
    taken = torch.cat(seen)[:, 0].tolist()
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))


def test_the_average_follows_the_weights():
    trainer = Trainer(model(), losses.Denoising(), rows(), ema=0.99)
    p, total = trainer.model.network.layers[0].weight, None
    total = p.detach().clone()
    for step in range(1, 6):
        trainer.fit(step)
        total.lerp_(p.detach(), 1 - min(0.99, (1 + step) / (10 + step)))
    torch.testing.assert_close(trainer.averaged.network.layers[0].weight, total)
    off = Trainer(model(), losses.Denoising(), rows(), ema=0.0)
    off.fit(3)
    assert same(off.averaged, off.model)


def test_early_stopping_keeps_the_best():
    values = iter([0.0, 0.05, 0.2, 0.9])
    stop = EarlyStopping("copies", above=0.1)
    metrics = {"copies": lambda m: next(values)}
    trainer = Trainer(model(), losses.Denoising(), rows(), metrics=metrics, stop=stop, ema=0.0)
    kept = []
    trainer.metrics["norm"] = lambda m: kept.append(m.network.layers[0].weight.clone()) or 0.0
    history = trainer.fit(100, every=5)
    assert trainer.stopped and trainer.step == 15
    assert history.column("copies") == [0.0, 0.05, 0.2]
    assert torch.equal(trainer.result().network.layers[0].weight, kept[1])
    assert trainer.fit(100, every=5).rows == history.rows  # it stays stopped
    assert EarlyStopping("a", patience=1).after([1.0, math.nan]) == (0, True)
    for wrong in ({}, {"patience": 1, "above": 0.1}):
        with pytest.raises(ValueError, match="either patience or above"):
            EarlyStopping("a", **wrong)


def test_history_is_written_as_csv(tmp_path):
    history = History([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "memorised": 1.0}])
    history.write_csv(tmp_path / "h.csv")
    table = list(csv.DictReader((tmp_path / "h.csv").read_text().splitlines()))
    assert table == [{"step": "1", "loss": "0.5", "memorised": ""},
                     {"step": "2", "loss": "0.25", "memorised": "1.0"}]  # fmt: skip
    with pytest.raises(KeyError, match="there are step, loss, memorised"):
        history.column("other")


# --- the network in the place of a denoiser -----------------------------------------------------


class Closed(nn.Module):
    """A "network" that gives the closed-form denoiser's answer in one of the outputs."""

    shape = (2,)

    def __init__(self, teacher, output):
        super().__init__()
        self.teacher, self.output = teacher, output
        self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seen = None

    def forward(self, x, c):
        found, process = self.seen, self.teacher.process
        if self.output == "velocity":
            return found.velocity(process.d_alpha(self.t), process.d_sigma(self.t))
        if self.output == "edm":
            ratio = (found.sigma / found.alpha)[:, None]
            skip = 0.25 / (ratio**2 + 0.25)
            gain = ratio * 0.5 / (ratio**2 + 0.25).sqrt()
            return (found.x0 - skip * found.x / found.alpha[:, None]) / gain
        return getattr(found, self.output)


class Fed(LearnedDenoiser):
    """Gives the stand-in network the x and t that networks see only scaled."""

    def evaluate(self, x, t, label=None, **more):
        flat = x.reshape(-1, 2)
        self.network.t = torch.as_tensor(t, dtype=torch.float64).expand(len(flat))
        self.network.seen = self.network.teacher.evaluate(flat, self.network.t)
        return super().evaluate(x, t, label, **more)


OUTPUTS = ["x0", "eps", "v", "score", "velocity", "edm"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow-matching"])
def test_every_output_means_the_same_to_the_samplers(output, name):
    process = processes.get(name)
    teacher = Denoiser(rows().double(), process)
    if name == "flow-matching" and output in ("eps", "score", "edm"):
        with pytest.raises(ValueError, match="alpha is 0 where"):
            Fed(Closed(teacher, output), process, output=output)
        return
    learned = Fed(Closed(teacher, output), process, output=output)
    x, t = rows(4).double(), process.time_of_sigma(torch.tensor([0.01, 0.2, 0.5, 0.7]).double())
    for what in ("x0", "eps", "score", "v", "velocity"):
        learned.prediction = teacher.prediction = what
        torch.testing.assert_close(learned(x, t), teacher(x, t), rtol=1e-6, atol=1e-6)
    for solver in ("euler", "heun"):
        got, right = (samplers.ode(d, 4, 8, solver=solver, seed=0).x for d in (learned, teacher))
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    got, right = (samplers.sde(d, 4, 8, seed=0).x for d in (learned, teacher))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_a_network_differentiate_it():
    process = processes.VP()
    teacher = Denoiser(rows().double(), process)
    learned = Fed(Closed(teacher, "eps"), process, output="eps")
    x = rows(3).double()
    got, right = (log_likelihood(d, x, sigma_min=0.4, rtol=1e-5) for d in (learned, teacher))
    torch.testing.assert_close(got.log_density, right.log_density, rtol=0, atol=1e-3)
    assert got.spacing == 1.0
    with pytest.raises(ValueError, match="use 'prior'"):
        log_likelihood(learned, x, terminal="mixture")


def test_edm_scripts_find_what_they_read():
    unet = UNet((3, 16, 16), width=4, levels=2, classes=5)
    nn.init.normal_(unet.middle.second.weight)  # 0 at first: blocks begin as their shortcuts
    learned = LearnedDenoiser(unet)
    assert (learned.img_channels, learned.img_resolution, learned.label_dim) == (3, 16, 5)
    assert (learned.sigma_min, learned.sigma_max) == (0.002, 80.0)
    x = torch.randn(2, 3, 16, 16)
    one_hot = torch.eye(5)[[3, 1]]
    out = learned(x, torch.tensor([1.0, 2.0])[:, None, None, None], one_hot)
    torch.testing.assert_close(out, learned(x, torch.tensor([1.0, 2.0]), torch.tensor([3, 1])))
    assert not torch.equal(out, learned(x, torch.tensor([1.0, 2.0])))
    assert (
        learned(x.half(), 1.0).dtype == torch.float16
        and learned(x.double(), 1.0).dtype == torch.float64
    )


@pytest.mark.parametrize("shape", [(8, 8), (3, 16, 8)])
@pytest.mark.parametrize("patch", [1, 2])
def test_unets_take_images(shape, patch):
    network = UNet(shape, width=4, levels=2, patch=patch)
    x = torch.randn(2, *shape)
    out = network(x, torch.tensor([0.1, 0.2]))
    assert out.shape == x.shape
    (grad,) = torch.autograd.grad(out.square().sum(), network.enter.weight)
    assert grad.abs().sum() > 0
    alone = network(x[1:], torch.tensor([0.2]))
    torch.testing.assert_close(out[1:], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"patch \* 2\^\(levels - 1\) divides"):
        UNet((8, 10), levels=3)


@pytest.mark.parametrize("network", [MLP((2,), width=8, depth=3, classes=4), UNet((8, 8), width=4)])
def test_saved_networks_are_made_again(network, tmp_path):
    learned = LearnedDenoiser(network, processes.VP(), output="v", prediction="eps", sigma_data=0.7)
    path = tmp_path / "network.safetensors"
    learned.save(path)
    again = LearnedDenoiser.load(path)
    x = torch.randn(3, *learned.shape)
    assert torch.equal(again(x, 0.4), learned(x, 0.4)) and repr(again) == repr(learned)
    other = LearnedDenoiser(network, processes.VP(0.1, 5.0))
    other.save(path)
    with pytest.raises(ValueError, match="give process="):
        LearnedDenoiser.load(path)
    assert repr(LearnedDenoiser.load(path, process=processes.VP(0.1, 5.0)).process) == repr(
        other.process
    )
    LearnedDenoiser(Dropped(), output="x0").save(path)
    with pytest.raises(ValueError, match="give network="):
        LearnedDenoiser.load(path)
    assert LearnedDenoiser.load(path, network=Dropped()).shape == (2,)
    TrainingSet.digits().save(path)
    with pytest.raises(ValueError, match=r"was not written by LearnedDenoiser.save"):
        LearnedDenoiser.load(path)
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        Trainer(model(), losses.Denoising(), rows()).load(path)


def test_memorised_fraction_of_a_closed_form():
    """The metric on something that copies: the closed form itself, as a network would be."""
    data = TrainingSet(rows())
    assert memorised(data, 16)(Denoiser(data)) == 1.0
    assert memorised(data, 4, sampler=lambda m: rows(4) + 5)(Denoiser(data)) == 0.0


def test_labels_reach_the_network():
    data = TrainingSet(rows(), labels=[0, 1, 2, 0, 1, 2])
    network = MLP((2,), width=16, classes=3)
    trainer = Trainer(
        LearnedDenoiser(network, processes.VP(), output="eps"), losses.Denoising(), data
    )
    trainer.fit(5)
    found = trainer.result()
    x = rows(3)
    assert not torch.equal(found(x, 0.5, 0), found(x, 0.5, 1))
    with pytest.raises(ValueError, match="labels below 3"):
        found(x, 0.5, 7)


def test_wrong_arguments():
    good = model()
    with pytest.raises(TypeError, match="expected model as a LearnedDenoiser"):
        Trainer(MLP((2,)), losses.Denoising(), rows())
    with pytest.raises(ValueError, match=r"takes rows \[2\], the data are \[3\]"):
        Trainer(good, losses.Denoising(), rows(4, 3))
    with pytest.raises(ValueError, match=r"expected stop.monitor one of held_out"):
        Trainer(good, losses.Denoising(), rows(), held_out=rows(),
                stop=EarlyStopping("copies", patience=1))  # fmt: skip
    with pytest.raises(ValueError, match="no bias and no certificate"):
        samplers.ode(good, 2, 3, watch=print)
    with pytest.raises(ValueError, match="give shape="):
        LearnedDenoiser(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a memokern.Denoiser, or a network"):
        samplers.ode(nn.Linear(2, 2), 2)
    with pytest.raises(RuntimeError, match="the loss is nan at step 1: a smaller lr"):
        broken = losses.Denoising(weight=lambda sigma, alpha: sigma * math.nan)
        Trainer(good, broken, rows()).fit(3, every=1)
