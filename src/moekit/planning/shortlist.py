"""Which candidates are worth measuring: those that may turn out to be the best."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.planning.candidates import Candidate

NEAR = 10.0  # times the least predicted error: what may still turn out to be the best
OWN = 99  # bits of what stays as it is: more than any that it is kept in


def shortlist(fits: Sequence[Candidate], count: int) -> list[Candidate]:
    """Those that may be the best, at most `count`: the first of each kind that is near, then others, then the rest."""
    ranked = contenders(fits)
    near = [x for x in ranked if x.predicted <= NEAR * ranked[0].predicted]
    first = first_of_kinds(ranked)
    leading = [x for x in near if first[x.kind] is x]
    others = [x for x in near if first[x.kind] is not x]
    far = [x for x in ranked if x not in near]
    return [*leading, *others, *far][:count]


def contenders(fits: Sequence[Candidate]) -> list[Candidate]:
    """What is worth a look of all that fits, least predicted error first: nothing that another one keeps all of.

    Of each way to leave experts and to keep their bits it is the one with the least predicted error.
    """
    best: dict[tuple[str, ...], Candidate] = {}
    for x in sorted(fits, key=lambda x: (x.predicted, x.bytes)):
        best.setdefault((*(step.method for step in x.steps), str(x.rest)), x)
    return [x for x in best.values() if not any(_keeps_all(y, x) for y in best.values() if y is not x)]


def _keeps_all(more: Candidate, less: Candidate) -> bool:
    """Whether one candidate keeps all experts and bits that another one keeps, and does no worse by prediction."""
    alike = more.steps[:1] == less.steps[:1] and more.kind[0] == less.kind[0] != ""
    experts = more.keep == more.experts or (alike and more.keep >= less.keep)
    bits = more.kind[1] >= less.kind[1] and (more.rest or OWN) >= (less.rest or OWN)
    return experts and bits and more.predicted <= less.predicted


def first_of_kinds(ranked: Sequence[Candidate]) -> dict[tuple[str, float], Candidate]:
    """The first of each kind."""
    out: dict[tuple[str, float], Candidate] = {}
    for x in ranked:
        out.setdefault(x.kind, x)
    return out
