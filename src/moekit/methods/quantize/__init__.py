"""Quantising: keep experts' weights as whole numbers. All experts stay; every layer is quantised alike.

A quantising method is a function `way(layer, size, *, group_size)` that returns a layer's Quantize; `size` is the group
size that every layer can have, at most the option `group_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moekit.errors import PlanError
from moekit.layout import Layout
from moekit.methods._registry import Method
from moekit.methods.common import Domain
from moekit.plans import Plan, Quantize
from moekit.stats import Stats


def make_plan(
    method: Method,
    stats: Stats,
    layout: Layout,
    *,
    domain: Domain,
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of a quantising method; arguments as for `moekit.methods.make_plan`, already checked.

    Raises:
        PlanError: impossible group size.
    """
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)]
    ops = ways(method, layout, settings)
    notes = ["all experts stay; their weights are quantised, nothing else is"]
    if (size := ops[0].group_size) != (wanted := settings["group_size"]):
        notes.append(f"group size {size}, not {wanted}, which does not divide the widths of the experts")
    return Plan(
        layout_hash=layout.hash,
        ops=[*ops],
        method=method.name,
        settings={"domain": domains, **settings},
        made_from=dict(stats.manifest),
        notes=notes,
    )


def ways(method: Method, layout: Layout, settings: Mapping[str, Any]) -> list[Quantize]:
    """How a method with these settings quantises each layer; needs no statistics.

    Raises:
        PlanError: impossible group size.
    """
    size = common_group(layout, settings["group_size"])
    return [method(layer, size, **settings) for layer in layout.routed]


def common_group(layout: Layout, group_size: int) -> int:
    """The largest group size up to `group_size` that divides the widths of all experts; -1 stays.

    Raises:
        PlanError: neither -1 nor above zero.
    """
    if group_size == -1:
        return -1
    if group_size < 1:
        raise PlanError("impossible group size", where="group_size", expected="a number of columns, or -1 for all")
    width = math.gcd(*(x for layer in layout.routed for x in (layer.width, layer.inner_size)))
    return max(size for size in range(1, min(group_size, width) + 1) if width % size == 0)
