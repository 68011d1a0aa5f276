"""Factoring: keep every expert's matrices as low rank and sparse rest. All experts stay.

A factoring method is a function `way(layer, **options)` that returns a layer's Factor, as it is without text in hand;
with steps of healing `moekit.fitting.factors` goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.layout import Layout
from moekit.methods._registry import Method
from moekit.plans import Factor, Plan
from moekit.plans.factoring import largest_rank


def make_plan(method: Method, layout: Layout, settings: Mapping[str, Any]) -> Plan:
    """The plan of a factoring method without healing; it reads no statistics.

    Raises:
        PlanError: a model, a rank or a density that cannot be (see `moekit.plans.factoring.check_factored`).
    """
    plan = Plan(
        layout_hash=layout.hash,
        ops=[*ways(method, layout, settings)],
        method=method.name,
        settings=dict(settings),
        notes=[*_notes(layout, settings)],
    )
    plan.check(layout)
    return plan


def ways(method: Method, layout: Layout, settings: Mapping[str, Any]) -> list[Factor]:
    """How a method with these settings factors each layer."""
    return [method(layer, **settings) for layer in layout.routed]


def _notes(layout: Layout, settings: Mapping[str, Any]) -> list[str]:
    smaller = max((largest_rank(x, settings["density"], 2) for x in layout.routed), default=0)
    out = [
        f"all experts stay; their matrices become a product of rank {settings['rank']} and a rest of "
        f"{settings['density']:.0%} of their entries"
    ]
    if settings["format"] == "dense":
        out.append("multiplied out again for stock transformers: not smaller than before")
    elif 2 * settings["rank"] > smaller:
        out.append(f"this rank saves little: a rank of {smaller} would save nothing at all")
    return out
