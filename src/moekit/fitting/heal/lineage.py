"""Which experts of the source an expert of a changed model is made of, from the plans that lie beside its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from moekit.apply.bake import PLAN, PROVENANCE
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.plans import Plan

Groups = dict[int, list[tuple[int, ...]]]


def origins(source: Model, model: Model) -> Groups:
    """For each MoE layer, for each expert of `model`, the experts of `source` that it is made of.

    Raises:
        PlanError: the plans between the two are not there, or are of other models.
    """
    if model.fingerprint == source.fingerprint:
        return follow(source.layout, [])
    found = follow(source.layout, _plans(source, model.path))
    wanted = {layer.index: layer.num_experts for layer in model.layout.routed}
    if {index: len(groups) for index, groups in found.items()} != wanted:
        raise _unknown(model, "plans that leave another number of experts")
    return found


def follow(layout: Layout, plans: Iterable[Plan]) -> Groups:
    """The same from the source's layout and the plans, first to last.

    An expert that was merged into another goes where that one goes; a dropped one is in none.
    """
    groups: Groups = {layer.index: [(e,) for e in range(layer.num_experts)] for layer in layout.routed}
    for plan in plans:
        gone, merges = plan.dropped(), plan.merges()
        for index, before in groups.items():
            after = list(before)
            for group in merges[index].groups if index in merges else ():
                after[group.members[0]] = tuple(e for member in group.members for e in before[member])
            groups[index] = [x for place, x in enumerate(after) if place not in set(gone.get(index, ()))]
    return groups


def _plans(source: Model, folder: Path) -> Sequence[Plan]:
    """All plans between the source and the model in a folder."""
    try:
        record = json.loads((folder / PROVENANCE).read_text())
        plans = [Plan.model_validate(x) for x in record.get("plans", ())] or [Plan.load(folder / PLAN)]
    except (OSError, ValueError, PlanError) as error:
        raise PlanError(
            "it is not known which experts of the source this model's are",
            where=folder,
            expected=f"{PROVENANCE} and {PLAN}, which moekit writes beside the weights",
            got=str(error)[:200],
            fix="prune or merge with moekit, and heal what it has written",
        ) from None
    if record["source"]["fingerprint"] != source.fingerprint:
        got = record["source"].get("name", "another")
        raise PlanError(
            "the model was not made of the one that it is to learn from",
            where=folder,
            expected=source.name,
            got=got,
            fix="give the model that it was made of as teacher",
        )
    return plans


def _unknown(model: Model, got: str) -> PlanError:
    return PlanError(
        "it is not known which experts of the source this model's are",
        where=model.path,
        got=got,
        fix="prune or merge with moekit, and heal what it has written",
    )
