"""
EDM's sampler, with our denoiser
================================

Code that was written for networks takes the closed form in their place. Here it is the
deterministic sampler of Karras et al. (arXiv 2206.00364, algorithm 1), as their repository has it.
"""

# %%
# ``net`` is what they load from a pickle. It answers ``net(x, sigma)`` with the denoised x, and
# knows ``sigma_min``, ``sigma_max`` and ``round_sigma``.

from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from memokern import TrainingSet, memorization
from memokern.integrations import EDMModel

digits = TrainingSet.digits()
data = TrainingSet(digits.rows.reshape(-1, 1, 8, 8), scale=digits.scale, shift=digits.shift)
net = EDMModel(data)


def edm_sampler(net, latents, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7):
    sigma_min = max(sigma_min, net.sigma_min)
    sigma_max = min(sigma_max, net.sigma_max)
    i = torch.arange(num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    t_steps = (high + i / (num_steps - 1) * (low - high)) ** rho
    t_steps = torch.cat([net.round_sigma(t_steps), torch.zeros_like(t_steps[:1])])

    x_next, seen = latents.to(torch.float64) * t_steps[0], []
    for i, (t_cur, t_next) in enumerate(pairwise(t_steps)):
        x_cur = x_next
        denoised = net(x_cur, t_cur).to(torch.float64)
        seen.append(denoised)
        d_cur = (x_cur - denoised) / t_cur
        x_next = x_cur + (t_next - t_cur) * d_cur
        if i < num_steps - 1:  # second-order correction
            d_prime = (x_next - net(x_next, t_next).to(torch.float64)) / t_next
            x_next = x_cur + (t_next - t_cur) * (0.5 * d_cur + 0.5 * d_prime)
    return x_next, seen, t_steps


latents = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
x, seen, levels = edm_sampler(net, latents)
print(f"{memorization.ratio(x, data).fraction:.0%} of the samples are copies")

# %%
# What the denoiser answers along the way: the mean of all digits first, then fewer and fewer of
# them, and in the end one.

shown = range(3, 18, 2)
figure, axes = plt.subplots(
    len(x),
    len(shown),
    figsize=(7, 7),
    layout="constrained",
    subplot_kw={"xticks": [], "yticks": []},
)
for column, step in enumerate(shown):
    axes[0, column].set_title(f"{levels[step]:.2g}", fontsize=8)
    for row in range(len(x)):
        axes[row, column].imshow(seen[step][row, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
figure.suptitle("denoised digits, by noise level", fontsize=10)
plt.show()
