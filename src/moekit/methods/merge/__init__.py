"""Merging: make one expert out of several alike. A method groups a layer's experts; what follows is the same for all.

A merging method is a function `groups(stats, layer, keep, domain, protected, **options)` that returns `keep` disjoint
lists of experts which together are all of them, the dominant one of each list first; with router groups (DeepSeek) a
list stays within one of these. Weights are the members' shares of the tokens routed to them, unless the method returns
`Group`s with weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.methods import budget as budgets
from moekit.methods._registry import Method
from moekit.methods.common import Domain, router_groups
from moekit.methods.super_experts import super_experts
from moekit.plans import AnyOp, Group, Merge, Plan
from moekit.stats import Stats


def make_plan(
    method: Method,
    stats: Stats,
    layout: Layout,
    *,
    keep: float | int,
    domain: Domain,
    spread: str,
    protect: str,
    router: Literal["dominant", "weighted"],
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of a merging method; arguments as for `moekit.methods.make_plan`, already checked.

    Raises:
        PlanError: more protected experts than a layer keeps, or statistics that only `moekit.fitting` takes.
    """
    if settings.get("sequential"):
        raise PlanError(
            f"{method.name!r} is to be decided layer by layer, which needs the model and not only its statistics",
            where="options.sequential",
            fix="use moekit compress or moekit.fitting.decide, or leave sequential out",
        )
    counts = budgets.uniform(layout, keep)
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)]
    safe = super_experts(stats, layout) if protect == "super" else frozenset()
    protected = {index: frozenset(x.expert for x in safe if x.layer == index) for index in counts}
    frequency = {layer.index: stats.get("count", layer.index, domains) for layer in layout.routed}
    if spread == "global":
        counts = budgets.pooled(layout, keep, frequency, protected)
    ops: list[AnyOp] = []
    largest = 1
    for layer in layout.routed:
        op = layer_merge(
            method, stats, layer, counts[layer.index], domains, protected[layer.index], router=router, settings=settings
        )
        if op is not None:
            largest = max([largest, *(len(group.members) for group in op.groups)])
            ops.append(op)
    tokens = stats.token_count(domains)
    notes = [f"scored on {tokens:,} tokens of {', '.join(domains)}", f"largest group: {largest} experts"]
    if safe:
        notes.append(f"super experts protected: {', '.join(map(str, sorted(safe)))}")
    if len(set(counts.values())) > 1:
        notes.append("layers keep different numbers of experts: stock transformers cannot load that; apply it live")
    return Plan(
        layout_hash=layout.hash,
        ops=ops,
        method=method.name,
        settings={"keep": keep, "spread": spread, "domain": domains, "protect": protect, "router": router, **settings},
        made_from=dict(stats.manifest),
        notes=notes,
    )


def _check_room(layer: MoELayer, keep: int, protected: frozenset[int]) -> None:
    """Refuse to keep so few that nobody is left to merge the others into: super experts stay alone.

    Raises:
        PlanError: see above.
    """
    places = keep // layer.router.groups
    for members in router_groups(layer):
        alone = len(protected.intersection(members.tolist()))
        if alone > places or (alone == places and alone < len(members)):
            raise PlanError(
                f"layer {layer.index} has super experts in all places that it keeps, and no other expert may join them",
                expected=f"at least {(alone + 1) * layer.router.groups}",
                got=keep,
                fix="keep more experts, or protect none",
            )


def layer_merge(
    method: Method,
    stats: Stats,
    layer: MoELayer,
    keep: int,
    domain: Domain,
    protected: frozenset[int],
    *,
    router: Literal["dominant", "weighted"],
    settings: Mapping[str, Any],
) -> Merge | None:
    """What a merging method does to one layer; None where all experts stay.

    Raises:
        PlanError: more protected experts than a layer keeps, or as many and nobody else to join.
    """
    _check_room(layer, keep, protected)
    frequency_E = stats.get("count", layer.index, domain)
    found = method(stats, layer, keep, domain, protected, **settings)
    groups = [x if isinstance(x, Group) else _group(x, frequency_E) for x in found]
    merged = tuple(x for x in groups if len(x.members) > 1)
    return Merge(layer=layer.index, groups=merged, router=router) if merged else None


def _group(members: list[int], frequency_E: np.ndarray) -> Group:
    counts = np.asarray(frequency_E, np.float64)[members]
    weights = counts / counts.sum() if counts.sum() else np.full(len(members), 1 / len(members))
    return Group(members=tuple(members), weights=tuple(weights.tolist()))
