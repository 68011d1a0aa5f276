"""live(view, plan): a plan carried out on a live model, for as long as the context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moekit.apply.dynamic import pruning
from moekit.apply.made import changes_weights, editing
from moekit.apply.standins import vectors
from moekit.apply.steer import steering
from moekit.errors import PlanError
from moekit.families.loader import Loader
from moekit.plans import Plan
from moekit.view import MoEView


@contextmanager
def live(view: MoEView, plan: Plan, loader: Loader | None = None) -> Iterator[MoEView]:
    """Make a live stock model behave as the checkpoint that `moekit.apply.bake` would write from the same plan.

    Dropped experts are banned at the router: their logits (and correction biases) become minus infinity before the
    family's own code chooses and normalises, which is what leaving out their rows does. Merged experts take the place
    of their dominant one as the layer is read, the others of the group are banned. New values take their places, and
    quantised weights are rounded, as the layer is read. Vectors stand for experts; routers are steered; experts that
    weigh little for a token are not run. Nothing of it stays afterwards.

    Args:
        view: of the model that the plan was made for.
        plan: what to do.
        loader: of the same model, where its layers come and go; plans that change weights need it.

    Raises:
        PlanError: the plan does not fit the model, or changes weights and there is no loader.
    """
    plan.check(view.layout)
    if loader is None and changes_weights(plan):
        raise PlanError("new weights are only applied to a streamed model", fix="bake the plan, or stream the model")
    if loader is not None:
        editing(loader, view.layout, plan)
    try:
        with (
            view.ban(plan.dropped_live(view.layout)),
            view.replace(vectors(plan, view.layout)),
            steering(view, plan.steers()),
            pruning(view, plan.dynamic()),
        ):
            yield view
    finally:
        if loader is not None:
            loader.edit = None
