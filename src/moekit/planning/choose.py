"""plan_for_budget: the best model that fits into so many bytes, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moekit.data import Dataset
from moekit.errors import PlanError
from moekit.evaluation import evaluate
from moekit.evaluation.compare import Subject
from moekit.families.model import Model
from moekit.planning.candidates import Candidate, candidates
from moekit.planning.frontier import Frontier, frontier
from moekit.planning.refine import Fitting, fitted
from moekit.planning.shortlist import shortlist
from moekit.planning.ways import Formats, Space
from moekit.planning.words import explain
from moekit.progress import Progress, silent
from moekit.recipe import Step, format_bytes
from moekit.stats import Stats


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
    domain: str | list[str] | None = None,
    measure: int = 4,
    fitting: Fitting | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Choice:
    """Choose what to do to a model so that its tensors have at most so many bytes.

    Every candidate's size is exact and its error predicted (`moekit.planning.outlook`); the few that may be the best
    are measured, applied live, and the one with the lowest KL divergence from the source is taken, or what fitting to
    the text makes of it.

    Args:
        model: the source.
        stats: of it, with the groups that `moekit.planning.groups` names; methods that need more are left out.
        data: to measure on, not what the statistics are of (see `moekit.planning.hold_out`).
        budget_bytes: of the result's tensors, at most.
        formats: of quantised weights: "stock": what stock transformers loads; "moekit": moekit's own packed form.
        domain: whose statistics count and whose text is measured; None: all.
        measure: candidates to measure; 0: trust the predictions.
        fitting: what methods may use that need passes over text, which are tried on the choice; None: they are not.
        seed: for methods that draw.
        dtype: to measure in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told of "weights", "candidates", "measured", and of layers.

    Raises:
        PlanError: nothing that is known fits.
        DataError: no such domain, or statistics without the group "scores".
    """
    source, names = model.checkpoint.bytes, [domain] if isinstance(domain, str) else domain
    if budget_bytes >= source:
        said = f"the model has {format_bytes(source)}, the budget is {format_bytes(budget_bytes)}: nothing to do"
        return Choice((), Frontier((), source, budget_bytes), (said,))
    space = check_budget(model, budget_bytes, formats)
    found, notes = candidates(model, stats, budget_bytes, space=space, domain=names, seed=seed, progress=progress)
    fits = [x for x in found if x.bytes <= budget_bytes]
    if not fits:  # what only statistics can tell: a method refused the one number of experts that fits
        raise PlanError(
            "no plan fits into the budget", where="budget", got=format_bytes(budget_bytes), fix="; ".join(notes)
        )
    text = data if names is None else _of_domains(data, names)

    def kl(candidate: Candidate) -> float:
        subject = Subject(model, candidate.plan)
        scores = evaluate(subject, text, against=model, dtype=dtype, device=device, progress=progress)
        return float(np.mean([x.kl.value for x in scores.domains.values() if x.kl]))

    measured = []
    for number, candidate in enumerate(short := shortlist(fits, measure)):
        measured.append((candidate, kl(candidate)))
        progress("measured", number + 1, len(short))
    chosen = min(measured, key=lambda x: x[1])[0] if measured else min(fits, key=lambda x: (x.predicted, x.bytes))
    if fitting is not None and measured:
        for candidate in fitted(
            chosen,
            space,
            model,
            stats,
            budget_bytes,
            fitting,
            formats=formats,
            domain=names,
            dtype=dtype,
            device=device,
            progress=progress,
        ):
            found.append(candidate)
            measured.append((candidate, kl(candidate)))
        chosen = min(measured, key=lambda x: x[1])[0]
    drawn = frontier(found, measured, chosen, source, budget_bytes)
    return Choice(chosen.steps, drawn, tuple(explain(drawn, fits, sum(text.tokens.values()), notes)))


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


def _of_domains(data: Dataset, names: list[str]) -> Dataset:
    numbers = {data.domains.index(name): i for i, name in enumerate(names)}
    batches = [replace(x, domain=numbers[x.domain]) for x in data.batches if x.domain in numbers]
    return replace(data, domains=tuple(names), batches=batches)
