"""
Certificates at work
====================

At small noise few rows matter. An index proves which, and each result carries a bound on what was
left out. Here the bound is compared with what was left out in truth.
"""

# %%
# Two hundred queries for each noise level: digits with noise added.

import matplotlib.pyplot as plt
import torch

import memokern

data = memokern.TrainingSet.digits().build_index()
generator = torch.Generator().manual_seed(0)
clean = data[:200].double()
noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)

sigmas = torch.logspace(-1.5, 0.4, 12).tolist()
kept, proven, true = [], [], []
for sigma in sigmas:
    x = (clean + sigma * noise).float()
    p = memokern.posterior(x, data, sigma, method="pruned", certificate=True, tol=1e-3)
    exact = memokern.posterior(x.double(), data, sigma, method="dense")
    error = (p.mean.double() - exact.mean).flatten(1).norm(dim=1)
    kept.append(p.certificate.rows_kept.double().mean().item())
    proven.append(p.certificate.mean_error.max().item())
    true.append(error.max().item())
    print(f"sigma {sigma:5.3f}: {kept[-1]:7.1f} of {data.n} rows, error {true[-1]:.1e}")

# %%
# Left, how many rows had to be swept. Right, the largest error of a posterior mean: the proven
# bound, and what it is in truth. Below 1e-6, rounding to float32 is what is left of the error,
# which no certificate speaks of. Where all rows are swept nothing is left out and the bound is 0;
# zeros are not drawn.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
left.loglog(sigmas, kept, marker="o")
left.axhline(data.n, color="0.6", linestyle="--")
left.set(xlabel="sigma", ylabel="rows (mean)", title=f"rows swept of {data.n}")
for errors, marker, name in ((proven, "o", "proven bound"), (true, "s", "true error")):
    shown = [(sigma, error) for sigma, error in zip(sigmas, errors, strict=True) if error > 0]
    right.loglog(*zip(*shown, strict=True), marker=marker, label=name)
right.set(xlabel="sigma", ylabel="L2 error of the mean", title="largest of 200 queries")
right.legend()
plt.show()
