"""How many experts each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moekit.layout import Layout, MoELayer
from moekit.plans import check_droppable, keep_count


def fewest(layer: MoELayer) -> int:
    """The smallest number of experts that the layer's router works with: top_k, and what groups ask for."""
    router = layer.router
    if router.groups == 1:
        return layer.top_k
    return max(2, -(-layer.top_k // router.groups_kept)) * router.groups


def uniform(layout: Layout, keep: float | int) -> dict[int, int]:
    """Experts to keep by layer, the same share or number in each.

    Raises:
        PlanError: impossible, too few for a layer's router, or a model that no expert can be removed from.
    """
    counts = {layer.index: keep_count(layer, keep) for layer in layout.routed}
    if any(counts[layer.index] < layer.num_experts for layer in layout.routed):
        check_droppable(layout)
    return counts


def pooled(
    layout: Layout, keep: float | int, scores: Mapping[int, np.ndarray], protected: Mapping[int, frozenset[int]]
) -> dict[int, int]:
    """Experts to keep by layer, as many in all as `uniform`, given to the layers where they are worth most.

    An expert is worth its share of its layer's scores; protected ones come before all others. Every layer keeps the
    `fewest`. Layers with groups grow by one expert in each group at a time, worth their mean; the total is exact where
    all layers have equally many groups, as in every known family, and otherwise at most what was asked for.

    Args:
        layout: of the model.
        keep: share or number of experts, as for `uniform`.
        scores: by layer, [E], not negative.
        protected: by layer.
    """
    left = sum(uniform(layout, keep).values())
    counts = {layer.index: fewest(layer) for layer in layout.routed}
    left -= sum(counts.values())
    steps = []
    for layer in layout.routed:
        groups = layer.router.groups
        worth_E = scores[layer.index] / (scores[layer.index].sum() or 1)
        worth_E[list(protected[layer.index])] = np.inf
        ladder = -np.sort(-worth_E.reshape(groups, -1)).mean(0)  # worth of the best of each group, the second best, ...
        steps += [
            (-worth, rung, layer.index, groups) for rung, worth in enumerate(ladder) if rung * groups >= fewest(layer)
        ]
    for _, _, index, cost in sorted(steps):
        if cost <= left:
            counts[index] += cost
            left -= cost
    return counts
