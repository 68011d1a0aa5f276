"""Belady: the expert goes that is needed again last, newcomers included; no policy has more hits.

It needs the future, which only a simulator has: the bound that others are held against.

Paper: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (1966),
with bypass: a newcomer needed later than all residents is not kept. (Read-ME, arXiv 2410.19123, evicts so with a router
that decides for all layers beforehand.)
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes

NEVER = np.iinfo(np.int64).max


class Belady(Scored):
    """Farthest next use."""

    needs = "future"

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        assert future is not None
        self._next = np.full((sizes.layers, sizes.experts), NEVER)
        self._uses: dict[tuple[int, int], list[int]] = {}
        for layer in range(sizes.layers):
            for token in range(len(future.ids) - 1, -1, -1):
                for expert in set(future.ids[token, layer].tolist()) - {future.experts}:
                    self._uses.setdefault((layer, expert), []).append(token * sizes.layers + layer)
        for key, times in self._uses.items():
            self._next[key] = times[-1]

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Look for the next time; each of a use's tokens is a time that has passed."""
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            times = self._uses[layer, expert]
            del times[-int(count) :]
            self._next[layer, expert] = times[-1] if times else NEVER

    def scores(self, layer: int) -> np.ndarray:
        """Soon is good."""
        return -self._next
