"""LRU: the expert that was not needed for longest goes, whatever its layer; every newcomer stays.

Below one token cycle (L k experts) it has no hits at all: each expert goes just before its layer comes round again.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes


class Lru(Scored):
    """Least recently used."""

    always_admits = True

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        self._time = 0
        self._last = np.zeros((sizes.layers, sizes.experts), np.int64)

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Note when."""
        self._last[layer, experts] = self._time + 1 + np.arange(len(experts))
        self._time += len(experts)

    def scores(self, layer: int) -> np.ndarray:
        """When it was needed last."""
        return self._last
