"""live(view, plan): a plan carried out on a live model, for as long as the context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moekit.plans import Plan
from moekit.view import MoEView


@contextmanager
def live(view: MoEView, plan: Plan) -> Iterator[MoEView]:
    """Make a live stock model behave as the checkpoint that `moekit.apply.bake` would write from the same plan.

    Dropped experts are banned at the router: their logits (and correction biases) become minus infinity before the
    family's own code chooses and normalises, which is what leaving out their rows does. Nothing of it stays afterwards.

    Args:
        view: of the model that the plan was made for.
        plan: what to do.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan.check(view.layout)
    with view.ban(plan.dropped_live(view.layout)):
        yield view
