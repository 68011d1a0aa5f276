"""plan_for_budget: the best model that fits into so many bytes, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moekit.data import Dataset
from moekit.errors import PlanError
from moekit.evaluation import evaluate
from moekit.evaluation.compare import Subject
from moekit.families.model import Model
from moekit.methods.common import Domain
from moekit.planning.candidates import Candidate, candidates
from moekit.planning.frontier import Frontier, frontier
from moekit.planning.ways import Formats, Space
from moekit.progress import Progress, silent
from moekit.recipe import Step, format_bytes
from moekit.stats import Stats

NEAR = 10.0  # times the least predicted error: what may still turn out to be the best


@dataclass(frozen=True)
class Choice:
    """What the planner says.

    Attributes:
        steps: of a recipe; none when the model fits as it is.
        frontier: all that was considered.
        words: why, a sentence a line.
    """

    steps: tuple[Step, ...]
    frontier: Frontier
    words: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.words)


def plan_for_budget(
    model: Model,
    stats: Stats,
    data: Dataset,
    budget_bytes: int,
    *,
    formats: Formats = "stock",
    domain: Domain = None,
    measure: int = 4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Choice:
    """Choose what to do to a model so that its tensors have at most so many bytes.

    Every candidate's size is exact and its error predicted (`moekit.planning.outlook`); the few that may be the best
    are measured, applied live, and the one with the lowest KL divergence from the source is taken.

    Args:
        model: the source.
        stats: of it, with the groups that `moekit.planning.groups` names; methods that need more are left out.
        data: to measure on, not what the statistics are of (see `moekit.planning.hold_out`).
        budget_bytes: of the result's tensors, at most.
        formats: of quantised weights: "stock": what stock transformers loads; "moekit": moekit's own packed form.
        domain: whose statistics count and whose text is measured; None: all.
        measure: candidates to measure; 0: trust the predictions.
        seed: for methods that draw.
        dtype: to measure in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told of "weights", "candidates", "measured", and of layers.

    Raises:
        PlanError: nothing that is known fits.
        DataError: no such domain, or statistics without the group "scores".
    """
    source = model.checkpoint.bytes
    if budget_bytes >= source:
        said = f"the model has {format_bytes(source)}, the budget is {format_bytes(budget_bytes)}: nothing to do"
        return Choice((), Frontier((), source, budget_bytes), (said,))
    space = check_budget(model, budget_bytes, formats)
    found, notes = candidates(model, stats, budget_bytes, space=space, domain=domain, seed=seed, progress=progress)
    fits = [x for x in found if x.bytes <= budget_bytes]
    if not fits:  # what only statistics can tell: a method refused the one number of experts that fits
        raise PlanError(
            "no plan fits into the budget", where="budget", got=format_bytes(budget_bytes), fix="; ".join(notes)
        )
    text = data if domain is None else _of_domains(data, domain)
    measured = []
    for number, candidate in enumerate(short := shortlist(fits, measure)):
        scores = evaluate(
            Subject(model, candidate.plan), text, against=model, dtype=dtype, device=device, progress=progress
        )
        measured.append((candidate, _mean_kl(scores)))
        progress("measured", number + 1, len(short))
    chosen = min(measured, key=lambda x: x[1])[0] if measured else min(fits, key=lambda x: (x.predicted, x.bytes))
    drawn = frontier(found, measured, chosen, source, budget_bytes)
    return Choice(chosen.steps, drawn, tuple(_words(drawn, fits, text, notes)))


def check_budget(model: Model, budget_bytes: int, formats: Formats = "stock") -> Space:
    """Refuse a budget that nothing fits into, from headers alone; else what can be done.

    Raises:
        PlanError: with the smallest size that can be reached, and how.
    """
    space = Space(model, formats)
    least, what = space.smallest
    if least > budget_bytes:
        share = least / model.checkpoint.bytes
        raise PlanError(
            "nothing makes the model as small as that",
            where="budget",
            expected=f"at least {format_bytes(least)}, {share:.0%} of the model: {what}",
            got=format_bytes(budget_bytes),
            fix="; ".join(["raise the budget", *space.notes]),
        )
    return space


def shortlist(fits: Sequence[Candidate], count: int) -> list[Candidate]:
    """Those that may be the best, at most `count`: the first of each kind that is near, then others, then the rest."""
    ranked = contenders(fits)
    near = [x for x in ranked if x.predicted <= NEAR * ranked[0].predicted]
    first = _first_of_kinds(ranked)
    leading = [x for x in near if first[x.kind] is x]
    others = [x for x in near if first[x.kind] is not x]
    far = [x for x in ranked if x not in near]
    return [*leading, *others, *far][:count]


def contenders(fits: Sequence[Candidate]) -> list[Candidate]:
    """What is worth a look of all that fits, least predicted error first.

    Of each way to leave experts and to keep their bits the one with the least predicted error; and fewer experts in
    some bits only where all of them in as many bits do not fit.
    """
    whole = {(x.kind[1], x.rest) for x in fits if x.keep == x.experts}
    best: dict[tuple, Candidate] = {}
    for x in sorted(fits, key=lambda x: (x.predicted, x.bytes)):
        if x.keep == x.experts or (x.kind[1], x.rest) not in whole:
            best.setdefault((*(step.method for step in x.steps), x.rest), x)
    return list(best.values())


def _first_of_kinds(ranked: Sequence[Candidate]) -> dict[tuple[str, int], Candidate]:
    first: dict[tuple[str, int], Candidate] = {}
    for x in ranked:
        first.setdefault(x.kind, x)
    return first


def _of_domains(data: Dataset, domain: Domain) -> Dataset:
    from dataclasses import replace

    names = [domain] if isinstance(domain, str) else list(domain or data.domains)
    numbers = {data.domains.index(name): i for i, name in enumerate(names)}
    batches = [replace(x, domain=numbers[x.domain]) for x in data.batches if x.domain in numbers]
    return replace(data, domains=tuple(names), batches=batches)


def _mean_kl(scores) -> float:  # type: ignore[no-untyped-def]
    return float(np.mean([x.kl.value for x in scores.domains.values()]))


def _words(drawn: Frontier, fits: Sequence[Candidate], text: Dataset, notes: Sequence[str]):  # type: ignore[no-untyped-def]
    """Why, a sentence at a time."""
    point = next(x for x in drawn.points if x.chosen)
    chosen, kl = point.candidate, point.measured
    said = f"keeps {chosen}: {format_bytes(chosen.bytes)}, {chosen.bytes / drawn.source_bytes:.0%} of the bytes"
    said += f"; predicted error {chosen.said}"
    tokens = sum(text.tokens.values())
    yield said + (f", measured KL {kl:.4f} on {tokens:,} held-out tokens" if kl is not None else ", not measured")
    for other in drawn.measured:
        if not other.chosen and kl is not None and other.measured is not None:
            x = other.candidate
            times = f", {other.measured / kl:.1f} times as much" if kl > 0 else ""
            size, cost = format_bytes(x.bytes), f"KL {other.measured:.4f}{times}"
            yield f"{x} ({size}) costs {cost}; predicted error {x.said}"
    seen = {x.candidate.kind for x in drawn.measured} | {chosen.kind}
    for kind, x in _first_of_kinds(contenders(fits)).items():
        if kind not in seen:
            yield f"not measured: {x} ({format_bytes(x.bytes)}), predicted error {x.said}"
    ratios = [x.measured / x.candidate.predicted for x in drawn.measured if x.measured and x.candidate.predicted > 0]
    if len(ratios) > 1:
        mean = math.exp(float(np.mean(np.log(ratios))))
        yield (
            f"{len(drawn.points)} candidates considered, {len(ratios)} measured: their KL is {min(ratios):.2g} to "
            f"{max(ratios):.2g} times the predicted error ({mean:.2g} on average)"
        )
    yield from notes
