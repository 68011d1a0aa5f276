"""Gate: the next layer's router is asked about what this layer's router was given.

    predicted = top of softmax(W_gate_(l+1) h_l)      h_l: input of layer l's gate

The residual stream changes slowly from layer to layer, so that the answer is mostly right; nothing is trained.

Paper: Z. Fang et al., "Fate: Fast Edge Inference of Mixture-of-Experts Models via Cross-Layer Gate", arXiv 2502.12224.
Deviations: none in the prediction; how much is read ahead depends on the disk's measured pauses, not on k + 1.
"""

from __future__ import annotations

import numpy as np
import torch

from moekit.serve.predictors.base import Predictor, Seen
from moekit.serve.predictors.routers import Routers
from moekit.serve.routes import Routes


class Gate(Predictor):
    """Fate's cross-layer gate."""

    needs = "routers"
    watches_hidden = True

    def __init__(self, trace: Routes | None = None, routers: Routers | None = None):
        super().__init__(trace, routers)
        assert routers is not None
        self.routers = routers

    @torch.inference_mode()
    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """Its router's answer; where products with its rows say as much, these alone."""
        rows = self.routers.rows[layer]
        if rows is not None:
            return torch.nn.functional.linear(seen.hidden[layer - 1], rows).float().numpy()
        return self.routers.scores(layer, seen.hidden[layer - 1])
