"""
Stable targets against plain ones
=================================

A network that denoises is regressed on its sample's own row. Where several rows could have given
the noisy x, that target has a large variance; the posterior mean over a reference batch has the
same mean and less of it (Xu et al., arXiv 2302.00670).
"""

# %%
# For each noise level we take 256 noisy digits and compare targets with what both of them estimate,
# the posterior mean over all 1,797 digits.

import matplotlib.pyplot as plt
import torch

import memokern
from memokern.training import targets

data = memokern.TrainingSet.digits()
generator = torch.Generator().manual_seed(0)
sigmas = torch.logspace(-1, 1, 13).tolist()
sizes = (0, 64, 256, 1024)
error = {size: [] for size in sizes}
for sigma in sigmas:
    y = data[torch.randint(data.n, (256,), generator=generator)]
    x = y + sigma * torch.randn(y.shape, generator=generator)
    best = memokern.denoise(x, data, sigma)
    for size in sizes:
        target = y
        if size:
            reference = data[torch.randperm(data.n, generator=generator)[:size]]
            target = targets.stable(x, reference, sigma, own=y)
        error[size].append((target - best).square().flatten(1).sum(1).mean().item())

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for size in sizes:
    name = f"stable, {size} reference rows" if size else "plain: the sample's own row"
    axis.loglog(sigmas, [max(e, 1e-6) for e in error[size]], marker="o", markersize=3, label=name)
axis.set(xlabel="sigma", ylabel="E |target - posterior mean|²", ylim=(1e-3, 100))
axis.legend(loc="upper left", fontsize=8)
plt.show()

at = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - 3))
print(
    f"at sigma {sigmas[at]:.1f}: " + ", ".join(f"{size}: {error[size][at]:.2f}" for size in sizes)
)

# %%
# At small noise nothing is to be gained: only the own row has weight, and all targets agree. At
# large noise every reference row counts: the error falls as one over their number, and faster as
# they come near to being all rows. Errors below 1e-3 are not shown.
