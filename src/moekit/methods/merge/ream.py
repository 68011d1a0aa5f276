"""REAM, Router-weighted Expert Activation Merging: what REAP would drop joins the salient experts most like it.

    S_j        1/|T_j|  sum over t in T_j of  g_j(t) |f_j(x_t)|                       the saliency, as of REAP
    centroids  the n experts of the highest S
    sim(i, j)  1/2 [ (cos(o_i, o_j) + 1) / 2  +  1 - |l_i/|l_i| - l_j/|l_j|| / d ]
    group      centroids in descending S each absorb the most similar experts that are left, up to C in a group (16)
    merged     W = sum over the group of S_i P_i W_i / sum of S_i

g_j(t)  weight that the model's own router gives expert j on token t;  f_j output of expert j, unweighted
T_j     calibration tokens routed to j
o_j     sum over T_j of g_j(t) f_j(x_t): its gated mean output, whose length does not matter
l_j     column of raw router logits of j over the calibration tokens;  d the largest such distance in the layer
P_i     permutation of expert i's hidden units that brings it closest to the centroid (`moekit.apply.merge`)

So the most salient centroids take nearly all that go, and most centroids stay as they are. The centroid keeps its
router row and its correction bias.

Paper: S. Jha et al., "REAM: Merging Improves Pruning of Experts in LLMs", arXiv 2604.04356.

Deviations: g is what the model applies, and an expert's output counts on the tokens that were routed to it; the
published code runs every expert on every token and weighs by a softmax of all logits. Units are aligned by their
weights, there by weights and activations. With router groups (DeepSeek) experts are merged within theirs. One pass
takes the statistics of all layers, unless `sequential`: then each layer's are taken with the merged layers before it,
as published (`moekit.fitting.sequential`). Super experts stay alone.
"""

from __future__ import annotations

import numpy as np

from moekit.errors import PlanError
from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, per_token, router_groups
from moekit.plans import Group
from moekit.stats import Stats

LEAST_SALIENCY = 0.5  # of an expert without any, at most: it then weighs as little as the least salient one


@method(
    "ream",
    kind="merge",
    needs=("count", "gated_norm", "gated_output", "logit_gram"),
    summary="merges what REAP would drop into the salient experts most like it",
    paper="REAM: Merging Improves Pruning of Experts in LLMs, arXiv 2604.04356",
)
def groups(
    stats: Stats,
    layer: MoELayer,
    keep: int,
    domain: Domain = None,
    protected: frozenset[int] = frozenset(),
    *,
    cap: int = 16,
    sequential: bool = False,
) -> list[Group]:
    """`keep` groups with their weights, the centroid first; protected experts stay alone.

    Args:
        stats: of the layer (with `sequential`, of the layer behind merged ones: this function is the same).
        layer: of the model.
        keep: groups wanted.
        domain: whose statistics count.
        protected: experts that stay alone.
        cap: experts of a group, at most.
        sequential: for `moekit.fitting.sequential`, which takes the statistics.

    Raises:
        PlanError: groups of `cap` experts cannot hold all.
    """
    saliency_E = per_token(stats.get("gated_norm", layer.index, domain), stats.get("count", layer.index, domain))
    similarity_EE = _similarity(
        stats.get("gated_output", layer.index, domain), stats.get("logit_gram", layer.index, domain)
    )
    some = saliency_E[saliency_E > 0]
    weight_E = np.where(saliency_E > 0, saliency_E, min(LEAST_SALIENCY, some.min()) if len(some) else 1.0)
    out = []
    for members in router_groups(layer):
        alone = [e for e in members.tolist() if e in protected]
        ranked = sorted((e for e in members.tolist() if e not in protected), key=lambda e: (-saliency_E[e], e))
        centroids = ranked[: keep // layer.router.groups - len(alone)]
        left = set(ranked[len(centroids) :])
        if len(left) > len(centroids) * (cap - 1):
            raise PlanError(
                f"layer {layer.index}: groups of {cap} experts cannot hold all that go",
                got=f"{len(left)} experts for {len(centroids)} groups",
                fix="keep more experts, or raise cap",
            )
        for centroid in centroids:
            nearest = sorted(left, key=lambda e: (-similarity_EE[centroid, e], e))[: cap - 1]
            left -= set(nearest)
            weights = weight_E[[centroid, *nearest]]
            out.append(Group(members=(centroid, *nearest), weights=tuple((weights / weights.sum()).tolist())))
        out += [Group(members=(e,), weights=(1.0,)) for e in alone]
    return out


def _similarity(output_ED: np.ndarray, gram_EE: np.ndarray) -> np.ndarray:
    """sim [E, E], 0 to 1."""
    outputs = output_ED.astype(np.float64)
    cosine = _cosine(outputs @ outputs.T)
    distance = np.sqrt(np.maximum(2 - 2 * _cosine(gram_EE), 0))
    return ((cosine + 1) / 2 + 1 - distance / (distance.max() or 1)) / 2


def _cosine(gram_EE: np.ndarray) -> np.ndarray:
    """Cosines of vectors from their products; 0 with a vector of length 0."""
    norms_E = np.sqrt(np.maximum(np.diag(gram_EE), 1e-30))
    return gram_EE / np.outer(norms_E, norms_E)
