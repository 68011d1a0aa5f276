"""What is wrong with a plan, or a budget, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.ops import OUTER, UNQUANTISED, Drop, Merge, Op, Quantize, QuantizeDense, Values

STOCK_WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # bits that stock transformers reads; with one there is no level above zero


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


def check_no_constants(merge: Merge, layer: MoELayer) -> None:
    """Refuse to merge an expert that is a constant vector: it has no weights.

    Raises:
        PlanError: there is one in a group.
    """
    found = sorted({e for group in merge.groups for e in group.members} & set(layer.constants))
    if found:
        raise PlanError(
            "an expert that is a constant cannot be merged",
            where=f"layer {layer.index}",
            got=found,
            fix="merge first, then let constants stand for what is left over",
        )


def check_quantised(ops: Sequence[Op], layout: Layout, tensors: str) -> None:
    """Refuse what cannot be quantised, or not in the form that is asked for.

    Raises:
        PlanError: a layer twice or unknown, a model that is quantised already, a group size that does not divide the
            experts' widths, bits that the form has not, two forms, numbers that the plan should carry and does not.
    """
    experts = [op for op in ops if isinstance(op, Quantize)]
    dense = [op for op in ops if isinstance(op, QuantizeDense)]
    for layers in ([op.layer for op in experts], [op.layer for op in dense]):
        if len(set(layers)) < len(layers):
            raise PlanError("a layer can be quantised once", got=sorted(layers))
    constants = any(layer.constants for layer in layout.layers)  # then in the own form, and maybe nothing is packed
    if layout.quantisation and not constants:
        raise PlanError(
            "this model is quantised already", got=layout.quantisation, fix="start from the unquantised checkpoint"
        )
    rounding: list[Quantize | QuantizeDense] = [*experts, *dense]
    if len({op.format for op in rounding}) > 1:
        raise PlanError("a model is written in one packed form", got=sorted({op.format for op in rounding}))
    if any(op.scheme == "gptq" for op in rounding):
        check_carried(tensors)
    for op in experts:
        _check_experts(op, layout)
    for other in dense:
        if not OUTER <= other.layer < layout.num_layers or other.group_size == 0:
            raise PlanError(f"layer {other.layer} cannot be quantised so", got=other.model_dump())
    if layout.tied_embeddings and any("head" in op.bits for op in dense):
        raise PlanError(
            "the output head is the input embedding: there is one tensor for both", fix="give bits to the embeddings"
        )
    if rounding and rounding[0].format == "compressed-tensors":
        if constants:
            raise PlanError(
                "some experts of this model are constants, which stock transformers has no form for",
                fix="write it in moekit's own form (format: moekit)",
            )
        _check_stock(experts, dense, layout)


def _check_experts(op: Quantize, layout: Layout) -> None:
    layer = layout.by_index.get(op.layer)
    if layer is None or layer.mtp:
        raise PlanError(f"layer {op.layer} cannot be quantised", expected=f"one of {[x.index for x in layout.routed]}")
    size = op.group_size
    if size == 0 or (size > 0 and (layer.width % size or layer.inner_size % size)):
        raise PlanError(
            f"layer {op.layer}: the group size does not divide the widths of its experts",
            expected=f"a divisor of {layer.width} and {layer.inner_size}, or -1",
            got=size,
        )
    if not isinstance(op.bits, int) and len(op.bits) != layer.num_experts:
        raise PlanError(
            f"layer {op.layer}: bits are not given for each of its experts",
            expected=f"{layer.num_experts} numbers, or one for all",
            got=len(op.bits),
        )


def _check_stock(experts: Sequence[Quantize], dense: Sequence[QuantizeDense], layout: Layout) -> None:
    """What stock transformers reads of compressed-tensors: one width for all experts, 2 to 8 bits, no embeddings."""
    widths = {b for op in experts for b in op.widths(range(layout.by_index[op.layer].num_experts))}
    others = {b for op in dense for b in op.bits.values()} - {UNQUANTISED}
    if len(widths) > 1 or not (widths | others) <= set(STOCK_WIDTHS):
        raise PlanError(
            "stock transformers cannot read these bits from compressed-tensors",
            expected=f"one of {', '.join(map(str, STOCK_WIDTHS))} for all experts of the model",
            got=f"experts with {', '.join(map(str, sorted(widths)))} bits"
            + (f", other weights with {', '.join(map(str, sorted(others)))}" if others else ""),
            fix="write it in moekit's own form (format: moekit), or choose one width",
        )
    if not experts:
        raise PlanError(
            "stock transformers cannot read a model of which all but the experts is packed", fix="use format: moekit"
        )
    packed = {part for op in dense for part, bits in op.bits.items() if bits != UNQUANTISED}
    if "embeddings" in packed:
        raise PlanError(
            "stock transformers cannot read packed input embeddings",
            fix="leave embeddings at 16 bits, or write it in moekit's own form (format: moekit)",
        )


def check_values(ops: Sequence[Op], tensors: str) -> None:
    """Refuse new values that are not there.

    Raises:
        PlanError: a layer twice, or no folder of tensors.
    """
    layers = [op.layer for op in ops if isinstance(op, Values)]
    if len(set(layers)) < len(layers):
        raise PlanError("a layer is given new values twice", got=sorted(layers))
    check_carried(tensors)


def check_carried(tensors: str) -> None:
    """Refuse a plan whose numbers are not there.

    Raises:
        PlanError: no folder of tensors.
    """
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
