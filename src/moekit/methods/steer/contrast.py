"""Contrast: lean on the routers against the experts that mark one kind of text, and towards those of the other.

    z_j = ( logit p_a(j) - logit p_b(j) ) / sqrt( 1/c_a(j) + 1/c_b(j) )

c(j)    tokens of a kind that chose expert j, plus 1/2; logit p(j) = log c(j) / c'(j) with c' the other tokens, plus 1/2
off     `strength` is taken from its raw logit,  on: added to it

Unlike a ban or a forced choice it may be as weak as one likes: sweep the strength for a dose and response.

Paper: none; z is the log-odds ratio over its standard error (Haldane-Anscombe correction), as used to tell the words of
two authors apart. It favours differences that are certain over ones that are large.
"""

from __future__ import annotations

import numpy as np

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.steer._found import Found
from moekit.stats import Stats


@method(
    "contrast",
    kind="steer",
    needs=("count",),
    summary="adds to the router's logits of one kind of text's experts, and takes from the other's",
)
def find(stats: Stats, layer: MoELayer, a: str, b: str, *, strength: float = 2.0) -> Found:
    """z-scores by expert; off takes `strength` from the logit, on adds it."""
    odds, errors = [], []
    for kind in (a, b):
        count_E = stats.get("count", layer.index, kind) + 0.5
        rest_E = np.maximum(stats.token_count([kind]) - count_E, 0) + 0.5
        odds.append(np.log(count_E / rest_E))
        errors.append(1 / count_E)
    scores = (odds[0] - odds[1]) / np.sqrt(errors[0] + errors[1])
    return Found(scores, {"action": "bias", "strength": -strength}, {"action": "bias", "strength": strength})
