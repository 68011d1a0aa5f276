"""Random: the floor that every other method must beat.

    S_j ~ uniform in [0, 1), drawn anew for each layer

Deviations: none. The draw depends on seed and layer index alone, not on the statistics, and is the same everywhere.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.stats import Stats


@method("random", kind="prune", summary="experts drawn by lot: the floor that every method must beat")
def scores(stats: Stats, layer: MoELayer, domain: Domain = None, *, seed: int = 0) -> np.ndarray:
    """Scores [E] by lot; statistics and domain are not looked at."""
    return np.random.default_rng([seed, layer.index]).random(layer.num_experts)
