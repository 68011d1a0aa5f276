"""Activations: the text is likened to a text of the trace, whose experts are taken for the ones to come.

    score(e) = T*_le + c_le

T*      expert activation matrix (how a text's tokens spread over the experts of each layer) of the traced text whose
        matrix has the largest cosine to that of the running text so far
c       the running text's own matrix

Paper: L. Xue et al., "MoE-Infinity", arXiv 2401.14361. Deviations: at most 128 texts, evenly spread over the trace,
instead of a clustered collection; the running text's own matrix counts too.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.matrices import Library
from moekit.serve.predictors.base import Predictor, Seen
from moekit.serve.routes import Routes


class Activations(Predictor):
    """MoE-Infinity's activation matrices."""

    first = 0

    def __init__(self, trace: Routes | None = None, routers: object = None):
        super().__init__(trace, None)
        assert trace is not None
        self._library = Library(trace)

    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """The matched text's and the own share."""
        own = seen.counts[:, layer]
        share = own / np.maximum(own.sum(1, keepdims=True), 1)
        out = np.stack([self._library.nearest(counts_LE)[layer] for counts_LE in seen.counts]) + share
        return np.broadcast_to(out, (len(seen.tokens), out.shape[1]))
