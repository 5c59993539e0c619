"""
Digits memorised, and cured
===========================

The 1,797 embedded digits, sampled from the same noise with the exact score, and with two of its
regularised variants.
"""

# %%
# Noise of 64 features has a length of about 80 times 8, which still varies by 9 %. Empirical Bayes
# looks at how likely x is, so all starts get that length.

import matplotlib.pyplot as plt
import torch

import memokern
from memokern import Denoiser, TrainingSet, memorization, regularizers, samplers

data = TrainingSet.digits()
noise = torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(1))
start = 80 * 8 * noise / noise.flatten(1).norm(dim=1)[:, None, None]

ways = {
    "exact score": None,
    "Tikhonov(0.03)": regularizers.Tikhonov(0.03),
    "EmpiricalBayes(-28.5)": regularizers.EmpiricalBayes(-28.5),
}
samples = {
    name: samplers.ode(Denoiser(data, regularizer=way), start, 18, solver="exponential").x
    for name, way in ways.items()
}

# %%
# Empirical Bayes stops where the density meets its floor, in the middle of the noise. What it has
# found by then is the posterior mean there.

name = "EmpiricalBayes(-28.5)"
stopped = samples[name]
levels = torch.logspace(-3, 2, 400, dtype=torch.float64)
log_z = memokern.posterior(stopped[:, None].expand(-1, 400, -1, -1), data, levels).log_z
level = levels[((log_z <= -28.5).sum(1) - 1).clamp(min=0)]
samples[name] = memokern.denoise(stopped, data, level)

# %%
# Each sample is above its nearest training image. A red frame is a copy: three times nearer to one
# image than to any other.

figure, axes = plt.subplots(
    6, 12, figsize=(9, 5.2), layout="constrained", subplot_kw={"xticks": [], "yticks": []}
)
for i, (name, x) in enumerate(samples.items()):
    found = memorization.ratio(x, data)
    print(f"{name}: {found.fraction:.0%} copies")
    for j in range(12):
        for axis, image in ((axes[2 * i, j], x[j]), (axes[2 * i + 1, j], data[found.index[j]])):
            axis.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
        for side in axes[2 * i, j].spines.values():
            side.set(color="tab:red", linewidth=2.5, visible=bool(found.memorized[j]))
    axes[2 * i, 0].set_ylabel(name.partition("(")[0], fontsize=8)
    axes[2 * i + 1, 0].set_ylabel("nearest", fontsize=8)
plt.show()

# %%
# The copying stops. New digits do not appear: these scores know nothing but the training images.
# Tikhonov ends at an image plus noise, empirical Bayes at blends. What makes a network draw new
# digits is its own regularisation, which :doc:`/auto_gallery/plot_3_early_stopping` looks at.
