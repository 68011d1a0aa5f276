"""What the report of a run says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from moekit.evaluation.coverage import Coverage, coverage
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.measurement import versions
from moekit.pipeline.result import Done, Result
from moekit.plans import Plan
from moekit.stats import Stats


def report_of(model: Model, result: Result, recipe: str = "") -> Mapping[str, object]:
    """Everything that the report says, as plain data.

    Args:
        model: the source, before all steps.
        result: what was made of it.
        recipe: YAML of the whole job.
    """
    layout, plan, baked = model.layout, result.plan, result.baked
    plans = [x.plan for x in result.steps] or [plan]
    several = len(plans) > 1
    notes = [(number, note) for number, x in enumerate(plans, 1) for note in x.notes]
    return {
        "model": {
            "name": model.name,
            "family": layout.family,
            "fingerprint": model.fingerprint,
            "layout": layout.hash,
            "layers": len(layout.routed),
            "experts": layout.routed[0].num_experts,
        },
        "recipe": recipe,
        "method": ", ".join(x.method for x in plans),
        "kind": plan.kind,
        "kinds": list(dict.fromkeys(x.kind for x in plans)),
        "settings": plan.settings,
        "steps": [_step(x) for x in result.steps],
        "kept": {str(index): experts for index, experts in kept_of_source(layout, plans).items()},
        "bytes": {"before": baked.bytes_before, "after": baked.bytes_after} if baked else None,
        "removed_gate_mass": removed_gate_mass(plans),
        "notes": [
            *(f"step {number}, {note}" if several else note for number, note in notes),
            *(result.coverage.warnings() if result.coverage else ()),
            *(baked.notes if baked else ()),
        ],
        "calibration": plans[0].made_from.get("data"),
        "verification": asdict(result.verification) if result.verification else None,
        "evaluation": result.evaluation.to_dict() if result.evaluation else None,
        "coverage": result.coverage.to_dict() if result.coverage else None,
        "seconds": result.seconds,
        "versions": versions(),
    }


def _step(done: Done) -> dict[str, object]:
    """A row of the report: one step."""
    plan, baked = done.plan, done.baked
    return {
        "method": plan.method,
        "kind": plan.kind,
        "settings": plan.settings,
        "bytes": {"before": baked.bytes_before, "after": baked.bytes_after} if baked else None,
        "verification": asdict(done.verification) if done.verification else None,
        "notes": plan.notes,
    }


def kept_of_source(layout: Layout, plans: list[Plan]) -> dict[int, list[int]]:
    """By layer, the experts of the source that still have a place after all plans; a merged group's dominant one."""
    kept = {layer.index: list(range(layer.num_experts)) for layer in layout.routed}
    for plan in plans:
        for index, gone in plan.dropped_live(layout).items():
            kept[index] = [expert for place, expert in enumerate(kept[index]) if place not in set(gone)]
    return kept


def covered(layout: Layout, plans: Sequence[Plan], calibration: Stats, usage: Stats | None) -> Coverage:
    """How far the statistics of the source hold that the first plan was decided from.

    Args:
        layout: of the source.
        plans: of all steps.
        calibration: statistics of the source.
        usage: of the source on evaluation text; None: there is none.
    """
    domains = plans[0].settings.get("domain") or calibration.domains
    return coverage(calibration, layout, dropped_of_source(layout, plans), list(domains), usage)


def dropped_of_source(layout: Layout, plans: Sequence[Plan]) -> dict[int, set[int]]:
    """By layer, the experts of the source that some plan dropped or put a constant in the place of; those merged into
    others go with the merged one.
    """
    holds = {layer.index: [{expert} for expert in range(layer.num_experts)] for layer in layout.routed}
    dropped: dict[int, set[int]] = {}
    for plan in plans:
        merges = plan.merges()
        for index, op in plan.replaced().items():
            if index in holds:  # no multi-token-prediction layer
                dropped.setdefault(index, set()).update(*(holds[index][place] for place in op.experts))
        for index, gone in plan.dropped_live(layout).items():
            merge, held = merges.get(index), holds[index]
            for group in merge.groups if merge else ():
                held[group.members[0]] = set().union(*(held[e] for e in group.members))
            lost = set(gone) - set(merge.gone if merge else ())
            dropped.setdefault(index, set()).update(*(held[place] for place in lost))
            holds[index] = [x for place, x in enumerate(held) if place not in gone]
    return dropped


def removed_gate_mass(plans: list[Plan]) -> dict[str, float]:
    """By layer, the share of the source's gate mass that went to experts which some plan dropped.

    Each plan knows the share of what was left to it: shares that stay multiply.
    """
    stays: dict[str, float] = {}
    for plan in plans:
        for index, share in plan.measured.get("removed_gate_mass", {}).items():
            stays[index] = stays.get(index, 1.0) * (1 - share)
    return {index: 1 - share for index, share in stays.items()}
