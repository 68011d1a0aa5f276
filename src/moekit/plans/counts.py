"""How many experts a layer keeps, and which, when each has a score; which sets of experts a router can work with."""

from __future__ import annotations

from collections.abc import Mapping

from moekit.errors import PlanError
from moekit.layout import MoELayer
from moekit.plans.checks import check_feasible
from moekit.plans.ops import Drop


def keep_count(layer: MoELayer, keep: float | int) -> int:
    """How many experts of a layer a budget keeps, rounded to what groups allow.

    Args:
        layer: the layer.
        keep: a share (float in (0, 1]) or a number (int).

    Raises:
        PlanError: not a share or a number, or too few for top_k or the groups.
    """
    possible = 1 <= keep <= layer.num_experts if isinstance(keep, int) else 0 < keep <= 1
    if not possible:
        raise PlanError(
            "impossible number of experts to keep",
            where=f"keep, layer {layer.index}",
            expected=f"a share in (0, 1] or 1 to {layer.num_experts}",
            got=keep,
            fix="keep fewer: 0.5 is half of them",
        )
    wanted = keep if isinstance(keep, int) else round(keep * layer.num_experts)
    groups = layer.router.groups
    wanted = max(1, round(wanted / groups)) * groups
    kept = [
        e
        for g in range(groups)
        for e in range(layer.num_experts)[g * layer.num_experts // groups :][: wanted // groups]
    ]
    check_feasible(layer, tuple(kept))
    return wanted


def drop_lowest(
    layer: MoELayer, scores: Mapping[int, float] | list[float], keep: int, protected: frozenset[int] = frozenset()
) -> Drop | None:
    """Keep the `keep` highest-scored experts of a layer (equally many in each group); ties go to the lower number.

    Args:
        scores: one per expert.
        keep: from `keep_count`.
        protected: experts that stay whatever their score.

    Returns:
        The Drop, or None when nothing goes.
    """
    groups = layer.router.groups
    size = layer.num_experts // groups
    gone: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        ranked = sorted(members, key=lambda e: (e not in protected, -scores[e], e))
        gone += ranked[keep // groups :]
    return Drop(layer=layer.index, experts=tuple(sorted(gone))) if gone else None


def subset_members(subset: int, layer: MoELayer) -> tuple[int, ...]:
    """The experts of a set written as a bit mask (bit e is expert e), ascending."""
    return tuple(e for e in range(layer.num_experts) if subset >> e & 1)


def workable_subsets(layer: MoELayer) -> list[int]:
    """All sets of experts, as bit masks, that the layer's router can work with; at most 2^E, ascending."""
    found = []
    for subset in range(1, 2**layer.num_experts):
        try:
            check_feasible(layer, subset_members(subset, layer))
        except PlanError:
            continue
        found.append(subset)
    return found
