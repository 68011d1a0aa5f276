"""REAP, Router-weighted Expert Activation Pruning: keep the experts that add much whenever they are chosen.

    S_j = 1/|T_j|  sum over t in T_j of  g_j(t) |f_j(x_t)|       0 for an expert never routed to

g_j(t)  weight that the model's own router gives expert j on token t, normalised and scaled
f_j     output of expert j, unweighted;  |.| the L2 norm
T_j     calibration tokens routed to j

Paper: M. Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999.

Deviations: g is what the model applies; the published code takes a softmax of the router's logits whatever the family
(sigmoid routers, correction biases and scaling factors then count wrongly). Where the weight multiplies the expert's
input (Llama 4), |f_j(g_j x_t)| stands for g_j |f_j(x_t)|. Super experts are protected by default, there by option.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, per_token
from moekit.stats import Stats


@method(
    "reap",
    kind="prune",
    needs=("count", "gated_norm"),
    summary="keeps the experts that add much whenever they are chosen",
    paper="REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, arXiv 2510.13999",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None) -> np.ndarray:
    """Scores [E]: mean weighted output norms."""
    return per_token(stats.get("gated_norm", layer.index, domain), stats.get("count", layer.index, domain))
