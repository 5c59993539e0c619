"""
Early stopping
==============

A network learns first what many rows share and then the rows themselves. We watch a small one on
six points of the plane, and stop it before it copies.
"""

# %%
# The metric samples the network every so often and counts samples within 0.1 of a row.

import matplotlib.pyplot as plt
import torch

from memokern import memorization, processes, samplers
from memokern.training import MLP, LearnedDenoiser, Trainer, losses, memorised

angle = torch.arange(6) * 2 * torch.pi / 6
torch.set_num_threads(1)  # such small networks gain nothing from more
rows = torch.stack([angle.cos(), angle.sin()], dim=1)  # six points of the unit circle


def near(samples, data):
    return memorization.collapse(samples, data, tol=0.1)


def train(steps):
    torch.manual_seed(0)  # the weights that the network starts with
    network = MLP((2,), width=128)
    model = LearnedDenoiser(network, processes.VP(), output="eps", sigma_data=0.7)
    trainer = Trainer(
        model,
        losses.Denoising("eps"),
        rows,
        batch_size=128,
        lr=3e-3,
        metrics={"memorised": memorised(rows, 128, criterion=near, steps=10)},
    )
    return trainer, trainer.fit(steps, every=100)


trainer, history = train(1500)
step, fraction = history.column("step"), history.column("memorised")
stop = history.first_step("memorised", 0.5)
print(f"half of the samples are copies from step {stop}; at the end {fraction[-1]:.0%}")

# %%
# The same run again, stopped early: ``EarlyStopping("memorised", above=0.5)`` does this by itself.

early, _ = train(200)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.1), layout="constrained")
left.plot(step, fraction, marker="o", markersize=3)
left.set(xlabel="step", ylabel="copies", ylim=(-0.03, 1.03), title="memorised fraction")
for axis, run in ((middle, early), (right, trainer)):
    x = samplers.ode(run.result(), 400, seed=1).x
    axis.scatter(*x.numpy().T, s=4, alpha=0.5)
    axis.scatter(*rows.numpy().T, s=26, c="white", edgecolors="black")
    axis.set(title=f"after {run.step} steps", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
plt.show()
