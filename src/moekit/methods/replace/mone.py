"""MoNE, Mixture of Novices and Experts: a constant stands for each expert that is little used and hardly varies.

    S_j = phi_j sigma_j
    phi_j   sum over t of g_j(t)                                       how much the router uses the expert
    sigma_j sqrt( sum over d of Var over t in T_j of f_j(x_t)[d] )     how far its outputs lie from their mean
    c_j     1/|T_j|  sum over t in T_j of f_j(x_t)                     the novice: a slot adds g_j(t) c_j

g_j(t)  weight that the model's own router gives expert j on token t, normalised and scaled; 0 where j is not chosen
f_j     output of expert j, unweighted;  T_j calibration tokens routed to j

The experts of the lowest S are replaced. Routers do not change.

Paper: G. Zhang et al., "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE",
arXiv 2507.00390. phi is what the published code ("fusion") takes for the access frequency.

Deviations: the variance is that about the final mean; the published code updates it batch by batch about a running one.
Where the weight multiplies the expert's input (Llama 4), c_j is the mean of f_j(g_j x_t), and a slot adds c_j itself.
Super experts keep their weights by default.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain, per_token
from moekit.stats import Stats


@method(
    "mone",
    kind="replace",
    needs=("count", "gate_mass", "norm_sq", "output"),
    summary="lets constants stand for experts that are little used and hardly vary",
    paper="MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE, arXiv 2507.00390",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None, *, format: str = "auto") -> np.ndarray:
    """Scores [E]: use times spread of outputs. `format` is for who writes it: "stock", "moekit" or "auto"."""
    count_E = stats.get("count", layer.index, domain)
    mean_ED = stats.get("output", layer.index, domain) / np.maximum(count_E, 1)[:, None]
    square_E = per_token(stats.get("norm_sq", layer.index, domain), count_E)
    spread_E = np.sqrt(np.maximum(square_E - np.square(mean_ED, dtype=np.float64).sum(1), 0))
    return stats.get("gate_mass", layer.index, domain) * spread_E
