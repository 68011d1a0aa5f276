"""A plan's steering, on a live model, for as long as the context lasts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from moekit.families.tokens import Reach
from moekit.plans import Steer
from moekit.view import MoEView


@contextmanager
def steering(view: MoEView, ops: Sequence[Steer], tag: int | None = None) -> Iterator[MoEView]:
    """Steer a model's routers: edits of logits first, then swaps, then weights, each in the plan's order.

    Args:
        view: of the model.
        ops: what to do.
        tag: only texts with this number (`moekit.families.tokens.Tokens.tags`); None: all.

    Raises:
        PlanError: ops that the routers cannot follow.
    """
    by_kind: dict[tuple, list[Steer]] = defaultdict(list)
    for op in ops:
        by_kind[_ORDER[op.action], op.action, op.scope, op.renormalise].append(op)
    with ExitStack() as stack:
        for (_, action, scope, renormalise), same in sorted(by_kind.items(), key=lambda item: item[0][0]):
            reach = Reach(scope.part, scope.start, scope.end, tag)
            numbers: dict[int, dict[int, Any]] = defaultdict(dict)
            if action == "swap":
                pairs: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for op in same:
                    if op.partner is not None:
                        pairs[op.layer].append((op.expert, op.partner))
                stack.enter_context(view.swap(pairs, reach))
                continue
            for op in same:
                known = numbers[op.layer]
                if action == "scale":
                    known[op.expert] = known.get(op.expert, 1.0) * op.strength
                else:
                    known[op.expert] = known.get(op.expert, 0.0) + (op.strength if action == "bias" else 1.0)
            if action == "scale":
                stack.enter_context(view.scale(numbers, renormalise=renormalise, reach=reach))
            else:
                stack.enter_context(view.edit(action, numbers, reach))
        yield view


_ORDER = {"bias": 0, "force": 1, "ban": 2, "swap": 3, "scale": 4}
