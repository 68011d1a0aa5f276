"""Super experts: the few whose outputs hold the extreme values that make a model's attention sinks.

Expert j of layer l is super when its peak, the largest |element| of its unweighted output over all tokens, is

    above the 99.5th percentile of all experts' peaks in the model,  and
    above a tenth of the largest of them,                            and
    l < round(0.75 L),  L decoder layers, dense ones counted.

Paper: Z. Su et al., "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv 2507.23279: removing
three of 6144 makes Qwen3-30B-A3B repeat itself.

Deviations: all tokens of all domains are scanned (the published code looks at the first token of a batch, where these
experts usually fire). The percentile always leaves some experts above it: in a model without super experts, about 1 in
200 is named all the same, where peaks are within a factor of ten of the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moekit.layout import ExpertId, Layout
from moekit.stats import Stats

PERCENTILE, SHARE_OF_MAXIMUM, SHARE_OF_DEPTH = 99.5, 0.1, 0.75


def super_experts(stats: Stats, layout: Layout) -> frozenset[ExpertId]:
    """The super experts of a model.

    Raises:
        DataError: the peaks were not measured.
    """
    peaks = {layer.index: stats.get("peak", layer.index) for layer in layout.routed}
    everyone = np.concatenate(list(peaks.values()))
    bar = max(np.percentile(everyone, PERCENTILE), everyone.max() * SHARE_OF_MAXIMUM)
    deepest = round(SHARE_OF_DEPTH * layout.num_layers)
    return frozenset(
        ExpertId(index, int(expert))
        for index, peak_E in peaks.items()
        if index < deepest
        for expert in np.flatnonzero(peak_E > bar)
    )


class Peak(NamedTuple):
    """How extreme an expert's outputs are.

    Attributes:
        expert: layer and number.
        peak: largest |element| of its unweighted output.
        over_median: `peak` over the median of all experts' peaks.
        share: of the tokens that choose it.
    """

    expert: ExpertId
    peak: float
    over_median: float
    share: float


def peaks(stats: Stats, layout: Layout) -> list[Peak]:
    """Every expert, largest peak first.

    Raises:
        DataError: the peaks were not measured.
    """
    every = np.concatenate([stats.get("peak", layer.index) for layer in layout.routed])
    median, tokens = float(np.median(every)), stats.token_count()
    found = []
    for layer in layout.routed:
        counts_E = stats.get("count", layer.index)
        for expert, peak in enumerate(stats.get("peak", layer.index).tolist()):
            over = peak / median if median else float("inf")
            found.append(Peak(ExpertId(layer.index, expert), peak, over, float(counts_E[expert] / max(tokens, 1))))
    return sorted(found, key=lambda x: (-x.peak, x.expert))
