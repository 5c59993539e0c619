"""
Audit of a model's samples
==========================

Given samples and the training set, which samples are copies? The five definitions in use disagree
at their edges, and are all functions of the same exact distances, so that one search answers them.
"""

# %%
# The model was trained on the first 1,000 digits. Its samples stand in for a file: eight are digits
# of the training set with a little noise, eight are digits that it has not seen, and eight blend
# two training images of the same kind.

import matplotlib.pyplot as plt
import torch

from memokern import TrainingSet, memorization

digits = TrainingSet.digits()
data = digits.subset(slice(0, 1000))
generator = torch.Generator().manual_seed(0)
copies = data[100:108] + 0.03 * torch.randn(8, 8, 8, generator=generator)
unseen = digits[1200:1208]
threes = data.where(3)
blends = (threes[:8] + threes[8:16]) / 2
samples = torch.cat([copies, unseen, blends])

found = memorization.report(samples, data, tol=1.0, level=0.06, merge_radius=0.5)
for name, result in found.items():
    parts = [part.sum().item() for part in result.memorized.split(8)]
    print(f"{name:14s} {result.fraction:4.0%}: {parts} of 8 copies, 8 unseen, 8 blends")

# %%
# Each sample above its nearest training image; red, what the ratio of distances calls a copy.

ratio = found["ratio"]
figure, axes = plt.subplots(
    6, 8, figsize=(7, 5.6), layout="constrained", subplot_kw={"xticks": [], "yticks": []}
)
for i, (sample, row) in enumerate(zip(samples, ratio.index, strict=True)):
    above, below = axes[2 * (i // 8), i % 8], axes[2 * (i // 8) + 1, i % 8]
    above.imshow(sample.numpy(), cmap="gray", vmin=-1, vmax=1)
    below.imshow(data[row].numpy(), cmap="gray", vmin=-1, vmax=1)
    for side in above.spines.values():
        side.set(color="tab:red", linewidth=2.5, visible=bool(ratio.memorized[i]))
for i, name in enumerate(("copies", "unseen", "blends")):
    axes[2 * i, 0].set_ylabel(name)
    axes[2 * i + 1, 0].set_ylabel("nearest")

# %%
# The statistic itself says more than the fraction: copies lie far below the threshold.

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for name, part in zip(("copies", "unseen", "blends"), ratio.value.split(8), strict=True):
    axis.scatter(part.numpy(), [name] * 8, s=24)
axis.axvline(ratio.threshold, color="black", linestyle="--")
axis.set(xlabel="distance to the nearest row / to the second nearest", xlim=(0, 1.03))
axis.margins(y=0.3)
plt.show()
