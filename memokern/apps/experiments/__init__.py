"""The experiments of Baptista et al., "Memorization and Regularization in Generative Diffusion
Models" (arXiv:2501.15785), analytic and with networks, on memokern's operations. `memokern
reproduce NAME` runs one and writes its figure and its numbers.

Example:
    >>> from memokern.apps import experiments
    >>> sorted(experiments.EXPERIMENTS)[:3]
    ['conditional', 'empirical-bayes-sweep', 'network-conditional']
    >>> experiments.get("rate").title
    'convergence to the training point at the rate of the noise level'
"""

from __future__ import annotations

from memokern.apps.experiments import (
    conditional,
    conditional_network,
    network_squares,
    networks,
    planar,
    squares,
    structured,
    sweeps,
)
from memokern.apps.experiments.base import Experiment, Outcome, output_paths, reproduce

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "get", "output_paths", "reproduce"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for module in (
        planar,
        sweeps,
        structured,
        squares,
        conditional,
        networks,
        network_squares,
        conditional_network,
    )
    for experiment in module.EXPERIMENTS
}


def get(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError, listing the names, where there is none."""
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
