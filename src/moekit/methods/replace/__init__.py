"""Replacing: constant vectors stand for the experts that matter least. A method scores experts; the rest is shared.

A replacing method is a function `scores(stats, layer, domain, **options) -> [E]`, not negative, higher stays; it has
the option `format`. The vector of an expert is the mean of its unweighted outputs on the deciding text. Routers keep
all experts, so a layer may keep fewer than top_k, and groups need not be even.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from moekit.errors import DataError, PlanError, RecipeError, did_you_mean
from moekit.layout import ExpertId, Layout, MoELayer
from moekit.methods._registry import Method
from moekit.methods.common import Domain
from moekit.methods.super_experts import super_experts
from moekit.plans import Plan, Replace
from moekit.stats import Stats

FORMATS = ("auto", "stock", "moekit")
Form = Literal["stock", "moekit"]


def make_plan(
    method: Method,
    stats: Stats,
    layout: Layout,
    *,
    keep: float | int,
    domain: Domain,
    spread: str,
    protect: str,
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of a replacing method, without its vectors; arguments as for `moekit.methods.make_plan`.

    Raises:
        PlanError: an impossible number of experts to keep.
        RecipeError: no such format.
        DataError: no such domain, a quantity that was not measured, or scores that are no numbers.
    """
    form = form_of(layout, settings["format"])
    counts = {layer.index: kept_count(layer, keep) for layer in layout.routed}
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)]
    safe = super_experts(stats, layout) if protect == "super" else frozenset()
    scores = {layer.index: _scores(method, stats, layer, domains, settings, safe) for layer in layout.routed}
    if spread == "global":
        counts = _pooled(counts, scores)
    ops = []
    for layer in layout.routed:
        order = np.argsort(-scores[layer.index], kind="stable")
        gone = sorted(set(order[counts[layer.index] :].tolist()) - set(layer.constants))
        if gone:
            ops.append(Replace(layer=layer.index, experts=tuple(gone), format=form))
    plan = Plan(
        layout_hash=layout.hash,
        ops=[*ops],
        method=method.name,
        settings={"keep": keep, "spread": spread, "domain": domains, "protect": protect, **settings},
        made_from=dict(stats.manifest),
    )
    shares = replaced_gate_mass(plan, stats, layout, domains)
    plan.measured = {"replaced_gate_mass": {str(index): share for index, share in shares.items()}}
    plan.notes = list(_notes(plan, stats, layout, domains, safe))
    return plan


def stand_ins(stats: Stats, layer: MoELayer, experts: tuple[int, ...], domain: Domain = None) -> np.ndarray:
    """The vectors of experts, float32 [len(experts), D]: mean unweighted outputs; zeros for one never routed to.

    Raises:
        DataError: no such domain, or the outputs were not measured.
    """
    total_ED = stats.get("output", layer.index, domain)
    count_E = stats.get("count", layer.index, domain)
    return (total_ED / np.maximum(count_E, 1)[:, None])[list(experts)].astype(np.float32)


def replaced_gate_mass(plan: Plan, stats: Stats, layout: Layout, domain: Domain = None) -> dict[int, float]:
    """By layer, the share (0 to 1) of the routers' weight that goes to experts which vectors stand for."""
    shares = {}
    for layer in layout.routed:
        mass_E = stats.get("gate_mass", layer.index, domain)
        op = plan.replaced().get(layer.index)
        shares[layer.index] = float(mass_E[list(op.experts if op else ())].sum() / (mass_E.sum() or 1))
    return shares


def form_of(layout: Layout, wanted: str) -> Form:
    """The form that stand-ins are written in; "auto": the stock one where experts have a bias, else moekit's own.

    Raises:
        RecipeError: no such format.
    """
    if wanted not in FORMATS:
        raise RecipeError(
            f"there is no format {wanted!r}", where="options.format", fix=did_you_mean(str(wanted), FORMATS)
        )
    if wanted == "auto":
        return "stock" if all(layer.output_bias for layer in layout.routed) else "moekit"
    return "stock" if wanted == "stock" else "moekit"


def kept_count(layer: MoELayer, keep: float | int) -> int:
    """How many experts of a layer keep their weights.

    Raises:
        PlanError: not a share, or not a number of experts.
    """
    possible = 1 <= keep <= layer.num_experts if isinstance(keep, int) else 0 < keep <= 1
    if not possible:
        raise PlanError(
            "impossible number of experts to keep",
            where=f"keep, layer {layer.index}",
            expected=f"a share in (0, 1] or 1 to {layer.num_experts}",
            got=keep,
        )
    return keep if isinstance(keep, int) else max(1, round(keep * layer.num_experts))


def supposed(layout: Layout, keep: float | int, settings: Mapping[str, Any]) -> list[Replace]:
    """Stand-ins as many as a plan will have, for what is known before anything is measured.

    Raises:
        PlanError: an impossible number of experts to keep.
        RecipeError: no such format.
    """
    form = form_of(layout, settings["format"])
    out = []
    for layer in layout.routed:
        real = [e for e in range(layer.num_experts) if e not in layer.constants]
        if gone := real[kept_count(layer, keep) :]:
            out.append(Replace(layer=layer.index, experts=tuple(gone), format=form))
    return out


def _scores(
    method: Method,
    stats: Stats,
    layer: MoELayer,
    domains: list[str],
    settings: Mapping[str, Any],
    safe: frozenset[ExpertId],
) -> np.ndarray:
    """A layer's scores [E]: infinite for what is protected, minus infinite for what is a constant already."""
    score_E = np.array(method(stats, layer, domains, **settings), np.float64)
    if not np.isfinite(score_E).all():
        raise DataError(
            f"layer {layer.index}: the scores of {method.name!r} are not all numbers",
            where=ExpertId(layer.index, int(np.flatnonzero(~np.isfinite(score_E))[0])),
            fix="the model overflows on this text in this dtype: measure again in bfloat16 or float32",
        )
    score_E[[x.expert for x in safe if x.layer == layer.index]] = np.inf
    score_E[list(layer.constants)] = -np.inf
    return score_E


def _pooled(counts: Mapping[int, int], scores: Mapping[int, np.ndarray]) -> dict[int, int]:
    """As many experts in all, given to the layers where they are worth most; a layer keeps at least one."""
    shares = {}
    for index, score_E in scores.items():
        finite = np.where(np.isfinite(score_E), score_E, 0.0)
        shares[index] = -np.sort(-np.where(np.isfinite(score_E), finite / (finite.sum() or 1), score_E))
    out = dict.fromkeys(counts, 1)
    ladder = sorted((-share, index) for index, score_E in shares.items() for share in score_E[1:])
    for _, index in ladder[: sum(counts.values()) - len(counts)]:
        out[index] += 1
    return out


def _notes(plan: Plan, stats: Stats, layout: Layout, domains: list[str], safe: frozenset[ExpertId]) -> Iterator[str]:
    yield f"scored on {stats.token_count(domains):,} tokens of {', '.join(domains)}"
    if plan.settings["protect"] == "super":
        yield f"super experts protected: {', '.join(map(str, sorted(safe))) or 'none found'}"
    shares = replaced_gate_mass(plan, stats, layout, domains)
    yield "replaced gate mass by layer: " + ", ".join(f"{index}: {share:.1%}" for index, share in shares.items())
    if plan.own_form:
        yield "written in moekit's own form: moekit runs it, stock transformers has no place for these vectors"
    elif plan.replaced():
        yield "written with weights of zero and the vectors as biases: stock transformers loads it, it is not smaller"
