"""Pruning: remove the experts that matter least. A method scores every expert; what follows is the same for all.

A pruning method is a function `scores(stats, layer, domain, **options) -> [E]`, not negative, higher stays. Here the
budget is checked, super experts are protected, and the lowest scored go: equally many in each group of a layer. One
with `most_experts` chooses sets instead: `kept(stats, layer, keep, domain, protected, **options) -> Choice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moekit.errors import DataError
from moekit.layout import ExpertId, Layout, MoELayer
from moekit.methods import budget as budgets
from moekit.methods._registry import Method
from moekit.methods.common import Choice, Domain
from moekit.methods.super_experts import super_experts
from moekit.plans import Drop, Plan, drop_lowest
from moekit.stats import Stats

ENOUGH_TOKENS = 100  # routed to an average expert, for scores that another sample of the text would give too


def make_plan(
    method: Method,
    stats: Stats,
    layout: Layout,
    *,
    keep: float | int,
    domain: Domain,
    spread: str,
    protect: str,
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of a pruning method; arguments as for `moekit.methods.make_plan`, already checked.

    Raises:
        DataError: no such domain, a quantity that was not measured, or scores that are no numbers.
    """
    counts = budgets.uniform(layout, keep)
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)]
    safe = super_experts(stats, layout) if protect == "super" else frozenset()
    protected = {index: frozenset(x.expert for x in safe if x.layer == index) for index in counts}
    chosen: dict[int, Choice] = {}
    if method.most_experts:
        for layer in layout.routed:
            arguments = (stats, layer, counts[layer.index], domains, protected[layer.index])
            chosen[layer.index] = method(*arguments, **settings)
        drops = [_drop_others(x, chosen[x.index].kept) for x in layout.routed]
    else:
        scores = _scores(method, stats, layout, domains, settings)
        if spread == "global":
            counts = budgets.pooled(layout, keep, scores, protected)
        drops = [drop_lowest(x, scores[x.index].tolist(), counts[x.index], protected[x.index]) for x in layout.routed]
    plan = Plan(
        layout_hash=layout.hash,
        ops=[drop for drop in drops if drop],
        method=method.name,
        settings={"keep": keep, "spread": spread, "domain": domains, "protect": protect, **settings},
        made_from=dict(stats.manifest),
    )
    plan.check(layout)
    shares = removed_gate_mass(plan, stats, layout, domains)
    plan.measured = {"removed_gate_mass": {str(index): share for index, share in shares.items()}}
    if chosen:
        plan.measured["lost_output"] = {str(index): choice.lost for index, choice in chosen.items()}
    plan.notes = list(_notes(plan, stats, layout, domains, safe))
    return plan


def removed_gate_mass(plan: Plan, stats: Stats, layout: Layout, domain: Domain = None) -> dict[int, float]:
    """By layer, the share (0 to 1) of the routers' weight that goes to the experts that the plan drops.

    Raises:
        DataError: no such domain, or the gate mass was not measured.
    """
    dropped = {op.layer: op.experts for op in plan.ops if isinstance(op, Drop)}
    shares = {}
    for layer in layout.routed:
        mass_E = stats.get("gate_mass", layer.index, domain)
        shares[layer.index] = float(mass_E[list(dropped.get(layer.index, ()))].sum() / (mass_E.sum() or 1))
    return shares


def _drop_others(layer: MoELayer, kept: tuple[int, ...]) -> Drop | None:
    gone = tuple(e for e in range(layer.num_experts) if e not in kept)
    return Drop(layer=layer.index, experts=gone) if gone else None


def _scores(
    method: Method, stats: Stats, layout: Layout, domains: list[str], settings: Mapping[str, Any]
) -> dict[int, np.ndarray]:
    scores = {layer.index: method(stats, layer, domains, **settings) for layer in layout.routed}
    for index, score_E in scores.items():
        if not np.isfinite(score_E).all():
            raise DataError(
                f"layer {index}: the scores of {method.name!r} are not all numbers",
                where=ExpertId(index, int(np.flatnonzero(~np.isfinite(score_E))[0])),
                fix="the model overflows on this text in this dtype: measure again in bfloat16 or float32",
            )
    return scores


def _notes(plan: Plan, stats: Stats, layout: Layout, domains: list[str], safe: frozenset[ExpertId]) -> Iterator[str]:
    """What a reader of the plan should know before trusting it."""
    tokens = stats.token_count(domains)
    yield f"scored on {tokens:,} tokens of {', '.join(domains)}"
    enough = round(ENOUGH_TOKENS * max(layer.num_experts / layer.top_k for layer in layout.routed))
    if tokens < enough:
        yield f"warning: few tokens; take at least {enough:,}, {ENOUGH_TOKENS} for an average expert"
    dropped = plan.dropped()
    gone = {x for x in safe if x.expert in dropped.get(x.layer, ())}
    if plan.settings["protect"] == "super":
        yield f"super experts protected: {', '.join(map(str, sorted(safe - gone))) or 'none found'}"
    if gone:
        yield f"warning: super experts that the budget has no room for: {', '.join(map(str, sorted(gone)))}"
    cold = {x.index: int((stats.get("count", x.index, domains) == 0).sum()) for x in layout.routed}
    if total := sum(cold.values()):
        yield f"experts never routed to: {total} of {sum(x.num_experts for x in layout.routed)}"
    shares = removed_gate_mass(plan, stats, layout, domains)
    if lost := plan.measured.get("lost_output"):
        yield "lost output by layer: " + ", ".join(f"{index}: {share:.1%}" for index, share in lost.items())
    yield "removed gate mass by layer: " + ", ".join(f"{index}: {share:.1%}" for index, share in shares.items())
    if any(x.router.score == "softmax" and not x.router.renormalised for x in layout.routed) and dropped:
        yield "the routers do not renormalise the chosen weights: as experts leave the softmax, those of the rest grow"
    if len({len(plan.kept(layer)) for layer in layout.routed}) > 1:
        yield "layers keep different numbers of experts: stock transformers cannot load that; apply the plan live"
