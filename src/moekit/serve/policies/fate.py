"""Fate: shallow layers get the places, each layer keeps its own by ARC.

    C >= 4 E    layers 0 to 3 are held whole, the others get (C - 4 E) / (L - 4) places each
    C <  4 E    layers are filled from 0 upwards, E places each, as far as C goes

C       places
E       experts of a layer
L       MoE layers

Paper: Z. Fang et al., "Fate: Fast Edge Inference of Mixture-of-Experts Models via Cross-Layer Gate", arXiv 2502.12224,
shallow-favouring expert cache. Deviations: what (C - 4 E) / (L - 4) leaves over goes to the shallower of the others,
one each; a model of four layers or fewer is filled from layer 0. A layer without places keeps nothing.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.policies.arc import Lists
from moekit.serve.policies.base import Key, Policy, Sizes
from moekit.serve.routes import Routes

WHOLE = 4  # layers that are held whole


class Fate(Policy):
    """Places by layer, ARC within each."""

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        self.quota = quotas(sizes)
        self._lists = [Lists(count) for count in self.quota]
        self._held = [0] * sizes.layers

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Tell the layer's lists."""
        for expert in experts.tolist():
            self._lists[layer].used((layer, expert))

    def victim(self, incoming: Key, resident_LE: np.ndarray) -> Key | None:
        """Within the layer's places the one that ARC names; while it has fewer, one of a layer that has too many."""
        layer = incoming[0]
        if self._held[layer] >= self.quota[layer]:
            return self._lists[layer].victim(incoming) if self.quota[layer] else None
        holders = [x for x in range(self.sizes.layers) if self._held[x]]
        richest = max(holders, key=lambda x: (self._held[x] - self.quota[x], x))
        return self._lists[richest].victim(incoming)

    def came(self, key: Key) -> None:
        """Tell the layer's lists."""
        self._held[key[0]] += 1
        self._lists[key[0]].came(key)

    def left(self, key: Key) -> None:
        """Tell the layer's lists."""
        self._held[key[0]] -= 1
        self._lists[key[0]].left(key)


def quotas(sizes: Sizes) -> list[int]:
    """Places of each layer [L]; they add up to the slots, or to all experts."""
    slots, layers, experts = sizes.slots, sizes.layers, sizes.experts
    if slots < WHOLE * experts or layers <= WHOLE:
        return [int(np.clip(slots - layer * experts, 0, experts)) for layer in range(layers)]
    each, rest = divmod(slots - WHOLE * experts, layers - WHOLE)
    deep = [each + (number < rest) for number in range(layers - WHOLE)]
    return [experts] * WHOLE + [min(experts, count) for count in deep]
