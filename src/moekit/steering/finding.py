"""find(model, kinds) -> Plan: one pass over two kinds of text, and the plan of a steering method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.data import Dataset
from moekit.errors import RecipeError, did_you_mean
from moekit.families.model import Model
from moekit.measurement import measure
from moekit.methods import get, names
from moekit.methods.steer import check_request, make_steering
from moekit.plans import Plan, Scope
from moekit.progress import Progress, silent
from moekit.stats import ALL_GROUPS


def find(
    model: Model,
    kinds: Dataset,
    method: str = "mote",
    *,
    top: int = 10,
    mode: str = "off",
    scope: Scope | None = None,
    protect: str = "super",
    device: str = "cpu",
    workdir: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Plan:
    """A plan that leads away from the first kind of text, towards the second.

    Args:
        model: from `moekit.open`.
        kinds: two domains, as `load_kinds` gives them.
        method: a steering method.
        top: how many experts to change.
        mode: "off", "on" or "both" (`moekit.methods.steer.make_steering`).
        scope: the tokens that it is for; None: all.
        protect: "super": super experts stay as they are; "none".
        device: "cpu" or "cuda".
        workdir: where an interrupted pass leaves what it needs to go on; None for nowhere.
        progress: told as layers pass.
        options: of the method.

    Raises:
        UserError: see `make_steering`; what does not need statistics is checked before the pass.
    """
    check_request(method, top, mode, protect, options)
    a, b = kinds.domains
    stats = measure(model, kinds, groups=groups(method, options), device=device, workdir=workdir, progress=progress)
    return make_steering(method, stats, model.layout, a, b, top=top, mode=mode, scope=scope, protect=protect, **options)


def groups(method: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The groups of statistics that a steering method needs.

    Raises:
        RecipeError: no such method.
    """
    found = get(method)
    if found.kind != "steer":
        raise RecipeError(f"{method!r} does not steer", where="method", fix=did_you_mean(method, names("steer")))
    return tuple(x for x in ALL_GROUPS if x in found.groups or (x == "vocabulary" and options.get("markers")))
