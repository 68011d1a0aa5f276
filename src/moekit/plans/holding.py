"""What a checkpoint can hold of steering: numbers in routers and experts that do for every token what a plan asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.base import Op


class Hold(Op):
    """Steer a layer by its weights, for all tokens: in the order of the attributes.

    Attributes:
        layer: decoder layer index.
        biases: by expert, what is added to the bias of its router's logit.
        bans: experts that are never chosen: the bias of their logit or score is far below all others.
        swaps: pairs of experts that change places: their router rows do.
        factors: by expert, what its output is multiplied with, in its last projection.
    """

    op: Literal["hold"] = "hold"
    layer: int
    biases: dict[int, float] = Field(default_factory=dict)
    bans: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()
    factors: dict[int, float] = Field(default_factory=dict)

    @property
    def experts(self) -> set[int]:
        """All experts that it is about."""
        return {*self.biases, *self.bans, *self.factors, *(e for pair in self.swaps for e in pair)}


def check_held(ops: Sequence[Op], layout: Layout) -> None:
    """Refuse what a layer's weights cannot hold.

    Raises:
        PlanError: a layer twice or unknown, an expert that does not exist, or a reason of `why_not`.
    """
    held = [op for op in ops if isinstance(op, Hold)]
    if len({op.layer for op in held}) < len(held):
        raise PlanError("a layer is steered by its weights once", got=sorted(op.layer for op in held))
    for op in held:
        layer = layout.by_index.get(op.layer)
        if layer is None or layer.mtp:
            raise PlanError(f"layer {op.layer} is no MoE layer", expected=f"one of {[x.index for x in layout.routed]}")
        if op.experts and not 0 <= min(op.experts) <= max(op.experts) < layer.num_experts:
            raise PlanError(f"layer {op.layer} has no such expert", got=sorted(op.experts))
        reasons = [
            why_not_biases(layer) if op.biases else "",
            why_not_bans(layer) if op.bans else "",
            why_not_factors(layer, layout, op.factors) if op.factors else "",
            *(why_not_swap(layer, *pair) for pair in op.swaps),
        ]
        if reason := next(filter(None, reasons), ""):
            raise PlanError("this model's files cannot hold that", where=f"layer {op.layer}", got=reason)


def why_not_biases(layer: MoELayer) -> str:
    """Why a bias of a logit cannot be written; "" when it can."""
    if layer.router.logit_bias and not layer.tables:
        return ""
    if layer.router.correction_bias:
        return "its routers have a correction bias, which changes the choice and not the weight"
    return "its routers have no bias"


def why_not_bans(layer: MoELayer) -> str:
    """Why an expert cannot be kept from being chosen by a bias; "" when it can."""
    router = layer.router
    if layer.tables:
        return "its experts are chosen by a table"
    alone = not router.score.startswith("softmax") or router.renormalised or router.order.startswith("top-k")
    if router.logit_bias or (router.correction_bias and alone):
        return ""
    return "its routers have no bias" if not router.correction_bias else "weights depend on experts not chosen"


def why_not_swap(layer: MoELayer, one: int, other: int) -> str:
    """Why the router rows of two experts cannot change places; "" when they can."""
    size = layer.num_experts // layer.router.groups
    if layer.tables:
        return "its experts are chosen by a table"
    return "" if one // size == other // size else f"experts {one} and {other} are in different groups of the router"


def why_not_factors(layer: MoELayer, layout: Layout, factors: Sequence[int] | dict[int, float]) -> str:
    """Why experts' outputs cannot be multiplied in their weights; "" when they can."""
    if layer.router.weighs_input:
        return "weights multiply its experts' input, not their output"
    if layout.quantisation:
        return f"its experts are quantised ({layout.quantisation})"
    if constant := set(factors) & set(layer.constants):
        return f"experts {sorted(constant)} are constants"
    return ""
