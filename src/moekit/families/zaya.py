"""Zaya: the router has E + 1 outputs; the last one is no expert, a token that chooses it skips the layer's experts.

Stock code reports such a token as expert 0 with weight 0, which would count it for expert 0; here it is expert E.
"""

from __future__ import annotations

import torch

from moekit.families.family import Family
from moekit.layout import MoELayer

SKIP_BIAS = -1.0  # stock loading resets the bias of the last output to this, whatever the file says


class Zaya(Family):
    """A null expert behind the real ones."""

    def routing(self, outputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The skipping token's id is E."""
        logits, weights, ids, _state = outputs
        return weights, ids.masked_fill(weights == 0, logits.shape[-1] - 1)

    def as_loaded(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The last bias is reset."""
        if not key.endswith("balancing_biases"):
            return tensor
        return torch.cat([tensor[:-1], tensor.new_tensor([SKIP_BIAS])])

    def chosen(self, layer: MoELayer, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """E where the token skips: its weight is zero."""
        return ids_TK.masked_fill(weights_TK == 0, layer.num_experts)
