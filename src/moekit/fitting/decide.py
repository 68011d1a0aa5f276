"""decide(name, fit) -> Plan: the one way from a method's name to a plan, whatever the method needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moekit import methods
from moekit.data import Dataset
from moekit.families.model import Model
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.stats import Stats

# Methods that need more than statistics: name -> function(fit, **settings of `decide`) -> Plan.
FITTED: dict[str, str] = {
    "gptq-int4": "moekit.fitting.quantize:plan",
    "gptq-int3": "moekit.fitting.quantize:plan",
    "gptq-int2": "moekit.fitting.quantize:plan",
    "mc-moe": "moekit.fitting.quantize:plan",
    "mone": "moekit.fitting.standins:plan",
    "ream": "moekit.fitting.sequential:plan",
    "mc-smoe": "moekit.fitting.factors:plan",
    "router-lstsq": "moekit.fitting.heal.rows:plan",
    "distill": "moekit.fitting.heal.whole:plan",
    "router-distill": "moekit.fitting.heal.layers:plan",
    "reconstruct": "moekit.fitting.heal.layers:plan",
}


@dataclass
class Fit:
    """What a method may use to decide.

    Attributes:
        model: what is to be changed.
        source: what it was before all changes: the teacher; the same model in a job's first step.
        stats: of the model on the text; None where the method needs none.
        data: the calibration text, tokenised.
        folder: for the numbers of fitted methods, a folder of their own; what an interrupted fit left there is used.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as work goes on.
    """

    model: Model
    source: Model
    stats: Stats | None
    data: Dataset
    folder: Path
    dtype: torch.dtype | None = None
    device: str = "cpu"
    progress: Progress = silent


def needs_model(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether deciding takes the model and text, not only statistics."""
    return name in FITTED or _solves_rows(name, options)


def _solves_rows(name: str, options: Mapping[str, Any] | None) -> bool:
    """Whether a merging method is to solve for the rows of the router."""
    return (options or {}).get("router") == methods.SOLVED_ROWS and methods.get(name).kind == "merge"


def decide(
    name: str,
    fit: Fit,
    *,
    keep: float | int | None = None,
    domain: str | list[str] | None = None,
    seed: int = 0,
    spread: str = "uniform",
    protect: str = "super",
    options: dict[str, Any] | None = None,
) -> Plan:
    """The plan of any method.

    Args:
        name: of the method.
        fit: what it may use.
        keep: share or number of experts that a layer keeps; see `moekit.methods.make_plan`.
        domain: whose statistics and text count; None: all.
        seed: for methods that draw.
        spread: "uniform" or "global".
        protect: "super" or "none".
        options: of the method.

    Raises:
        UserError: see `moekit.methods.make_plan`; for fitted methods also what running the model raises.
    """
    settings: dict[str, Any] = {"keep": keep, "domain": domain, "seed": seed, "spread": spread, "protect": protect}
    if _solves_rows(name, options):
        from moekit.fitting.heal.rows import repaired

        merged = decide(name, fit, **settings, options={**(options or {}), "router": "dominant"})
        return repaired(fit, merged, domain)
    if name in FITTED:
        module, _, attribute = FITTED[name].partition(":")
        run: Callable[..., Plan] = getattr(import_module(module), attribute)
        plan = run(fit, name=name, options=dict(options or {}), **settings)
        plan.check(fit.model.layout)
        plan.meant = methods.get(name).kind
        return plan
    return methods.make_plan(name, fit.stats, fit.model.layout, **settings, **(options or {}))
