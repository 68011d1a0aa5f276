"""MoTE, Mixture of Tunable Experts: switch off what lights up on one kind of prompts only, or switch it on.

    A_j(p)  share of prompt p's tokens that choose expert j
    D_j     mean of A_j over the prompts of kind a - mean of A_j over those of kind b
    off     weight 0; the token's other chosen experts are renormalised, the slot is not filled again
    on      forced into every token's choice

Label prompts by what the model was seen to do with them (refused, answered): each label is a kind.

Paper: R. Dahlke et al., "Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time", arXiv
2502.11096 (there: fTRI, `moekit ftri`).

Deviations: activity is divided by the prompt's length (raw sums mostly say which kind has the longer prompts), and the
weights that are left keep the sum that the token's weights had, so that models without renormalisation stay as loud.
"""

from __future__ import annotations

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods._relevance import relevance
from moekit.methods.steer._found import EMPTY, FORCE, Found
from moekit.stats import Stats


@method(
    "mote",
    kind="steer",
    needs=("sequence_share",),
    summary="switches experts off or on that are active in one kind of prompts and not in the other",
    paper="Mixture of Tunable Experts, arXiv 2502.11096",
)
def find(stats: Stats, layer: MoELayer, a: str, b: str) -> Found:
    """Relevance D by expert; off empties its slot, on forces it."""
    rate, others, _ = relevance(stats, layer.index, a, b)
    return Found(rate - others, EMPTY, FORCE)
