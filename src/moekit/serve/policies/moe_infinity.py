"""MoE-Infinity: the expert goes that texts like this one need least, and whose layer comes late.

    score = (T*_le + 1e-8) (1 - (l - l_c) / (L + 1))

T*      expert activation matrix: share of the tokens that go to expert e of layer l, of the traced text most like the
        running one (by the cosine of their matrices so far), added to that of the running text itself
l_c     the layer that runs; l counts on past the last layer for those that run in the next token
L       MoE layers

Paper: L. Xue et al., "MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache",
arXiv 2401.14361, the priority of prefetching, which also orders its cache. Deviations: the best match is looked for
once a token, not once a layer; without a trace, T* is of the running text alone.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.matrices import Library
from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes


class MoEInfinity(Scored):
    """Activation matrices and distance of layers."""

    always_admits = True

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        self._library = None if trace is None else Library(trace)
        self._count = np.zeros((sizes.layers, sizes.experts))
        self._match = np.zeros_like(self._count)

    def begin(self) -> None:
        """An empty matrix."""
        self._count[:] = 0

    def step(self) -> None:
        """Look for the text that is most like this one."""
        if self._library is not None:
            self._match = self._library.nearest(self._count)

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Count it."""
        self._count[layer, experts] += counts

    def scores(self, layer: int) -> np.ndarray:
        """The priority."""
        layers = self.sizes.layers
        distance = (np.arange(layers) - layer - 1) % layers + 1
        share = self._count / np.maximum(self._count.sum(1, keepdims=True), 1)
        return (self._match + share + 1e-8) * (1 - distance / (layers + 1))[:, None]
