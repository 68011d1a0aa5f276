"""How a model's experts are used on text that runs through it anyway: statistics as a by-product of an evaluation."""

from __future__ import annotations

import numpy as np

from moekit.data import Dataset
from moekit.evaluation.compare import Watcher
from moekit.layout import Layout
from moekit.measurement import Gatherer
from moekit.stats import Stats


class Usage(Gatherer, Watcher):
    """Counts and gate mass by expert, domain and sequence, of the model that `evaluate` shows it.

    Args:
        layout: of that model.
        data: that it is evaluated on.
    """

    def __init__(self, layout: Layout, data: Dataset):
        super().__init__(layout.routed, len(data.domains), groups=())
        self._layout, self._data = layout, data

    def stats(self) -> Stats:
        """What was seen, when all of the data has run; to be called once.

        Raises:
            ModelError: experts were not given every token that the data has.
        """
        domains, counts = self._data.domains, self._data.tokens
        sequences = np.zeros(len(domains), np.int64)
        for batch in self._data.batches:
            sequences[batch.domain] += len(batch.ids)
        tokens = np.array([counts[name] for name in domains], np.int64)
        layers = {layer.index: self.take(layer.index, int(tokens.sum())) for layer in self._layout.routed}
        return Stats(self._layout.hash, tuple(domains), tokens, sequences, layers)
