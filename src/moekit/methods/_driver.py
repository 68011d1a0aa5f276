"""make_plan: what every method that makes a model smaller goes through before its kind takes over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moekit.errors import PlanError, RecipeError, did_you_mean
from moekit.layout import Layout
from moekit.methods import budget as budgets
from moekit.methods import factor, heal, live, merge, prune, quantize
from moekit.methods._registry import Method, get
from moekit.methods.cold import cold_notes
from moekit.methods.common import Domain
from moekit.plans import Plan
from moekit.stats import Stats

SPREADS = ("uniform", "global")
PROTECT = ("super", "none")
SOLVED_ROWS = "least-squares"
ROUTER_ROWS = ("dominant", "weighted", SOLVED_ROWS)
WHOLE = {
    "quantize": "quantises",
    "factor": "factors",
    "heal": "heals",
    "live": "skips",
    "steer": "steers",
}  # kinds of methods that leave every expert its place


def make_plan(
    name: str,
    stats: Stats | None,
    layout: Layout,
    /,
    *,
    keep: float | int | None = None,
    domain: Domain = None,
    seed: int = 0,
    spread: str = "uniform",
    protect: str = "super",
    **options: Any,
) -> Plan:
    """The plan of a method that leaves layers fewer experts, or experts fewer bits.

    Multi-token-prediction layers, which no statistics cover, are left out of it.

    Args:
        name: of the method, as "easy-ep" or "m-smoe".
        stats: of the model; None for methods that need none (`Method.groups`).
        layout: of the model.
        keep: share (0.5) or number (64) of experts that a layer keeps; not for quantising, which keeps all.
        domain: whose statistics count; None: all.
        seed: for methods that draw.
        spread: "uniform": every layer keeps as many; "global": as many in all, where they are worth most.
        protect: "super": super experts stay as they are; "none".
        options: of the method; for merging also `router`: "dominant" keeps the dominant expert's row, "weighted" takes
            the mean of the group's rows ("least-squares" takes text: `moekit.fitting.decide`).

    Raises:
        RecipeError: no such method, option, spread or protection; no `keep`, or one where all experts stay.
        PlanError: statistics of another model, or a budget that a layer's router cannot work with.
        DataError: no such domain, a quantity that was not measured, or scores that are no numbers.
    """
    method, rows, settings = check_options(name, ({"seed": seed} if "seed" in get(name).options else {}) | options)
    check_common(spread, protect)
    keep = check_keep(method, keep)
    if method.kind == "steer":
        raise RecipeError(
            f"{name!r} tells two kinds of text apart",
            where="method",
            fix="use moekit steer find or moekit.steering.find",
        )
    if method.kind == "replace":
        raise PlanError(
            f"a plan of {name!r} carries vectors, which need a folder to lie in",
            fix="use moekit compress or moekit.fitting.decide",
        )
    if method.kind == "factor":
        if settings["steps"]:
            raise PlanError(f"healing by {name!r} runs over text", fix="use moekit compress, or leave steps out")
        plan = factor.make_plan(method, layout, settings)
        plan.meant = method.kind
        return plan
    counts = budgets.uniform(layout, keep)
    if stats is None:
        if method.groups:
            raise PlanError(f"the method {name!r} needs statistics", fix="measure the model first")
        plan = quantize.make_plan(method, None, layout, domain=domain, settings=settings)
        plan.meant = method.kind
        plan.check(layout)
        return plan
    if stats.layout_hash != layout.hash or counts.keys() - stats.layers.keys():
        raise PlanError(
            "the statistics are of another model", expected=layout.hash, got=stats.layout_hash, fix="measure this model"
        )
    check_layout(method, layout, spread)
    if rows.get("router") == SOLVED_ROWS:
        raise PlanError(
            "router rows by least squares are solved on text, which takes the model and not only its statistics",
            where="options.router",
            fix="use moekit compress or moekit.fitting.decide, or another choice of rows",
        )
    if method.kind == "quantize":
        plan = quantize.make_plan(method, stats, layout, domain=domain, settings=settings)
    elif method.kind == "live":
        plan = live.make_plan(method, stats, layout, domain=domain, settings=settings)
    else:
        make: Callable[..., Plan] = merge.make_plan if method.kind == "merge" else prune.make_plan
        plan = make(
            method, stats, layout, keep=keep, domain=domain, spread=spread, protect=protect, settings=settings, **rows
        )
    plan.meant = method.kind
    plan.check(layout)
    if method.needs:
        plan.notes += cold_notes(plan, stats, layout, domain)
    return plan


def check_common(spread: str, protect: str) -> None:
    """Refuse a spread or a protection that there is not.

    Raises:
        RecipeError: see above.
    """
    _one_of("spread", spread, SPREADS)
    _one_of("protect", protect, PROTECT)


def check_options(name: str, options: Mapping[str, Any]) -> tuple[Method, dict[str, str], dict[str, Any]]:
    """(method, options of its kind, all its own options), defaults filled in.

    Raises:
        RecipeError: no such method or option, or a value that is not possible.
    """
    method, own = get(name), dict(options)
    rows = {"router": own.pop("router", ROUTER_ROWS[0])} if method.kind == "merge" else {}
    for what, value in rows.items():
        _one_of(what, value, ROUTER_ROWS)
    settings = method.settings(own)
    if method.kind == "heal":
        heal.check_settings(settings)
    return method, rows, settings


def check_layout(method: Method, layout: Layout, spread: str = "uniform") -> None:
    """Refuse a model, or a spread, that the method cannot work with.

    Raises:
        PlanError: a layer has more experts than the method can try all sets of.
        RecipeError: it compares sets of one layer, and is to compare layers.
    """
    if not method.most_experts:
        return
    large = [x for x in layout.routed if x.num_experts > method.most_experts]
    if large:
        raise PlanError(
            f"{method.name!r} tries every set of a layer's experts: 2^{large[0].num_experts} of them here",
            where=f"layer {large[0].index}" + (f" and {len(large) - 1} more" if len(large) > 1 else ""),
            expected=f"at most {method.most_experts} experts a layer, as in Mixtral",
            got=large[0].num_experts,
            fix="use a method that scores experts (easy-ep, reap), or cut the model down to that with one first",
        )
    if spread == "global":
        raise RecipeError(
            f"{method.name!r} compares the sets of one layer, not layers", where="spread", fix="use spread: uniform"
        )


def check_keep(method: Method, keep: float | int | None) -> float | int:
    """`keep` as the method takes it: quantising and healing keep all experts, every other must be told.

    Raises:
        RecipeError: it is missing, or a method that keeps all experts is to keep fewer.
    """
    if method.kind not in WHOLE:
        if keep is None:
            raise RecipeError(
                f"{method.name!r} must be told how many experts to keep", where="keep", fix="add keep: 0.5"
            )
        return keep
    if keep is not None and (type(keep) is int or keep != 1.0):
        raise RecipeError(
            f"{method.name!r} {WHOLE[method.kind]} experts and drops none",
            where="keep",
            expected="1.0, or left out",
            got=keep,
            fix="first prune or merge, then take the result on",
        )
    return 1.0


def _one_of(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise RecipeError(f"there is no {what} {given!r}", where=what, fix=did_you_mean(str(given), choices))
