"""EASY-EP: keep the experts that add much, counting most the tokens that the layer changes most.

    S_j = sum over t of  s_t g_j(t) |f_j(x_t)|,      s_t = max(0, 1 - cos(h_t, h_t + y_t))

g_j(t)  weight that the model's own router gives expert j on token t, normalised and scaled; 0 where j is not chosen
f_j     output of expert j, unweighted;  |.| the L2 norm
x_t     input of the MoE block;  h_t  the residual stream before it
y_t     sum over j of g_j(t) f_j(x_t): the routed experts together, shared experts left out

Paper: Z. Dong et al., "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations", arXiv
2504.06792.

Deviations: all tokens given count; the published code takes the 25 longest of its demonstrations. Where the weight
multiplies the expert's input (Llama 4), |f_j(g_j x_t)| stands for g_j |f_j(x_t)|.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.stats import Stats


@method(
    "easy-ep",
    kind="prune",
    needs=("easy_ep",),
    summary="keeps the experts that add much where the layer changes a token much",
    paper="Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations, arXiv 2504.06792",
)
def scores(stats: Stats, layer: MoELayer, domain: Domain = None) -> np.ndarray:
    """Scores [E]: output norms, weighted by router and by token."""
    return stats.get("easy_ep", layer.index, domain)
