"""Live methods: what a running model is to do for each token anew. Nothing of it can be written to files.

A live method is a function `way(stats, layer, domain, **options)` that returns the layer's op, or None for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.errors import PlanError
from moekit.layout import Layout
from moekit.methods._registry import Method
from moekit.methods.common import Domain
from moekit.plans import Plan
from moekit.stats import Stats


def make_plan(method: Method, stats: Stats, layout: Layout, *, domain: Domain, settings: Mapping[str, Any]) -> Plan:
    """The plan of a live method; arguments as for `moekit.methods.make_plan`, already checked.

    Raises:
        PlanError: there is nothing that it could do to this model.
        DataError: no such domain, or a quantity that was not measured.
    """
    domains = [stats.domains[i] for i in stats.domain_numbers(domain)]
    ways = [method(stats, layer, domains, **settings) for layer in layout.routed]
    ops = [way for way in ways if way is not None]
    if not ops:
        raise PlanError(
            f"{method.name!r} has nothing to do in this model", got=f"top {layout.routed[0].top_k}", fix="see its page"
        )
    return Plan(
        layout_hash=layout.hash,
        ops=ops,
        method=method.name,
        settings={"domain": domains, **settings},
        made_from=dict(stats.manifest),
        notes=[
            f"decided on {stats.token_count(domains):,} tokens of {', '.join(domains)}",
            "acts on a running model; no file holds it",
        ],
    )
