"""MAN and MSAN, Mean (Squared) Activation Norm: keep the experts whose outputs are large whenever they are chosen.

    S_j = 1/|T_j|  sum over t in T_j of  |f_j(x_t)|       MAN
    S_j = 1/|T_j|  sum over t in T_j of  |f_j(x_t)|^2     MSAN, option `squared`
    0 for an expert never routed to

f_j     output of expert j, unweighted;  |.| the L2 norm
T_j     calibration tokens routed to j

Paper: Z. Liu et al., "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection
Principle", arXiv 2606.15716: for pruning on general text, for no task in particular.

Deviations: none in the score.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, per_token
from moekit.stats import Stats


@method(
    "man",
    kind="prune",
    needs=("count", "norm", "norm_sq"),
    summary="keeps the experts whose outputs are large whenever they are chosen",
    paper="How to Score Experts for One-Shot MoE Expert Pruning, arXiv 2606.15716",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None, *, squared: bool = False) -> np.ndarray:
    """Scores [E]: mean output norms, or mean squares of them."""
    total = stats.get("norm_sq" if squared else "norm", layer.index, domain)
    return per_token(total, stats.get("count", layer.index, domain))
