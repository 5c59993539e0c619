r"""
Where conditional samples end
=============================

A conditional model that minimises its loss exactly ends on a training row too. Which one is a
matter of probability, and the law is known: with :math:`c` the condition that was asked for,
:math:`c_n` the row's, and :math:`h` the bandwidth, row :math:`n` has

.. math:: p_n \propto \exp\left(-|c - c_n|^2 / (2 h^2)\right).
"""

# %%
# Eight rows in the plane, each with a number as its condition.

import matplotlib.pyplot as plt
import torch

import memokern
from memokern import Denoiser, Given, TrainingSet, samplers

generator = torch.Generator().manual_seed(3)
conditions = torch.linspace(0, 1, 8)
data = TrainingSet(torch.randn(8, 2, generator=generator), conditions=conditions)

figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained", sharey=True)
for axis, h in zip(axes, (0.05, 0.15, 0.5), strict=True):
    given = Given(Denoiser(data), condition=torch.tensor([0.4]), bandwidth=h)
    x = samplers.ode(given, 4000, steps=18, seed=0).x
    _, row = memokern.nearest(x, data)
    counted = torch.bincount(row[:, 0], minlength=8) / len(x)
    law = torch.softmax(-((conditions - 0.4) ** 2) / (2 * h**2), dim=0)
    axis.bar(range(8), counted.numpy(), color="tab:blue", label="4000 samples")
    axis.scatter(range(8), law.numpy(), color="black", marker="_", s=180, label="the law")
    axis.set(title=f"bandwidth {h}", xlabel="row")
    print(f"bandwidth {h}: largest difference {(counted - law).abs().max().item():.3f}")
axes[0].set_ylabel("share of the samples")
axes[2].legend()
plt.show()

# %%
# The narrower the condition, the fewer rows are left: a model that is asked for what only one row
# has returns that row.
