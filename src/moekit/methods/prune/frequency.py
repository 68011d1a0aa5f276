"""Frequency: keep the experts that are chosen most often.

    S_j = |T_j|

T_j     calibration tokens routed to j

A baseline older than any one paper. It sees neither how much weight a chosen expert gets nor how much it adds.

Deviations: none.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.stats import Stats


@method("frequency", kind="prune", needs=("count",), summary="keeps the experts that are chosen most often")
def scores(stats: Stats, layer: MoELayer, domain: Domain = None) -> np.ndarray:
    """Scores [E]: tokens routed to each expert."""
    return stats.get("count", layer.index, domain)
