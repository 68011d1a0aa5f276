"""Functional token resonance imaging (fTRI): which experts light up on one kind of prompts and not on the others.

    A_j(p) = 1/|p|  sum over tokens t of prompt p of  [j chosen on t]         by = "share"
    A_j(p) = 1/|p|  sum over tokens t of prompt p of  g_j(t)                  by = "mass"
    D_j    = mean of A_j over the prompts of the kind  -  mean of A_j over the other prompts

g_j(t)  weight that the model's own router gives expert j on token t, 0 where j is not chosen
p       a prompt, or a document up to the sequence length; |p| its tokens

The kinds are domains: label prompts by what the model was seen to do with them (refused, answered) and measure each
label as a domain. The experts with the largest D are those to switch off or on (`moekit.view.MoEView.scale`).

Paper: R. Dahlke et al., "Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time", arXiv
2502.11096.

Deviations: sums are divided by the prompt's length (raw sums mostly say which kind has the longer prompts), and D comes
with a 95% interval, D +- 1.96 sqrt(s1^2/n1 + s2^2/n2) with the prompts' variances s^2: of thousands of experts some are
far apart by chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from moekit.errors import DataError, did_you_mean
from moekit.layout import ExpertId, Layout
from moekit.methods._relevance import relevance
from moekit.stats import Stats

NORMAL_95 = 1.96
BY = ("share", "mass")


class Relevance(NamedTuple):
    """How much more an expert is active in one kind of prompts than in others.

    Attributes:
        expert: layer and number.
        domain: the kind.
        rate: mean activity in prompts of the kind.
        others: mean activity in the other prompts.
        difference: D, `rate` minus `others`.
        low: lower end of its 95% interval; NaN where a kind has one prompt only.
        high: upper end.
    """

    expert: ExpertId
    domain: str
    rate: float
    others: float
    difference: float
    low: float
    high: float


def ftri(
    stats: Stats,
    layout: Layout,
    domain: str | None = None,
    against: str | Iterable[str] | None = None,
    *,
    top: int = 10,
    by: str = "share",
) -> list[Relevance]:
    """The most relevant experts of the model, largest D first; ties go to the lower layer and number.

    Args:
        stats: with a domain for each kind of prompts.
        layout: of the model.
        domain: the kind; None: whichever kind an expert is most relevant for.
        against: the other kinds; None: all others, their prompts taken together.
        top: how many experts.
        by: "share" of a prompt's tokens that choose the expert, or "mass", its mean weight over them.

    Raises:
        DataError: fewer than two kinds of prompts, an unknown one, one on both sides, or the statistics do not hold
            what is needed.
    """
    if by not in BY:
        raise DataError(f"activity cannot be measured by {by!r}", where="by", fix=did_you_mean(by, BY))
    kinds = stats.domains if domain is None else (domain,)
    best: dict[ExpertId, Relevance] = {}
    for kind in kinds:
        for layer in layout.routed:
            rate, others, error = relevance(stats, layer.index, kind, against, by)
            for e in range(layer.num_experts):
                difference, half = float(rate[e] - others[e]), NORMAL_95 * float(error[e])
                low, high = difference - half, difference + half
                found = Relevance(
                    ExpertId(layer.index, e), kind, float(rate[e]), float(others[e]), difference, low, high
                )
                best[found.expert] = max(best.get(found.expert, found), found, key=lambda x: x.difference)
    return sorted(best.values(), key=lambda x: (-x.difference, x.expert))[:top]
