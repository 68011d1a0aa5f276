"""M-SMoE: the most used experts stay, every other one joins the one that the router sees as most like it.

    dominant   the n experts with the highest phi_j
    group      expert i joins the dominant j of the highest  cos(l_i, l_j)
    merged     W_j = sum over the group of phi_i P_i W_i / sum of phi_i

phi_j  share of the calibration tokens routed to j
l_j    column of raw router logits of j over the calibration tokens
P_i    permutation of expert i's hidden units that brings it closest to the dominant (`moekit.apply.merge`)

Paper: P. Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", arXiv
2310.01334.

Deviations: the router keeps the dominant expert's row (or, by option, the weighted mean of the rows) and loses the
others, so that the checkpoint really shrinks; the published code keeps all rows and points several at one expert. Units
are aligned within each group, to its dominant expert; the paper aligns all of a layer to one.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, dominant_first, router_groups
from moekit.stats import Stats


@method(
    "m-smoe",
    kind="merge",
    needs=("count", "logit_gram"),
    summary="merges every expert into the often used one that the router sees as most like it",
    paper="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, arXiv 2310.01334",
)
def groups(
    stats: Stats, layer: MoELayer, keep: int, domain: Domain = None, protected: frozenset[int] = frozenset()
) -> list[list[int]]:
    """`keep` lists of experts, the dominant one first; protected experts stay alone."""
    frequency_E = stats.get("count", layer.index, domain)
    gram_EE = stats.get("logit_gram", layer.index, domain)
    norms_E = np.sqrt(np.maximum(np.diag(gram_EE), 1e-30))
    similarity_EE = gram_EE / np.outer(norms_E, norms_E)
    out = []
    for members in router_groups(layer):
        alone = [e for e in members.tolist() if e in protected]
        ranked = dominant_first([e for e in members.tolist() if e not in protected], frequency_E)
        first = ranked[: keep // layer.router.groups - len(alone)]
        joined = {e: [e] for e in first}
        for e in ranked[len(first) :]:
            joined[max(first, key=lambda d: (similarity_EE[e, d], -d))].append(e)
        out += [*joined.values(), *([e] for e in alone)]
    return out
