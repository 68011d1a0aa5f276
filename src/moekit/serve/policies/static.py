"""Static: the experts that a trace used most stay, and no others ever.

It needs a trace. What it misses can be read beforehand, but not by waiting: a text unlike the trace gets few hits.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes


class Static(Scored):
    """The hot set of a trace."""

    needs = "trace"

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        assert trace is not None
        ties = np.arange(sizes.layers * sizes.experts).reshape(sizes.layers, sizes.experts)
        self._scores = trace.frequency - 1e-9 * ties

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Changes nothing."""

    def scores(self, layer: int) -> np.ndarray:
        """How often the trace used it."""
        return self._scores
