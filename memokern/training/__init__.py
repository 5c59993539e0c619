"""Training: the targets of denoising, and what a network learns from them."""

from __future__ import annotations

from memokern.training import targets

__all__ = ["targets"]
