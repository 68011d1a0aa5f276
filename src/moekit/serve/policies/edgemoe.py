"""EdgeMoE: the expert goes that was needed seldom and whose layer comes late.

    score = f (1 - d / L)

f       share of all tokens so far that chose the expert, with a trace those of the trace too
d       layers until its layer runs again, 0 for the one that runs next
L       MoE layers

Paper: R. Yi et al., "EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models", arXiv 2308.14352 (its
in-memory expert management by frequency and by distance of layers). Deviation: the paper gives no formula for how the
two are put together; the product is ours. It keeps every newcomer, and so do we.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes


class EdgeMoE(Scored):
    """Frequency and distance of layers."""

    always_admits = True

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        self._count = np.zeros((sizes.layers, sizes.experts))
        if trace is not None:
            self._count += trace.frequency * len(trace.ids)

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Count it."""
        self._count[layer, experts] += counts

    def scores(self, layer: int) -> np.ndarray:
        """Frequency times nearness."""
        return self._count * nearness(layer, self.sizes.layers)[:, None]


def nearness(layer: int, layers: int) -> np.ndarray:
    """1 - d / L by layer [L]: 1 for the layer after this one, 1 / L for this one, which comes last."""
    return 1.0 - ((np.arange(layers) - layer - 1) % layers) / layers
