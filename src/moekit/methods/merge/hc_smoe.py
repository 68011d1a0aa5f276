"""HC-SMoE: experts whose outputs are alike become one, grouped by hierarchical clustering.

    o_j        mean of f_j over the tokens routed to j
    groups     n clusters of the o_j: agglomerative, average linkage, Euclidean distance
    merged     W = sum over the cluster of phi_i P_i W_i / sum of phi_i

phi_j  share of the calibration tokens routed to j;  f_j output of expert j, unweighted
P_i    permutation of expert i's hidden units that brings it closest to the cluster's most used one

Paper: I. Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", arXiv 2410.08589.

Deviations: the mean is over the tokens that were routed to j, there over all tokens of the layer (which runs every
expert on every token). An expert that saw no token counts as one whose output is zero. Units are aligned before
merging; the router keeps the row of the cluster's most used expert.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import AgglomerativeClustering

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, dominant_first, router_groups
from moekit.stats import Stats


@method(
    "hc-smoe",
    kind="merge",
    needs=("count", "output"),
    summary="merges experts whose mean outputs lie close together",
    paper="Retraining-Free Merging of Sparse MoE via Hierarchical Clustering, arXiv 2410.08589",
)
def groups(
    stats: Stats, layer: MoELayer, keep: int, domain: Domain = None, protected: frozenset[int] = frozenset()
) -> list[list[int]]:
    """`keep` lists of experts, the most used one first; protected experts stay alone."""
    count_E = stats.get("count", layer.index, domain)
    means_ED = stats.get("output", layer.index, domain) / np.maximum(count_E, 1)[:, None]
    out = []
    for members in router_groups(layer):
        alone = [e for e in members.tolist() if e in protected]
        others = np.array([e for e in members.tolist() if e not in protected])
        wanted = keep // layer.router.groups - len(alone)
        labels = (
            AgglomerativeClustering(n_clusters=wanted, linkage="average").fit_predict(means_ED[others])
            if wanted < len(others)
            else np.arange(len(others))
        )
        clusters = [others[labels == label].tolist() for label in np.unique(labels)]
        out += [*(dominant_first(x, count_E) for x in clusters), *([e] for e in alone)]
    return out
