"""Gate mass: keep the experts that the router gives most weight in all.

    S_j = sum over t of g_j(t)

g_j(t)  weight that the model's own router gives expert j on token t, normalised and scaled; 0 where j is not chosen

Paper: A. Muzio, A. Sun, C. He, "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
arXiv 2404.05089: its soft counting.

Deviations: g is what the model applies, the paper sums softmax probabilities; its fine-tuning is another step.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.stats import Stats


@method(
    "gate-mass",
    kind="prune",
    needs=("gate_mass",),
    summary="keeps the experts that the router gives most weight in all",
    paper="SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts, arXiv 2404.05089",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None) -> np.ndarray:
    """Scores [E]: summed router weights."""
    return stats.get("gate_mass", layer.index, domain)
