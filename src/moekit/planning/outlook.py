"""What a plan is predicted to do to a model: the relative squared error of each MoE block's routed output.

One currency for all that can be done to experts, from the sums of one statistics pass:

    share_j = sum over T_j of g_j^2 |f_j|^2  /  sum of |y|^2      of expert j in its layer

    dropped      1.5 (1 - a) sum of share_j over the dropped
    merged       as dropped, and for each group with dominant expert d and weights w
                 share_d ((1 - s^m)^2 + (1 - a)^2 sum over i != d of w_i^(2m)),   s = w_d + a sum over i != d of w_i
    quantised    eps^2 sum of share_j over all j: whatever stays does the work
    all else     eps^2 of each part that is quantised: attention, shared experts, dense MLPs, embeddings, head; their
                 outputs count as much as the routed ones
    the model    the mean over its MoE layers; of all else over its decoder layers; of embeddings and head the sum

g_j, f_j  weight and unweighted output of expert j;  y  routed sum;  T_j  tokens routed to j
a         likeness of the layer's experts, 0 to 1 (`moekit.planning.weights`);  eps^2  relative error of rounding
m         matrices that an output is linear in, one after the other: 3 for gated experts

Dropping alone would lose what the dropped add, if outputs of different experts are orthogonal; other experts take the
slots and the rest is weighted anew, which is wrong too: refmoe's blocks are off by 1.2 to 1.7 times the shares
(docs/planner.md), hence 1.5. Merged experts that are not alike keep w_d of each of the dominant one's m matrices, and
the others add noise. Errors of different origin add up, as if independent. None of it sees how an error travels through
the layers above: predictions rank candidates and tell orders of magnitude; what is chosen is measured.

Paper: none; the currency is the routed output's error that MC-MoE (arXiv 2410.06270) and NAEE (arXiv 2402.14800)
minimise, estimated without running a changed model.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import Layout
from moekit.methods.common import Domain
from moekit.planning.weights import Weights, dense_keys
from moekit.plans import OUTER, UNQUANTISED, Merge, Plan, Quantize
from moekit.stats import Stats

REFILL = 1.5


class Outlook:
    """Predicts what plans do to a model.

    Args:
        layout: of the model.
        stats: of the model, with the group "scores".
        weights: of the model.
        domain: the domains whose statistics count; None: all.

    Raises:
        DataError: the statistics lack what it takes, or have no such domain.
    """

    def __init__(self, layout: Layout, stats: Stats, weights: Weights, domain: Domain = None):
        self.layout, self.weights = layout, weights
        self._shares: dict[int, np.ndarray] = {}
        for layer in layout.routed:
            total = float(stats.get("routed_norm_sq", layer.index, domain))
            self._shares[layer.index] = stats.get("gated_norm_sq", layer.index, domain) / (total or 1.0)

    def by_layer(self, plan: Plan) -> dict[int, float]:
        """Predicted relative squared error of the routed output, by decoder layer index; above 1 nothing is better."""
        dropped, merges, quantised = plan.dropped(), plan.merges(), plan.quantised()
        errors = {}
        for layer in self.layout.routed:
            share_E = self._shares[layer.index]
            alike = self.weights.likeness.get(layer.index, 0.0)
            gone = dropped.get(layer.index, ())
            error = REFILL * (1 - alike) * float(share_E[list(gone)].sum())
            if layer.index in merges:
                error += self._merged(merges[layer.index], share_E, alike)
            if layer.index in quantised:
                kept = np.setdiff1d(np.arange(layer.num_experts), gone).tolist()
                error += self._rounded(quantised[layer.index], share_E, kept)
            errors[layer.index] = error
        return errors

    def error(self, plan: Plan) -> float:
        """The mean of `by_layer`, and what happens to all else."""
        error = float(np.mean(list(self.by_layer(plan).values())))
        for index, op in plan.quantised_dense().items():
            lost = sum(self.weights.dense[key] for key in dense_keys(op))
            error += lost if index == OUTER else lost / self.layout.num_layers
        return error

    def _rounded(self, op: Quantize, share_E: np.ndarray, kept: list[int]) -> float:
        """The mean of the kept experts' errors, by their shares; their slots are all slots."""
        alike = {bits: op.model_copy(update={"bits": bits}) for bits in set(op.widths(kept))}
        eps = {bits: 0.0 if bits == UNQUANTISED else self.weights.rounding[x] for bits, x in alike.items()}
        errors = sum(share_E[e] * eps[op.width(e)] for e in kept)
        return float(errors * share_E.sum() / (share_E[kept].sum() or 1.0))

    def _merged(self, merge: Merge, share_E: np.ndarray, alike: float) -> float:
        """What becomes of the dominant experts."""
        power, error = self.weights.factors, 0.0
        for group in merge.groups:
            first, *others = group.weights
            left = (first + alike * sum(others)) ** power
            noise = (1 - alike) ** 2 * sum(x ** (2 * power) for x in others)
            error += float(share_E[group.members[0]]) * ((1 - left) ** 2 + noise)
        return error
