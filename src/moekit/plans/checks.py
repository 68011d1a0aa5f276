"""What is wrong with a plan, or a budget, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.ops import Drop, Merge, Op, Quantize, Values


def check_merge(merge: Merge, ops: Sequence[Op]) -> None:
    """Refuse a merge whose groups contradict themselves or another op.

    Raises:
        PlanError: groups that overlap or have one member, weights that do not sum to 1, an expert that is also dropped.
    """
    where = f"layer {merge.layer}"
    members = [e for group in merge.groups for e in group.members]
    if len(members) != len(set(members)) or any(len(group.members) < 2 for group in merge.groups):
        raise PlanError("groups to merge must be disjoint and have at least two experts", where=where)
    for group in merge.groups:
        if len(group.weights) != len(group.members) or abs(sum(group.weights) - 1) > 1e-6 or min(group.weights) < 0:
            raise PlanError("weights of a merged group must sum to 1", where=where, got=list(group.weights))
    others = [op for op in ops if op is not merge and op.layer == merge.layer]
    if any(isinstance(op, Merge) for op in others):
        raise PlanError("a layer can be merged once", where=where)
    dropped = {e for op in others if isinstance(op, Drop) for e in op.experts}
    if dropped & set(members):
        raise PlanError("an expert cannot be dropped and merged", where=where, got=sorted(dropped & set(members)))


def check_quantised(quantised: Mapping[int, Quantize], ops: Sequence[Op], layout: Layout) -> None:
    """Refuse what cannot be quantised.

    Raises:
        PlanError: a layer twice or unknown, a model that is quantised already, a group size that does not divide the
            experts' widths.
    """
    if sum(isinstance(op, Quantize) for op in ops) != len(quantised):
        raise PlanError("a layer can be quantised once", got=sorted(op.layer for op in ops if isinstance(op, Quantize)))
    if layout.quantisation:
        raise PlanError(
            "this model is quantised already", got=layout.quantisation, fix="start from the unquantised checkpoint"
        )
    for index, op in quantised.items():
        layer = layout.by_index.get(index)
        if layer is None or layer.mtp:
            raise PlanError(f"layer {index} cannot be quantised", expected=f"one of {[x.index for x in layout.routed]}")
        size = op.group_size
        if size == 0 or (size > 0 and (layer.width % size or layer.inner_size % size)):
            raise PlanError(
                f"layer {index}: the group size does not divide the widths of its experts",
                expected=f"a divisor of {layer.width} and {layer.inner_size}, or -1",
                got=size,
            )


def check_values(ops: Sequence[Op], tensors: str) -> None:
    """Refuse new values that are not there.

    Raises:
        PlanError: a layer twice, or no folder of tensors.
    """
    layers = [op.layer for op in ops if isinstance(op, Values)]
    if len(set(layers)) < len(layers):
        raise PlanError("a layer is given new values twice", got=sorted(layers))
    if not tensors or not Path(tensors).is_dir():
        raise PlanError(
            "the numbers that this plan carries are not there",
            where=tensors or "tensors",
            fix="keep the folder of tensors beside the plan, or make the plan again",
        )


def check_droppable(layout: Layout) -> None:
    """Refuse a model that no expert can be removed from.

    Raises:
        PlanError: with the reason.
    """
    if layout.cannot_drop:
        raise PlanError(
            f"experts cannot be removed from models of the family {layout.family!r}",
            got=layout.cannot_drop,
            fix="see docs/families.md for what moekit can do with it",
        )


def check_feasible(layer: MoELayer, kept: tuple[int, ...]) -> None:
    """Refuse a choice of experts that the layer's router cannot work with.

    Raises:
        PlanError: fewer than top_k left; with groups: unequal groups, or too few experts in the kept groups.
    """
    router, k = layer.router, layer.top_k
    if len(kept) < k:
        raise PlanError(
            f"layer {layer.index} chooses {k} experts for every token, but only {len(kept)} would be left",
            expected=f"at least {k} of {layer.num_experts}",
            got=len(kept),
            fix=_keep_more(k, layer.num_experts),
        )
    if router.groups > 1:
        size = layer.num_experts // router.groups
        per_group = [sum(e // size == g for e in kept) for g in range(router.groups)]
        if len(set(per_group)) > 1:
            raise PlanError(
                f"layer {layer.index} routes in {router.groups} groups: each must keep equally many experts",
                got=per_group,
                fix="drop the same number in every group",
            )
        if per_group[0] < 2 or per_group[0] * router.groups_kept < k:
            need = max(2, -(-k // router.groups_kept))
            raise PlanError(
                f"layer {layer.index} would have {per_group[0]} experts in a group",
                expected=f"at least {need} (2 for the group score, {k} in {router.groups_kept} groups for top-k)",
                got=per_group[0],
                fix=_keep_more(need * router.groups, layer.num_experts),
            )


def _keep_more(least: int, num_experts: int) -> str:
    return f"keep at least {least} experts a layer, or {math.ceil(100 * least / num_experts)}%"
