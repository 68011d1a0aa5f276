"""Merging: make one expert out of several alike. A method groups a layer's experts; what follows is the same for all.

A merging method is a function `groups(stats, layer, keep, domain, protected, **options)` that returns `keep` disjoint
lists of experts which together are all of them, the dominant one of each list first; with router groups (DeepSeek) a
list stays within one of these. Weights are the members' shares of the tokens routed to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from moekit.errors import PlanError
from moekit.layout import Layout
from moekit.methods import budget as budgets
from moekit.methods._registry import Method
from moekit.methods.common import Domain
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
        PlanError: more protected experts than a layer keeps.
    """
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
        if len(protected[layer.index]) > counts[layer.index] // layer.router.groups:
            raise PlanError(
                f"layer {layer.index} has more super experts than it keeps",
                expected=f"at least {len(protected[layer.index])}",
                got=counts[layer.index],
                fix="keep more experts, or protect none",
            )
        found = method(stats, layer, counts[layer.index], domains, protected[layer.index], **settings)
        merged = tuple(_group(members, frequency[layer.index]) for members in found if len(members) > 1)
        largest = max([largest, *(len(group.members) for group in merged)])
        if merged:
            ops.append(Merge(layer=layer.index, groups=merged, router=router))
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


def _group(members: list[int], frequency_E: np.ndarray) -> Group:
    counts = np.asarray(frequency_E, np.float64)[members]
    weights = counts / counts.sum() if counts.sum() else np.full(len(members), 1 / len(members))
    return Group(members=tuple(members), weights=tuple(weights.tolist()))
