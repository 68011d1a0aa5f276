"""Why a choice was made, in sentences that carry the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moekit.planning.candidates import Candidate
from moekit.planning.frontier import Frontier
from moekit.planning.shortlist import contenders, first_of_kinds
from moekit.recipe import format_bytes

UNSEEN = 3  # kinds that were not measured, told of at most


def explain(drawn: Frontier, fits: Sequence[Candidate], tokens: int, notes: Sequence[str]) -> Iterator[str]:
    """Sentences: what is chosen, what else was measured, what was not, how far predictions were right, what cannot be.

    Args:
        drawn: with the choice marked.
        fits: candidates within the budget.
        tokens: that were measured on.
        notes: what was left out, and why.
    """
    point = next(x for x in drawn.points if x.chosen)
    chosen, kl = point.candidate, point.measured
    said = f"keeps {chosen}: {format_bytes(chosen.bytes)}, {chosen.bytes / drawn.source_bytes:.0%} of the bytes"
    said += f"; predicted error {chosen.said}"
    yield said + (f", measured KL {kl:.4f} on {tokens:,} held-out tokens" if kl is not None else ", not measured")
    for other in drawn.measured:
        if not other.chosen and kl is not None and other.measured is not None:
            x = other.candidate
            times = f", {other.measured / kl:.1f} times as much" if kl > 0 else ""
            size, cost = format_bytes(x.bytes), f"KL {other.measured:.4f}{times}"
            yield f"{x} ({size}) costs {cost}; predicted error {x.said}"
    seen = {x.candidate.kind for x in drawn.measured} | {chosen.kind}
    unseen = [x for kind, x in first_of_kinds(contenders(fits)).items() if kind not in seen]
    for x in unseen[:UNSEEN]:
        yield f"not measured: {x} ({format_bytes(x.bytes)}), predicted error {x.said}"
    ratios = [x.measured / x.candidate.predicted for x in drawn.measured if x.measured and x.candidate.predicted > 0]
    if len(ratios) > 1:
        mean = math.exp(float(np.mean(np.log(ratios))))
        yield (
            f"{len(drawn.points)} candidates considered, {len(ratios)} measured: their KL is {min(ratios):.2g} to "
            f"{max(ratios):.2g} times the predicted error ({mean:.2g} on average)"
        )
    yield from notes
