"""Expert activation matrices: how a text's tokens spread over the experts of every layer; which texts are alike."""

from __future__ import annotations

import numpy as np

from moekit.serve.routes import Routes


class Library:
    """The matrices of a trace's texts.

    Args:
        trace: routes, a matrix a text.
        capacity: at most so many texts, evenly spread over the trace.

    Attributes:
        shares: [N, L, E], each layer's row adding up to 1.
    """

    def __init__(self, trace: Routes, capacity: int = 128):
        numbers = np.unique(np.linspace(0, len(trace.starts) - 1, capacity).round().astype(int))
        counts = np.stack([trace.used(slice(trace.starts[n], trace.ends[n])).sum(0) for n in numbers])
        self.shares = counts / np.maximum(counts.sum(2, keepdims=True), 1)
        flat = self.shares.reshape(len(numbers), -1)
        self._units = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    def nearest(self, counts_LE: np.ndarray) -> np.ndarray:
        """The matrix [L, E] with the largest cosine to these counts; the mean of all where there are none yet."""
        if not counts_LE.any():
            return self.shares.mean(0)
        share = counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)
        return self.shares[int((self._units @ share.reshape(-1)).argmax())]
