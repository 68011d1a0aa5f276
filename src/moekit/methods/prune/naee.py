"""NAEE: try every set of experts, and keep the one without whose complement the layer's output changes least.

    S  =  the set of n experts of the smallest  sum over t of |y(t) - y_S(t)|^2

y(t)    routed sum of the layer on token t
y_S(t)  the same when the router may choose from S only, weights made by the family's own router

For layers of at most 8 experts: there are 2^E sets.

Paper: X. Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large
Language Models", arXiv 2402.14800 (its layer-wise pruning, from the unpruned model's inputs).

Deviations: squares are added over all tokens; the published code adds a norm for each batch, so that its choice depends
on how text is cut. About one token in eight is looked at. Sets that keep the most super experts come first, unless
`protect: none`.
"""

from __future__ import annotations

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Choice, Domain
from moekit.plans.counts import subset_members, workable_subsets
from moekit.stats import Stats


@method(
    "naee",
    kind="prune",
    needs=("subset_error",),
    summary="tries every set of experts and keeps the one that changes the layer's output least (8 experts at most)",
    paper="Not All Experts are Equal: Efficient Expert Pruning and Skipping for MoE LLMs, arXiv 2402.14800",
    most_experts=8,
)
def kept(
    stats: Stats, layer: MoELayer, keep: int, domain: Domain = None, protected: frozenset[int] = frozenset()
) -> Choice:
    """The `keep` experts that stay, and the share |y - y_S| / |y| of the layer's output that goes with the others."""
    errors_S = stats.get("subset_error", layer.index, domain)
    safe = sum(1 << e for e in protected)
    sets = [x for x in workable_subsets(layer) if x.bit_count() == keep]
    best = min(sets, key=lambda x: (-(x & safe).bit_count(), errors_S[x]))
    return Choice(subset_members(best, layer), float((errors_S[best] / (errors_S[0] or 1)) ** 0.5))
