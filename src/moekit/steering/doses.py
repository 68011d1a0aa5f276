"""What is tried beside a plan: weaker doses of it, and controls that change other experts in the same way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from moekit.errors import PlanError, RecipeError
from moekit.layout import ExpertId, Layout
from moekit.plans import Plan, Steer, check_steering

NEAREST = 4  # experts of like frequency among which a matched control is drawn
ATTEMPTS = 20  # draws of a control that routers can follow
STRENGTHS = ("bias", "scale")  # actions that have one


def by_score(plan: Plan) -> list[Steer]:
    """A plan's ops, those first that the method has found most telling; a plan without scores as it stands."""
    scores: Mapping[str, float] = plan.measured.get("score", {})
    return sorted(plan.steers(), key=lambda op: -abs(scores.get(f"{op.layer}.{op.expert}", 0.0)))


def check_plan(plan: Plan, layout: Layout) -> None:
    """Refuse what is no steering plan for a model.

    Raises:
        PlanError: another model, no steering in it, other changes beside it, or what routers cannot follow.
    """
    plan.check(layout)
    if not plan.steers():
        raise PlanError("the plan steers nothing", got=plan.kind, fix="make one with moekit steer find")
    if len(plan.steers()) < len(plan.ops):
        others = sorted({type(op).__name__.lower() for op in plan.ops if not isinstance(op, Steer)})
        raise PlanError("the plan does more than steer", got=", ".join(others), fix="bake the other changes first")


def check_doses(plan: Plan, counts: Sequence[int], strengths: Sequence[float]) -> list[tuple[int, float]]:
    """The doses to try, ascending, the plan itself last: (number of experts, strength).

    Args:
        plan: what is tested.
        counts: numbers of experts.
        strengths: 1 is the plan's own, 0 nothing; only bias and scale have any.

    Raises:
        RecipeError: more experts than the plan has, none, or a strength that nothing in the plan has.
    """
    size = len(plan.steers())
    if wrong := [n for n in counts if not 1 <= n <= size]:
        raise RecipeError("the plan has not so many experts", where="counts", expected=f"1 to {size}", got=wrong[0])
    if any(x != 1 for x in strengths) and not any(op.action in STRENGTHS for op in plan.steers()):
        actions = ", ".join(sorted({op.action for op in plan.steers()}))
        raise RecipeError(
            "nothing in this plan has a strength", where="strengths", expected="a bias or a scale", got=actions
        )
    doses = {(n, 1.0) for n in counts} | {(size, float(s)) for s in strengths} | {(size, 1.0)}
    return sorted(doses, key=lambda x: (x == (size, 1.0), x[0], x[1]))


def weakened(ops: Sequence[Steer], strength: float) -> list[Steer]:
    """Ops at a strength: a bias times it, a factor as much nearer to 1 (or further); the rest stays."""
    out = []
    for op in ops:
        if op.action == "bias":
            op = op.model_copy(update={"strength": op.strength * strength})
        elif op.action == "scale":
            op = op.model_copy(update={"strength": 1 + strength * (op.strength - 1)})
        out.append(op)
    return out


def controls(
    ops: Sequence[Steer],
    layout: Layout,
    draws: int,
    *,
    seed: int = 0,
    share: Mapping[int, np.ndarray] | None = None,
    spare: frozenset[ExpertId] = frozenset(),
) -> list[list[Steer]]:
    """The same ops on other experts of the same layers.

    Args:
        ops: of the plan.
        layout: of the model.
        draws: how many such sets, each drawn anew.
        seed: of the draws.
        share: by decoder layer index [E], of the tokens that choose each expert: each expert is replaced by one of the
            few whose share is nearest. None: by any.
        spare: experts that are no controls (super experts).

    Returns:
        A set for each draw, in the order of `ops`; fewer where a layer has not enough other experts.
    """
    out: list[list[Steer]] = []
    for draw in range(draws):
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([seed, draw, attempt, share is not None])
            made = _drawn(ops, layout, rng, share, spare)
            if made is None:
                return out
            if _followed(made, layout):
                out.append(made)
                break
    return out


def _drawn(
    ops: Sequence[Steer],
    layout: Layout,
    rng: np.random.Generator,
    share: Mapping[int, np.ndarray] | None,
    spare: frozenset[ExpertId],
) -> list[Steer] | None:
    taken: dict[int, set[int]] = defaultdict(set)
    for op in ops:
        taken[op.layer] |= {e for e in (op.expert, op.partner) if e is not None}
    instead: dict[tuple[int, int], int] = {}  # one expert may have several ops, for other parts of the text

    def other(layer: int, expert: int) -> int | None:
        if (layer, expert) not in instead:
            count = layout.by_index[layer].num_experts
            free = [e for e in range(count) if e not in taken[layer] and ExpertId(layer, e) not in spare]
            if not free:
                return None
            if share is not None:
                free = sorted(free, key=lambda e: abs(share[layer][e] - share[layer][expert]))[:NEAREST]
            instead[layer, expert] = int(rng.choice(free))
            taken[layer].add(instead[layer, expert])
        return instead[layer, expert]

    out = []
    for op in ops:
        change = {"expert": other(op.layer, op.expert)}
        if op.partner is not None:
            change["partner"] = other(op.layer, op.partner)
        if None in change.values():
            return None
        out.append(op.model_copy(update=change))
    return out


def _followed(ops: Sequence[Steer], layout: Layout) -> bool:
    try:
        check_steering(ops, layout)
    except PlanError:
        return False
    return True
