"""Steering in weights: what a plan's ops make of a layer's parameters, and which files can hold them at all.

    bias     added to the bias of the router's logit, where the family has one
    ban      the expert's rows are deleted, where every layer loses as many; or the bias of its logit or of its score
             (correction bias) is -10,000, where the family has one
    swap     the two experts' router rows change places
    scale    the expert's last projection (and its bias) times the factor

Everything else that a plan can say is done to a running model only, and is refused with the reason.

Symbols: E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moekit.apply.padding import bias_names
from moekit.errors import PlanError
from moekit.families.detect import Understanding
from moekit.families.loader import Loader
from moekit.families.outputs import proportional
from moekit.layout import Layout, MoELayer
from moekit.plans import Drop, Hold, Plan, Steer, check_feasible
from moekit.plans.holding import why_not_bans, why_not_biases, why_not_factors, why_not_swap
from moekit.plans.padding import BIAS

Parameters = dict[str, torch.Tensor]
DELETED = "deleted experts: every engine that loads the family"
ROUTER_BIAS = "biases of routers: every engine that reads this family's router bias"
CORRECTION = "correction biases of routers: transformers, vLLM, SGLang; llama.cpp (exp_probs_b) after conversion"
SCALED = "scaled experts: every engine that loads the family"
SWAPPED = "swapped router rows: every engine that loads the family"


@dataclass(frozen=True)
class Held:
    """A steering plan as weights.

    Attributes:
        plan: does for all tokens what the steering plan does.
        engines: which engines will honour each kind of change.
    """

    plan: Plan
    engines: tuple[str, ...]


def held(plan: Plan, understanding: Understanding) -> Held:
    """What files can hold of a steering plan: all of it, or nothing.

    Raises:
        PlanError: an op that no file of this family holds, with the reason.
    """
    layout = understanding.layout
    ops: dict[int, list[Steer]] = defaultdict(list)
    for op in plan.steers():
        ops[op.layer].append(op)
    banned = {index: tuple(sorted({x.expert for x in some if x.action == "ban"})) for index, some in ops.items()}
    banned = {index: experts for index, experts in banned.items() if experts}
    deletes = bool(banned) and _deletable(banned, layout)
    holds, engines = [], []
    for index, some in sorted(ops.items()):
        layer = layout.by_index[index]
        for op in some:
            if reason := why_not(op, layer, understanding, deletes):
                raise PlanError(
                    f"no file of this model holds {op.action} of expert {index}.{op.expert}",
                    got=reason,
                    fix="apply the plan live (moekit run --steer), or leave that op out",
                )
        biases: dict[int, float] = defaultdict(float)
        factors: dict[int, float] = defaultdict(lambda: 1.0)
        for op in some:
            if op.action == "bias":
                biases[op.expert] += op.strength
            elif op.action == "scale":
                factors[op.expert] *= op.strength
        swaps = tuple((x.expert, x.partner) for x in some if x.action == "swap" and x.partner is not None)
        bans = () if deletes else banned.get(index, ())
        if biases or bans or swaps or factors:
            holds.append(Hold(layer=index, biases=dict(biases), bans=bans, swaps=swaps, factors=dict(factors)))
        of_score = layer.router.correction_bias and not layer.router.logit_bias
        engines += [ROUTER_BIAS] if biases or (bans and not of_score) else []
        engines += [CORRECTION] if bans and of_score else []
        engines += [SCALED] if factors else []
        engines += [SWAPPED] if swaps else []
    drops = [Drop(layer=index, experts=experts) for index, experts in sorted(banned.items())] if deletes else []
    engines += [DELETED] if drops else []
    made = plan.model_copy(update={"ops": [*drops, *holds]})
    made.check_bakeable(layout)
    return Held(made, tuple(dict.fromkeys(engines)))


def why_not(op: Steer, layer: MoELayer, understanding: Understanding, deletes: bool) -> str:
    """Why no file holds an op; "" when one does."""
    layout = understanding.layout
    if op.scope.part != "all":
        return f"a file does not tell the {op.scope.part} part of a text apart"
    if op.action == "force":
        return "a bias makes an expert's weight as large as its logit, and no bias makes every token choose it"
    if op.action == "bias":
        return why_not_biases(layer)
    if op.action == "swap" and op.partner is not None:
        return why_not_swap(layer, op.expert, op.partner)
    if op.action == "ban":
        reason = why_not_bans(layer)
        most = "the layers would lose different numbers of experts, or too many"
        return "" if deletes or not reason else f"{reason}, and {layout.cannot_drop or most}"
    if op.renormalise:
        return "no file gives a token's other experts the weight of an empty slot"
    if reason := why_not_factors(layer, layout, [op.expert]):
        return reason
    experts = understanding.model.get_submodule(layer.experts_path)
    return "" if proportional(understanding.family, experts) else "its experts normalise what the last projection gives"


def _deletable(banned: Mapping[int, tuple[int, ...]], layout: Layout) -> bool:
    """Whether banned experts can be deleted: each layer loses as many, and keeps enough."""
    if layout.cannot_drop or len({len(banned.get(x.index, ())) for x in layout.routed}) > 1:
        return False
    try:
        for layer in layout.routed:
            check_feasible(layer, tuple(e for e in range(layer.num_experts) if e not in banned[layer.index]))
    except PlanError:
        return False
    return True


def held_parameters(loader: Loader, layout: Layout, plan: Plan, index: int, tensors: Parameters) -> Parameters:
    """The parameters of a layer that holding changes, by key."""
    op = plan.holds().get(index)
    if op is None:
        return {}
    layer, out = layout.by_index[index], dict[str, torch.Tensor]()

    def now(key: str) -> torch.Tensor:
        return out[key] if key in out else tensors[key].clone()

    for key in _biases(loader, layer):
        of_score = key in layer.correction_biases
        if of_score and not op.bans:
            continue
        new = now(key)
        flat_E = new.view(-1)[: layer.num_experts]
        if not of_score:
            for expert, amount in op.biases.items():
                flat_E[expert] += amount
        flat_E[list(op.bans)] = BIAS
        out[key] = new
    for one, other in op.swaps:
        for key, axis in _rows(loader, layer).items():
            order = torch.arange(now(key).shape[axis])
            order[[one, other]] = order[[other, one]]
            out[key] = now(key).index_select(axis, order)
    if op.factors:
        for key in _last(loader, layer):
            new = now(key)
            for expert, factor in op.factors.items():
                new[expert] *= factor
            out[key] = new
    return out


def held_names(loader: Loader, layout: Layout, plan: Plan, index: int) -> set[str]:
    """Disk names of what `held_parameters` changes."""
    op = plan.holds().get(index)
    if op is None:
        return set()
    layer = layout.by_index[index]
    keys = set(_biases(loader, layer)) if op.biases or op.bans else set()
    keys |= set(_rows(loader, layer)) if op.swaps else set()
    keys |= set(_last(loader, layer)) if op.factors else set()
    return {x.name for group in loader.placements(index).values() for x in group if not keys.isdisjoint(x.keys)}


def _biases(loader: Loader, layer: MoELayer) -> list[str]:
    """Keys of the biases of the router's logits or, without any, of its scores."""
    understanding = loader.understanding
    keys = sorted({understanding.placed[name].key for name in bias_names(understanding, layer)})
    logits = [key for key in keys if key not in layer.correction_biases]
    return [*logits, *(key for key in keys if key in layer.correction_biases)]


def _rows(loader: Loader, layer: MoELayer) -> dict[str, int]:
    """Keys of all that routers have for each expert, with the axis."""
    placed = loader.understanding.placed
    return {placed[x.name].key: x.axis or 0 for x in layer.tensors if x.role == "router"}


def _last(loader: Loader, layer: MoELayer) -> list[str]:
    """Keys of the experts' last projection, and of its bias."""
    names = loader.expert_form(layer.experts_path).names
    return [f"{layer.experts_path}.{name}" for name in sorted(names) if name.startswith("down_proj")]
