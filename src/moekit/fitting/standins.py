"""Stand-ins: the vectors of a replacing method, from statistics into the plan's tensors, a file a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moekit import methods
from moekit.errors import PlanError
from moekit.fitting.decide import Fit
from moekit.methods import replace
from moekit.plans import Plan, PlanTensors, constant_name


def plan(
    fit: Fit,
    *,
    name: str,
    keep: float | int | None,
    domain: str | list[str] | None,
    spread: str,
    protect: str,
    options: Mapping[str, Any],
    **_: Any,
) -> Plan:
    """The plan of a replacing method with its vectors, rounded to the model's dtype.

    Args:
        fit: what it may use; runs nothing.
        name: of the method.
        keep: share or number of experts of a layer that keep their weights.
        domain: whose statistics count.
        spread: "uniform" or "global".
        protect: "super" or "none".
        options: of the method.

    Raises:
        UserError: see `moekit.methods.replace.make_plan`.
    """
    if fit.stats is None:
        raise PlanError(f"the method {name!r} needs statistics", fix="measure the model first")
    layout, stats = fit.model.layout, fit.stats
    if stats.layout_hash != layout.hash:
        raise PlanError(
            "the statistics are of another model", expected=layout.hash, got=stats.layout_hash, fix="measure this model"
        )
    method, _rows, settings = methods.check_options(name, options)
    methods.check_common(spread, protect)
    out = replace.make_plan(
        method,
        stats,
        layout,
        keep=methods.check_keep(method, keep),
        domain=domain,
        spread=spread,
        protect=protect,
        settings=settings,
    )
    store = PlanTensors(fit.folder)
    for index, op in out.replaced().items():
        layer = layout.by_index[index]
        vectors_RD = replace.stand_ins(stats, layer, op.experts, domain)
        if not np.isfinite(vectors_RD).all():
            raise PlanError("mean outputs are not all numbers", where=f"layer {index}", fix="measure in float32")
        made = torch.from_numpy(vectors_RD).to(fit.model.dtype)
        store.write(index, {constant_name(layer, e): row for e, row in zip(op.experts, made, strict=True)})
    out.tensors = str(fit.folder) if out.ops else ""
    return out
