"""Running fewer experts for tokens that need fewer: decided token by token, so no file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from moekit.errors import PlanError
from moekit.layout import Layout
from moekit.plans.base import Op


class Odp(Op):
    """Online dynamic pruning: a token's experts that weigh little beside its first are not run.

    Attributes:
        layer: decoder layer index.
        beta: an expert whose weight is below `beta` times the token's largest is not run.
        protect: share of a text's tokens, the most important ones, that keep all their experts.
        importance: what a token's importance is. "attention": the sum of |x| over the input of the block times the mean
            attention that the token receives; "norm": the sum of |x| alone; "none": nothing is protected.
        renormalise: the weights that are left keep the sum of all.
    """

    op: Literal["odp"] = "odp"
    layer: int
    beta: float = Field(ge=0, le=1)
    protect: float = Field(default=0.02, ge=0, le=1)
    importance: Literal["attention", "norm", "none"] = "attention"
    renormalise: bool = True


def check_dynamic(ops: Sequence[Op], layout: Layout) -> None:
    """Refuse dynamic pruning of a layer that is not there, or twice.

    Raises:
        PlanError: there is such an op.
    """
    found = [op.layer for op in ops if isinstance(op, Odp)]
    for index in found:
        layer = layout.by_index.get(index)
        if layer is None or layer.mtp:
            raise PlanError(
                f"layer {index} is no MoE layer of this model", expected=f"one of {[x.index for x in layout.routed]}"
            )
    if len(set(found)) < len(found):
        raise PlanError("a layer is pruned dynamically twice", got=sorted(found))


def check_no_dynamics(ops: Sequence[Op]) -> None:
    """Refuse to write what is decided for each token anew.

    Raises:
        PlanError: there is dynamic pruning among the ops.
    """
    if any(isinstance(op, Odp) for op in ops):
        raise PlanError(
            "dynamic pruning is decided for each token as it runs, and no checkpoint holds it",
            fix="keep the plan beside the model and apply it live: moekit eval MODEL --plan plan.json",
        )
