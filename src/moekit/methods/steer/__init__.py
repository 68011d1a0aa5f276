"""Steering: find the experts that set two kinds of text apart, and change how they are chosen. No weight changes.

A steering method is a function `find(stats, layer, a, b, **options) -> Found`: a score for each expert, above zero
where it belongs to kind a more than to kind b, and what switching one off and on means for the method. Here the experts
with the largest scores of the model are taken, super experts stay as they are, and no layer is asked for what its
router cannot do (more forced experts than it chooses, too few left).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from moekit.errors import DataError, PlanError, RecipeError, did_you_mean
from moekit.layout import Layout
from moekit.methods._registry import Method, get, names
from moekit.methods.super_experts import super_experts
from moekit.plans import Plan, Scope, Steer, check_steering
from moekit.stats import Stats

MODES = ("off", "on", "both")


def make_steering(
    name: str,
    stats: Stats,
    layout: Layout,
    a: str,
    b: str,
    *,
    top: int = 10,
    mode: str = "off",
    scope: Scope | None = None,
    protect: str = "super",
    **options: Any,
) -> Plan:
    """The plan of a steering method: away from kind a, towards kind b.

    Args:
        name: of the method, as "mote".
        stats: with a domain for each kind.
        layout: of the model.
        a: the kind to leave.
        b: the kind to go to.
        top: how many experts to change.
        mode: "off": those most of a are switched off; "on": those most of b are switched on; "both": whichever set the
            kinds apart most.
        scope: the tokens that it is for; None: all.
        protect: "super": super experts stay as they are; "none".
        options: of the method.

    Raises:
        RecipeError: no such method, mode or option.
        PlanError: statistics of another model, or no expert that can be changed.
        DataError: a kind without text, or the same twice; a quantity that was not measured.
    """
    method, settings = check_request(name, top, mode, protect, options)
    if stats.layout_hash != layout.hash:
        raise PlanError(
            "the statistics are of another model", expected=layout.hash, got=stats.layout_hash, fix="measure this model"
        )
    _check_kinds(stats, a, b)
    safe = {(x.layer, x.expert) for x in super_experts(stats, layout)} if protect == "super" else set()
    ranked: list[tuple[float, int, int]] = []
    changes: dict[int, Any] = {}
    for layer in layout.routed:
        found = method(stats, layer, a, b, **settings)
        changes[layer.index] = found
        if not np.isfinite(found.scores).all():
            raise DataError("a score is no number", where=f"layer {layer.index}", got=name)
        ranked += [(float(x), layer.index, e) for e, x in enumerate(found.scores) if (layer.index, e) not in safe]
    weigh = {"off": lambda x: x, "on": lambda x: -x, "both": abs}[mode]
    ops: list[Steer] = []
    scores: dict[str, float] = {}
    left_out = 0
    taken: dict[int, list[Steer]] = defaultdict(list)
    for score, index, expert in sorted(ranked, key=lambda x: (-weigh(x[0]), x[1:])):
        if len(ops) == top or weigh(score) <= 0:
            break
        change = changes[index].off if score > 0 else changes[index].on
        op = Steer(layer=index, expert=expert, scope=scope or Scope(), **change)
        if not _follows([*taken[index], op], layout):
            left_out += 1
            continue
        taken[index].append(op)
        ops.append(op)
        scores[f"{index}.{expert}"] = round(score, 6)
    if not ops:
        raise PlanError(
            f"no expert sets {a} and {b} apart", got=f"{name}, mode {mode}", fix="use more text, or another method"
        )
    prompts = {kind: int(stats.sequences[stats.domain_numbers(kind)].sum()) for kind in (a, b)}
    notes = [
        f"away from {a}, towards {b}: {len(ops)} of {sum(x.num_experts for x in layout.routed)} experts changed",
        f"found on {prompts[a]:,} texts of {a} and {prompts[b]:,} of {b}",
    ]
    if safe:
        notes.append(f"super experts stay as they are: {', '.join(f'{x}.{e}' for x, e in sorted(safe))}")
    if left_out:
        notes.append(f"{left_out} left out, for what a router cannot do (more forced than it chooses, too few left)")
    return Plan(
        layout_hash=layout.hash,
        ops=[*sorted(ops, key=lambda x: (x.layer, x.expert))],
        method=name,
        settings={"a": a, "b": b, "top": top, "mode": mode, "protect": protect, **settings},
        made_from=dict(stats.manifest),
        notes=notes,
        measured={"score": scores},
    )


def check_request(
    name: str, top: int, mode: str, protect: str, options: Mapping[str, Any]
) -> tuple[Method, dict[str, Any]]:
    """The method and all its options, before anything is measured; arguments as for `make_steering`.

    Raises:
        RecipeError: no such method, mode or option, or no expert to change.
    """
    method = get(name)
    if method.kind != "steer":
        raise RecipeError(f"{name!r} does not steer", where="method", fix=did_you_mean(name, names("steer")))
    settings = method.settings(options)
    for what, given, choices in (("mode", mode, MODES), ("protect", protect, ("super", "none"))):
        if given not in choices:
            raise RecipeError(f"there is no {what} {given!r}", where=what, fix=did_you_mean(given, choices))
    if top < 1:
        raise RecipeError("at least one expert must be changed", where="top", got=top)
    return method, settings


def _check_kinds(stats: Stats, a: str, b: str) -> None:
    if a == b:
        raise DataError("steering needs two kinds of text", got=f"{a} twice", fix="label texts with two labels")
    for kind in (a, b):
        if not stats.sequences[stats.domain_numbers(kind)].sum():
            raise DataError(f"there is no text of the kind {kind!r}", fix="give some, and measure again")


def _follows(ops: list[Steer], layout: Layout) -> bool:
    try:
        check_steering(ops, layout)
    except PlanError:
        return False
    return True
