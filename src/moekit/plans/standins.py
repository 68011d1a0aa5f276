"""Constant vectors in the place of experts: what a plan says of them, and what can be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moekit.errors import PlanError
from moekit.layout import ExpertId, Layout, MoELayer
from moekit.plans.base import Op

OWN = "moekit"


class Replace(Op):
    """Let constant vectors stand for experts of a layer: the router goes on choosing them.

    The vectors lie in the plan's tensors, under `constant_name`, each [D].

    Attributes:
        layer: decoder layer index.
        experts: the experts, ascending.
        format: how it is written. "stock": weights of zero and the vector as bias, for experts that have one; of the
            same size, and stock transformers loads it. "moekit": the weights are left out and the vector lies in their
            place (docs/packed-format.md); smaller, and moekit loads it.
    """

    op: Literal["replace"] = "replace"
    layer: int
    experts: tuple[int, ...]
    format: Literal["stock", "moekit"] = "moekit"


def constant_name(layer: MoELayer, expert: int) -> str:
    """The name of the vector that stands for an expert, in a plan's tensors and in files of moekit's own form."""
    return f"{layer.experts_path}.{expert}.constant"


def check_replaced(ops: Sequence[Op], layout: Layout, tensors: str) -> None:
    """Refuse stand-ins that cannot be, or whose vectors are not there.

    Raises:
        PlanError: see `check_stand_ins`; or no folder of tensors.
    """
    if not any(isinstance(op, Replace) for op in ops):
        return
    check_stand_ins(ops, layout)
    if not tensors or not Path(tensors).is_dir():
        raise PlanError(
            "the vectors that this plan carries are not there",
            where=tensors or "tensors",
            fix="keep the folder of tensors beside the plan, or make the plan again",
        )


def check_stand_ins(ops: Sequence[Op], layout: Layout) -> None:
    """Refuse stand-ins that cannot be, wherever their vectors are.

    Raises:
        PlanError: an unknown layer or expert, one that is a constant already, experts without bias in the stock form,
            all experts of a layer, a model that is quantised for stock transformers.
    """
    replaces = [op for op in ops if isinstance(op, Replace)]
    if len({op.layer for op in replaces}) < len(replaces):
        raise PlanError("a layer is given stand-ins twice", got=sorted(op.layer for op in replaces))
    for op in replaces:
        layer = layout.by_index.get(op.layer)
        if layer is None or layer.mtp:
            raise PlanError(
                f"layer {op.layer} is no MoE layer of this model", expected=f"one of {[x.index for x in layout.routed]}"
            )
        _check_experts(op, layer)
        if op.format == "stock" and not layer.output_bias:
            raise PlanError(
                "stock transformers has no place for a constant in the experts of this family: they have no bias",
                where=f"layer {op.layer}",
                expected="a bias behind the experts' down projection, as in gpt-oss",
                fix="write it in moekit's own form (format: moekit), which moekit runs, or prune the experts instead",
            )
        if op.format == OWN and layout.quantisation not in (None, OWN):
            raise PlanError(
                f"a model that is quantised as {layout.quantisation} cannot be written in moekit's own form",
                fix="start from the unquantised checkpoint; quantise the result",
            )


def _check_experts(op: Replace, layer: MoELayer) -> None:
    where = f"layer {op.layer}"
    if not op.experts or list(op.experts) != sorted(set(op.experts)):
        raise PlanError("the experts to replace must be named once each, ascending", where=where, got=list(op.experts))
    if op.experts[0] < 0 or op.experts[-1] >= layer.num_experts:
        raise PlanError(
            f"layer {op.layer} has no such expert", expected=f"0 to {layer.num_experts - 1}", got=list(op.experts)
        )
    if known := set(op.experts) & set(layer.constants):
        raise PlanError("this expert is a constant already", where=str(ExpertId(op.layer, min(known))))
    if len(op.experts) + len(layer.constants) >= layer.num_experts:
        raise PlanError("one expert of a layer must stay", where=where, got=f"{len(op.experts)} to replace")


def check_alone(ops: Sequence[Op]) -> None:
    """Refuse to write stand-ins along with anything else, or in two forms.

    Raises:
        PlanError: there is such an op.
    """
    formats = {op.format for op in ops if isinstance(op, Replace)}
    others = sorted({type(op).__name__ for op in ops if not isinstance(op, Replace)})
    if formats and others:
        raise PlanError(
            "stand-ins are written by a plan of their own",
            got=f"also {', '.join(others)}",
            fix="make it two steps, or apply the plan live",
        )
    if len(formats) > 1:
        raise PlanError("stand-ins are written in one form", got="stock and moekit")
