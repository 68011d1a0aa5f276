"""ODP, online dynamic pruning: a token's experts that weigh little beside its first are not run.

    run the expert of rank r  iff  w_r >= beta_l w_1,  or the token is one of the most important
    beta_l                    the `quantile` (0.5: the median) of w_2 / w_1 over the calibration tokens of layer l

w_r     r-th largest of the weights that the model gives a token's experts
important tokens: the share `protect` (0.02) of a text's tokens with the largest  |x|_1 a(t)

x       input of the MoE block;  a(t) mean over heads and later queries of the attention that token t receives

With two experts a token (Mixtral) r is 2, as published: half of the second experts are not run. With more, the same
threshold leaves out most of the tail; `ranks="all"` takes the quantile of w_r / w_1 of all ranks behind the first
together, so that at the median half of all these are not run.

What is left of a token's weights keeps their sum where the family's router normalises them, else it stays as it is.

Paper: W. Huang et al., "MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More", arXiv 2410.06270.

Deviations: the paper has top-2 only. In the published code beta is 0.5 in every layer, the attention sum runs over the
wrong axis (each token's is one), a tenth of the tokens is protected and another tenth runs no expert at all; here it is
as the paper says. A token that runs alone, as in decoding, is not protected, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moekit.errors import RecipeError, did_you_mean
from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.common import Domain
from moekit.plans import Odp
from moekit.stats import RATIO_BINS, Stats

IMPORTANCE = ("attention", "norm", "none")
RANKS = ("all", "second")


@method(
    "odp",
    kind="live",
    needs=("weight_ratio",),
    summary="does not run the experts that weigh little beside a token's first",
    paper="MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More, arXiv 2410.06270",
)
def way(
    stats: Stats,
    layer: MoELayer,
    domain: Domain = None,
    *,
    quantile: float = 0.5,
    ranks: str = "second",
    protect: float = 0.02,
    importance: str = "attention",
) -> Odp | None:
    """How a layer is pruned; None where a token has one expert.

    Raises:
        RecipeError: an impossible share, importance or rank.
    """
    for name, value, choices in (("importance", importance, IMPORTANCE), ("ranks", ranks, RANKS)):
        if value not in choices:
            raise RecipeError(
                f"there is no {name} {value!r}", where=f"options.{name}", fix=did_you_mean(value, choices)
            )
    for name, share in (("quantile", quantile), ("protect", protect)):
        if not 0 <= share <= 1:
            raise RecipeError("impossible share", where=f"options.{name}", expected="0 to 1", got=share)
    if layer.top_k < 2:
        return None
    ratios_RB = stats.get("weight_ratio", layer.index, domain)
    by: Any = importance
    counts_B = ratios_RB[0] if ranks == "second" else ratios_RB.sum(0)
    return Odp(
        layer=layer.index,
        beta=quantile_of(counts_B, quantile),
        protect=protect,
        importance=by,
        renormalise=layer.router.renormalised,
    )


def quantile_of(counts_B: np.ndarray, share: float) -> float:
    """The number under which a share of the counts lies, even within a bin; 0 without any counts."""
    total = np.r_[0.0, np.cumsum(counts_B)]
    if not total[-1]:
        return 0.0
    at = int(np.searchsorted(total, share * total[-1], side="right")) - 1
    if at >= len(counts_B):
        at = int(np.flatnonzero(counts_B)[-1])  # all of them: the end of the last bin that holds any
    inside = (share * total[-1] - total[at]) / counts_B[at] if counts_B[at] else 0.0
    return float(min((at + inside) / RATIO_BINS, 1.0))
