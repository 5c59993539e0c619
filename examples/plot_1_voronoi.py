"""
The plane and its Voronoi cells
===============================

Fifteen points in the plane are a training set that can be seen whole. As the noise falls, the score
of their mixture pulls each place to its nearest point: the cells of the Voronoi diagram.
"""

# %%
# The weights say which row each place would be denoised to. We colour a place by the row with the
# most weight, the paler the more rows share.

import matplotlib.pyplot as plt
import torch

import memokern
from memokern import Denoiser, samplers

rows = torch.rand(15, 2, generator=torch.Generator().manual_seed(4)) * 3 - 1.5
line = torch.linspace(-2, 2, 160)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # [160, 160, 2]
colours = plt.get_cmap("tab20")((torch.arange(15) / 14).numpy())[:, :3]

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", sharey=True)
for axis, sigma in zip(axes, (0.6, 0.25, 0.05), strict=True):
    w = memokern.weights(plane, rows, sigma).float()  # [160, 160, 15]
    axis.imshow((w.numpy() @ colours).clip(0, 1), extent=(-2, 2, -2, 2), origin="lower")
    coarse = plane[8::16, 8::16]
    s = memokern.score(coarse, rows, sigma)
    s = s / s.norm(dim=-1, keepdim=True)
    axis.quiver(*coarse.numpy().T, *s.numpy().T, color="0.25", width=0.005)
    axis.scatter(*rows.numpy().T, s=18, c="white", edgecolors="black", zorder=3)
    axis.set(title=f"sigma = {sigma}", xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[])

# %%
# Sampling follows that field from noise to data. Every path ends on a training point: the model
# that minimises the training loss exactly can do nothing but copy.

found = samplers.ode(Denoiser(rows), 60, steps=40, seed=0, trajectory=True)
distance, _ = memokern.nearest(found.x, rows)
print(f"largest distance of an end to a training point: {distance.max().item():.1e}")

figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
for path in found.trajectory.transpose(0, 1).numpy():
    axis.plot(*path.T, color="tab:blue", linewidth=0.6, alpha=0.6)
axis.scatter(*rows.numpy().T, s=22, c="white", edgecolors="black", zorder=3)
axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], title="60 samples, from noise to data")
plt.show()
