"""Candidates: everything that the registry can do to experts, with its exact size and its predicted error.

A candidate leaves experts (all, or fewer by a pruning or merging method) and keeps them in some bits (their own, or
those of a quantising method). Left out are methods that look at nothing (a choice by lot is no candidate), and those
that need passes over text of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from moekit import methods
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.fitting import FITTED
from moekit.layout import Layout
from moekit.methods import Method
from moekit.methods.common import Domain
from moekit.planning.outlook import Outlook
from moekit.planning.sizes import Sizes
from moekit.planning.ways import Space, Way
from moekit.planning.weights import look
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.recipe import Step
from moekit.stats import ALL_GROUPS, Stats

COUNTS = 12  # numbers of experts that are tried, beside those that just fit


def percent(share: float) -> str:
    """A share with two digits, however small: `0.0035%`."""
    return f"{float(f'{100 * share:.2g}'):.10g}%"


@dataclass(frozen=True)
class Candidate:
    """One thing to do.

    Attributes:
        steps: what a recipe would say; none for the model as it is.
        plan: all steps in one, to be applied live.
        keep: experts that a layer keeps.
        experts: experts that it has.
        kind: what is done to the number of experts, "" or "prune" or "merge", and bits of their weights after (a mean,
            where experts have different ones).
        rest: bits of what every token uses; 0: it stays.
        bytes: of the result, exactly.
        predicted: relative squared error of the blocks' outputs (`moekit.planning.outlook`).
    """

    steps: tuple[Step, ...]
    plan: Plan = field(repr=False)
    keep: int
    experts: int
    kind: tuple[str, float]
    rest: int
    bytes: int
    predicted: float

    def __str__(self) -> str:
        """`20 of 32 experts (easy-ep) at 4 bits (gptq-int4)`."""
        count = f"all {self.experts} experts" if self.keep == self.experts else f"{self.keep} of {self.experts} experts"
        by = {"": "", "prune": " ({})", "merge": " (merged by {})"}[self.kind[0]]
        rest = f", all else at {self.rest}" if self.rest else ""
        fitted = f" ({self.steps[-1].method})" if self.steps and self.steps[-1].method in FITTED else ""
        bits = f" at {self.kind[1]:g} bits{fitted}{rest}"
        return count + by.format(self.steps[0].method if self.steps else "") + bits

    @property
    def said(self) -> str:
        """The predicted error for people: `0.35%`."""
        return percent(self.predicted)

    def row(self) -> dict[str, object]:
        """Plain data."""
        return {
            "what": str(self),
            "steps": [x.model_dump(exclude_defaults=True) for x in self.steps],
            "bytes": self.bytes,
            "predicted": self.predicted,
        }


def reducing(layout: Layout) -> list[Method]:
    """Methods that leave fewer experts, decide from statistics, and can do so for this model.

    Experts that are quantised already cannot be merged.
    """
    known = [methods.get(name) for name in methods.names() if name not in FITTED]
    largest = max(layer.num_experts for layer in layout.routed)
    fit = [x for x in known if not x.most_experts or largest <= x.most_experts]
    kinds = ("prune",) if layout.quantisation else ("prune", "merge")
    return [x for x in fit if x.kind in kinds and x.needs]


def groups(layout: Layout) -> tuple[str, ...]:
    """The groups of statistics that all candidates' methods together need."""
    needed = {name for method in reducing(layout) for name in method.groups} | {"scores"}
    return tuple(x for x in ALL_GROUPS if x in needed)


def candidates(
    model: Model,
    stats: Stats,
    budget: int,
    *,
    space: Space | None = None,
    domain: Domain = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[list[Candidate], list[str]]:
    """Every candidate, with those of all sizes among them, and what was left out and why.

    Args:
        model: the source.
        stats: of it.
        budget: bytes; of each method and number of bits the most experts that fit are among the candidates.
        space: of the model; None: what stock transformers loads.
        domain: whose statistics count; None: all.
        seed: for methods that draw.
        progress: told of "weights" and "candidates".

    Raises:
        DataError: no such domain, or the statistics lack what predictions are made from.
    """
    space = space or Space(model)
    sizes, ways = space.sizes, space.ways
    able, lacking = _measured([] if sizes.cannot_drop else reducing(model.layout), stats)
    notes = [*space.notes, *lacking]
    weights = look(model, [op for way in ways for op in way.ops], progress)
    outlook = Outlook(model.layout, stats, weights, domain)
    out = []
    for number, (method, keep) in enumerate(wanted := list(_reductions(able, sizes, ways, budget))):
        try:
            plan = _reduced(method, keep, stats, model, domain, seed)
        except PlanError as error:  # a merge with more super experts than it keeps
            notes.append(f"not to {keep} experts by {method.name if method else 'nothing'}: {error.problem}")
            continue
        first = [Step(method=method.name, keep=keep, domain=_names(domain))] if method else []
        for way in ways:
            both = plan.model_copy(update={"ops": [*plan.ops, *way.ops]})
            steps = (*first, *([way.step] if way.step else []))
            kind = (method.kind if method else "", way.bits)
            size = sizes.of(keep, way.ops)
            out.append(Candidate(steps, both, keep, sizes.experts, kind, way.rest, size, outlook.error(both)))
        progress("candidates", number + 1, len(wanted))
    return out, notes


def _measured(able: Sequence[Method], stats: Stats) -> tuple[list[Method], list[str]]:
    """Methods whose statistics there are, and what the others lack."""
    there = set.intersection(*(set(layer.arrays) for layer in stats.layers.values()))
    lacking = {x.name: sorted(set(x.needs) - there) for x in able}
    notes = [f"without {name}: the statistics lack {', '.join(names)}" for name, names in lacking.items() if names]
    return [x for x in able if not lacking[x.name]], notes


def _reductions(
    able: Sequence[Method], sizes: Sizes, ways: Sequence[Way], budget: int
) -> Iterator[tuple[Method | None, int]]:
    """(method, experts to keep): nothing, then for each method a spread of numbers and those that just fit."""
    yield None, sizes.experts
    fewer = sizes.counts[:-1]
    if not fewer:
        return
    spread = {fewer[round(i)] for i in np.linspace(0, len(fewer) - 1, min(COUNTS, len(fewer)))}
    fitting = {max([n for n in fewer if sizes.of(n, way.ops) <= budget], default=fewer[0]) for way in ways}
    for method in able:
        for keep in sorted(spread | fitting, reverse=True):
            yield method, keep


def _reduced(method: Method | None, keep: int, stats: Stats, model: Model, domain: Domain, seed: int) -> Plan:
    if method is None:
        return Plan(layout_hash=model.layout.hash)
    return methods.make_plan(method.name, stats, model.layout, keep=keep, domain=domain, seed=seed)


def _names(domain: Domain) -> list[str] | None:
    return None if domain is None else [domain] if isinstance(domain, str) else list(domain)
