"""Cold experts: those that calibration text hardly reaches, so that little is known of them.

An expert is cold that fewer than `COLD_TOKENS` tokens of the deciding domains chose. On refmoe, scores per token
(REAP's) of experts that 100 to 199 tokens chose differ from those of a longer text by 10% in the median and by 33% for
one in ten; with 10 to 19 tokens by 33% and 127% (docs/benchmarks/calibration.md). To drop a cold expert is what pruning
for a domain is for; one that is kept was kept on thin evidence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moekit.layout import ExpertId, Layout
from moekit.methods.common import Domain
from moekit.plans import Plan
from moekit.stats import Stats

COLD_TOKENS = 100
NAMED = 6  # experts that a note names; the report has them all


def cold_experts(stats: Stats, layout: Layout, domain: Domain = None) -> dict[int, tuple[int, ...]]:
    """By layer, the experts that fewer than `COLD_TOKENS` tokens chose, ascending.

    Raises:
        DataError: no such domain.
    """
    return {
        layer.index: tuple(np.flatnonzero(stats.get("count", layer.index, domain) < COLD_TOKENS).tolist())
        for layer in layout.routed
    }


def cold_notes(plan: Plan, stats: Stats, layout: Layout, domain: Domain = None) -> Iterator[str]:
    """What a plan's notes say of cold experts: nothing where there are none."""
    cold = [ExpertId(index, e) for index, experts in cold_experts(stats, layout, domain).items() for e in experts]
    if not cold:
        return
    gone = plan.dropped_live(layout)
    kept = [x for x in cold if x.expert not in gone.get(x.layer, ())]
    total = sum(layer.num_experts for layer in layout.routed)
    stays = f"{len(kept) or 'none'} of them kept"
    yield f"cold experts (chosen by fewer than {COLD_TOKENS} tokens): {len(cold)} of {total}, {stays}"
    if kept:
        names = ", ".join(map(str, kept[:NAMED])) + (", ..." if len(kept) > NAMED else "")
        yield f"warning: cold experts that are kept ({names}): take more text"
