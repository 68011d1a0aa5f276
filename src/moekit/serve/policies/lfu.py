"""LFU: the expert that was needed least often goes; a newcomer that is needed less often than all others is not kept.

Counts are halved every `half_life` tokens, so that an old text's experts do not stay for ever. A trace gives the
counts to start from, as if one half-life of its tokens had been read.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes


class Lfu(Scored):
    """Least frequently used, with decay.

    Args:
        sizes: of the model and the memory.
        trace: where counts start.
        future: unused.
        half_life: tokens after which a use counts half.
    """

    def __init__(
        self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None, half_life: float = 512.0
    ):
        super().__init__(sizes, trace, future)
        self._growth = 2.0 ** (1.0 / (half_life * sizes.top_k))  # newer uses count more, old ones stay
        self._weight = np.ones(sizes.layers)
        self._count = np.zeros((sizes.layers, sizes.experts))
        if trace is not None:
            self._count += half_life * trace.frequency

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Count it."""
        self._weight[layer] *= self._growth ** min(counts.sum(), 1e4)
        self._count[layer, experts] += self._weight[layer] * counts
        if self._weight[layer] > 1e100:
            self._count[layer] /= self._weight[layer]
            self._weight[layer] = 1.0

    def scores(self, layer: int) -> np.ndarray:
        """Counts, in units that all layers share."""
        return self._count / self._weight[:, None]
