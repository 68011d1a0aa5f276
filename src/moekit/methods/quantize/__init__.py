"""Quantising: keep weights as whole numbers. All experts stay.

A quantising method is a function `way(layer, size, **options)` that returns a layer's Quantize; `size` is the group
size that every layer can have, at most the option `group_size`. Those that round with text in hand, or choose bits by
it, say so what they would do without; `moekit.fitting.quantize` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moekit.errors import PlanError, RecipeError
from moekit.layout import Layout
from moekit.methods._registry import Method
from moekit.methods.common import Domain
from moekit.plans import OUTER, UNQUANTISED, Plan, Quantize, QuantizeDense
from moekit.stats import Stats

DENSE = {"attention_bits": "attention", "shared_bits": "shared experts", "dense_bits": "dense MLP"}
OUTSIDE = {"embedding_bits": "embeddings", "head_bits": "head"}
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, UNQUANTISED)


def make_plan(
    method: Method,
    stats: Stats | None,
    layout: Layout,
    *,
    domain: Domain,
    settings: Mapping[str, Any],
) -> Plan:
    """The plan of a quantising method that needs no text; arguments as for `moekit.methods.make_plan`, already checked.

    Raises:
        RecipeError: impossible bits.
        PlanError: impossible group size, or bits that the format has not.
    """
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)] if stats else []
    return Plan(
        layout_hash=layout.hash,
        ops=[*ways(method, layout, settings)],
        method=method.name,
        settings=({"domain": domains} if domains else {}) | dict(settings),
        made_from=dict(stats.manifest) if stats else {},
        notes=notes(layout, settings),
    )


def notes(layout: Layout, settings: Mapping[str, Any]) -> list[str]:
    """What a reader of any quantising plan should know."""
    others = [f"{part} in {settings[key]} bits" for key, part in (DENSE | OUTSIDE).items() if settings[key] < 16]
    out = ["all experts stay; their weights are quantised" + (f", {', '.join(others)}" if others else ", nothing else")]
    if (size := common_group(layout, settings["group_size"])) != (wanted := settings["group_size"]):
        out.append(f"group size {size}, not {wanted}, which does not divide the widths of the experts")
    return out


def ways(method: Method, layout: Layout, settings: Mapping[str, Any]) -> list[Quantize | QuantizeDense]:
    """How a method with these settings quantises each layer, as far as it is known without text.

    Raises:
        RecipeError: impossible bits.
        PlanError: impossible group size.
    """
    for key in (*DENSE, *OUTSIDE):
        if settings[key] not in WIDTHS:
            raise RecipeError(
                "impossible bits",
                where=f"options.{key}",
                expected=f"one of {', '.join(map(str, WIDTHS))}; 16 leaves weights as they are",
                got=settings[key],
            )
    size = common_group(layout, settings["group_size"])
    out: list[Quantize | QuantizeDense] = [method(layer, size, **settings) for layer in layout.routed]
    shared: dict[str, Any] = {"group_size": settings["group_size"], "scheme": "fitted", "format": settings["format"]}
    for parts, layers in ((DENSE, range(layout.num_layers)), (OUTSIDE, (OUTER,))):
        if bits := {part: settings[key] for key, part in parts.items() if settings[key] != UNQUANTISED}:
            out += [QuantizeDense(layer=index, bits=bits, **shared) for index in layers]
    return out


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
