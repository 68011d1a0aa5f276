"""EAN, Expert Activation Norm: keep the experts whose outputs are large in all.

    S_j = sum over t in T_j of |f_j(x_t)|

f_j     output of expert j, unweighted;  |.| the L2 norm
T_j     calibration tokens routed to j

Paper: A. Jaiswal et al., "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies and
Observations", arXiv 2504.05586.

Deviations: one shot; the paper also prunes step by step, scoring and fine-tuning in between.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.stats import Stats


@method(
    "ean",
    kind="prune",
    needs=("norm",),
    summary="keeps the experts whose outputs are large in all",
    paper="Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping, arXiv 2504.05586",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None) -> np.ndarray:
    """Scores [E]: summed output norms."""
    return stats.get("norm", layer.index, domain)
