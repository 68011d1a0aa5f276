"""Exact padding: layers that keep different numbers of experts, filled up with experts that nobody can choose.

Stock transformers builds every layer with as many experts. A layer that keeps fewer than the largest is written with
experts of zeros behind its own, whose router bias is so low that they are never chosen. Nothing that the model computes
changes, nothing is saved beyond the largest layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.base import Op

BIAS = -1e4  # of a logit or of a score; far below all that routers compute, and within float16
Slots = tuple[int | None, ...]  # the experts of a written layer by their old numbers; None: of zeros


def slots(layer: MoELayer, kept: tuple[int, ...], count: int) -> Slots:
    """The places of a written layer with `count` experts; with router groups each group is filled up at its end."""
    groups, out = layer.router.groups, list[int | None]()
    size = layer.num_experts // groups
    for group in range(groups):
        own = [e for e in kept if e // size == group]
        out += [*own, *[None] * (count // groups - len(own))]
    return tuple(out)


def check_paddable(layout: Layout) -> None:
    """Refuse a model in which experts that nobody chooses would not go unnoticed.

    Raises:
        PlanError: a layer whose router has no bias, or whose scores depend on experts that are not chosen.
    """
    for layer in layout.routed:
        router = layer.router
        table = router.order.startswith("table")  # it names no expert of zeros
        alone = not router.score.startswith("softmax") or router.renormalised or router.order.startswith("top-k")
        if not (table or router.logit_bias or (router.correction_bias and alone)):
            raise PlanError(
                "layers of this family cannot be filled up with experts that are never chosen",
                where=f"layer {layer.index}",
                expected="a router with a bias for each expert, as in gpt-oss or DeepSeek-V3, and scores that do not "
                "depend on the other experts",
                got=router.describe(),
                fix="use spread: uniform",
            )


def check_padded_alone(ops: Sequence[Op]) -> None:
    """Refuse to fill up layers whose weights get a form of their own.

    Raises:
        PlanError: there is such an op.
    """
    others = sorted({str(getattr(op, "op", "")) for op in ops} - {"drop", "merge", "values"})
    if others:
        raise PlanError(
            "layers are filled up in a plan that does nothing but drop, merge and heal",
            got=", ".join(others),
            fix="make it two steps",
        )
