"""Ops that change what routers choose and how much it weighs, and no weight: applied live, and undone on leaving."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.base import Op

Action = Literal["ban", "force", "bias", "scale", "swap"]
Part = Literal["all", "prompt", "generated", "span"]


class Scope(BaseModel):
    """The tokens of a text that an op is for.

    Attributes:
        part: all of them, those of the prompt, those that the model has written, or a span of places.
        start: first place of a span, from 0.
        end: behind the last place of a span; None: open.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: Part = "all"
    start: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, ge=1)

    def meets(self, other: Scope) -> bool:
        """Whether a token can be in both."""
        if {self.part, other.part} == {"prompt", "generated"}:
            return False
        if self.part == other.part == "span":
            return (self.end is None or other.start < self.end) and (other.end is None or self.start < other.end)
        return True


class Steer(Op):
    """Change how one expert is chosen, or what it weighs.

    Attributes:
        layer: decoder layer index.
        expert: the expert.
        action: at the router's raw logits, so that the family's own code chooses again: "ban" (never chosen), "force"
            (chosen by every token), "bias" (`strength` is added to its logit). At the weights, after the choice:
            "scale" (its weight times `strength`; with 0 its slot stays empty). "swap": `partner` runs wherever it is
            chosen, and the other way round.
        strength: of "bias" and "scale".
        partner: the other expert of a swap.
        renormalise: after "scale", a token's weights keep their sum.
        scope: the tokens that it is for.
    """

    op: Literal["steer"] = "steer"
    layer: int
    expert: int
    action: Action
    strength: float = Field(default=1.0, allow_inf_nan=False)
    partner: int | None = None
    renormalise: bool = False
    scope: Scope = Scope()


def check_steering(ops: Sequence[Op], layout: Layout) -> None:
    """Refuse steering that the routers cannot follow.

    Raises:
        PlanError: an unknown layer or expert, a swap without partner, more forced experts than a token chooses (or in
            more groups), too few left that are not banned, an expert both banned and forced.
    """
    by_layer: dict[int, list[Steer]] = defaultdict(list)
    for op in ops:
        if isinstance(op, Steer):
            by_layer[op.layer].append(op)
    for index, steers in sorted(by_layer.items()):
        layer = layout.by_index.get(index)
        if layer is None or layer.mtp:
            raise PlanError(
                f"layer {index} is no MoE layer of this model", expected=f"one of {[x.index for x in layout.routed]}"
            )
        for op in steers:
            _check_experts(op, layer)
            together = [x for x in steers if x.scope.meets(op.scope)]
            _check_together(op, together, layer)


def check_no_steering(ops: Sequence[Op]) -> None:
    """Refuse to write what is only done to a running model.

    Raises:
        PlanError: there is steering among the ops.
    """
    steers = [op for op in ops if isinstance(op, Steer)]
    if steers:
        raise PlanError(
            "steering is done to a running model, and no checkpoint holds it",
            where=f"layer {steers[0].layer}, expert {steers[0].expert}: {steers[0].action}",
            fix="apply the plan live, or let `moekit steer bake` make the nearest plan that files can hold",
        )


def _check_experts(op: Steer, layer: MoELayer) -> None:
    for expert in (op.expert, *([] if op.partner is None else [op.partner])):
        if not 0 <= expert < layer.num_experts:
            raise PlanError(
                f"layer {op.layer} has no such expert", expected=f"0 to {layer.num_experts - 1}", got=expert
            )
    if (op.partner is None) == (op.action == "swap") or op.partner == op.expert:
        raise PlanError(
            "only a swap has a partner, and it needs another expert",
            where=f"layer {op.layer}, expert {op.expert}",
            got=f"{op.action}, partner {op.partner}",
        )
    if op.scope.end is not None and op.scope.end <= op.scope.start:
        raise PlanError("a span must end behind its start", where=f"layer {op.layer}", got=op.scope.model_dump())


def _check_together(op: Steer, together: Sequence[Steer], layer: MoELayer) -> None:
    """What ops that meet `op` do to the same token."""
    groups, size = layer.router.groups, layer.num_experts // layer.router.groups
    forced = {x.expert for x in together if x.action == "force"}
    banned = {x.expert for x in together if x.action == "ban"}
    if op.action == "force" and op.expert in banned:
        raise PlanError("an expert cannot be banned and forced", where=f"layer {op.layer}", got=op.expert)
    in_groups = len({e // size for e in forced})
    if op.action == "force" and (len(forced) > layer.top_k or (groups > 1 and in_groups > layer.router.groups_kept)):
        most = f"at most {layer.top_k} experts"
        raise PlanError(
            f"layer {op.layer} chooses {layer.top_k} experts for a token: more than that cannot be forced",
            expected=most if groups == 1 else f"{most}, in {layer.router.groups_kept} of its {groups} groups",
            got=sorted(forced),
            fix="force fewer, or for other parts of the text",
        )
    left = sorted(size - sum(e // size == g for e in banned) for g in range(groups))
    if op.action == "ban" and sum(left[: layer.router.groups_kept]) < layer.top_k:
        where = f" in any {layer.router.groups_kept} of its groups" if groups > 1 else ""
        raise PlanError(
            f"layer {op.layer} needs {layer.top_k} experts{where} for every token",
            got=f"{sum(left[: layer.router.groups_kept])} left",
            fix="ban fewer",
        )
