"""Which expert gets how many bits in a store: as a plan says, or so that the whole loses least.

    minimise  sum over experts i of  c_i sum over their matrices W of |W - Q_b(W)|^2 / |W|^2,   b of 16, 8, 4
    such that a weight has `average` bits on average

c_i is sum over T_i of g_i(t)^2 |f_i(x_t)|^2, what the model would lose without the expert, where statistics of
calibration text are given; without them 1 for every expert, so that only its numbers decide.

T_i tokens routed to expert i, g_i(t) their gate weights, f_i its output. Scales are not counted as bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from moekit.errors import PlanError, RecipeError
from moekit.families.loader import Loader
from moekit.families.model import Model
from moekit.layout import MoELayer
from moekit.methods.quantize._allocation import allocate
from moekit.plans import Plan, Quantize
from moekit.progress import Progress, silent
from moekit.serve.forms import BITS, packed_expert, unpacked
from moekit.stats import Stats

ByExpert = dict[int, tuple[int, ...]]


def widths_of(plan: Plan, model: Model) -> tuple[ByExpert, list[str]]:
    """The bits that a plan gives experts, each raised to the next that stores have.

    Layers that the plan leaves alone keep 16.

    Args:
        plan: of `Quantize` ops, as rtn and mc-moe make them. Stores round to nearest themselves, whatever its scheme.
        model: that it was made for.

    Returns:
        (bits of each expert by decoder layer index; what was done otherwise than the plan says, for the user).

    Raises:
        PlanError: a plan for another model, or one that does more than give experts bits.
    """
    plan.check(model.layout)
    others = sorted({op.op for op in plan.ops if not isinstance(op, Quantize)})
    if others or not plan.ops:
        raise PlanError(
            "only bits of experts can be taken from a plan when a model is packed",
            expected="Quantize ops, as the methods rtn-int4, rtn-int8 and mc-moe make them",
            got=", ".join(others) or "a plan that changes nothing",
            fix="apply the plan with moekit compress --plan, then pack what it writes",
        )
    found: ByExpert = {}
    raised: dict[tuple[int, int], int] = {}
    for layer in model.layout.routed:
        op = plan.quantised().get(layer.index)
        asked = op.widths(range(layer.num_experts)) if op else [16] * layer.num_experts
        given = tuple(min(b for b in BITS if b >= x) for x in asked)
        for pair in zip(asked, given, strict=True):
            if pair[0] != pair[1]:
                raised[pair] = raised.get(pair, 0) + 1
        found[layer.index] = given
    notes = [
        f"{count} experts of {asked} bits are kept in {given}: stores have {', '.join(map(str, sorted(BITS)))}"
        for (asked, given), count in sorted(raised.items())
    ]
    if any(op.scheme != "rtn" for op in plan.quantised().values()):
        notes.append("only bits are taken from the plan: numbers are rounded to nearest, not as its method fitted them")
    return found, notes


def widths_by_sensitivity(
    model: Model, average: float, stats: Stats | None = None, progress: Progress = silent
) -> ByExpert:
    """Bits of each expert by decoder layer index, so that the weighted errors of all experts are least.

    Reads the model once, a layer at a time.

    Args:
        model: from `moekit.open`.
        average: bits of a weight on average, from 4 to 16.
        stats: of this model, with the group "scores"; None: every expert counts alike.
        progress: told as layers pass.

    Raises:
        RecipeError: an average outside of 4 to 16.
        PlanError: statistics of another model.
    """
    if not min(BITS) <= average <= max(BITS):
        raise RecipeError(
            "an impossible average of bits", where="average bits", expected=f"{min(BITS)} to {max(BITS)}", got=average
        )
    if stats is not None and stats.layout_hash != model.layout.hash:
        raise PlanError("the statistics are of another model", expected=model.layout.hash, got=stats.layout_hash)
    layers, loader, widths = model.layout.routed, model.loader(), tuple(sorted(BITS))
    costs, sizes = [], []
    for number, layer in enumerate(layers):
        progress("weigh", number, len(layers))
        errors_EB, size = _errors(loader, layer, widths)
        if stats is not None:
            errors_EB *= stats.get("gated_norm_sq", layer.index)[:, None]
        costs.append(errors_EB)
        sizes += [size] * layer.num_experts
    progress("weigh", len(layers), len(layers))
    chosen = iter(allocate(np.concatenate(costs), widths, np.asarray(sizes, float), average))
    return {layer.index: tuple(next(chosen) for _ in range(layer.num_experts)) for layer in layers}


def _errors(loader: Loader, layer: MoELayer, widths: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """(relative squared errors [E, B] of a layer's experts, numbers that one has)."""
    form = loader.expert_form(layer.experts_path)
    prefix = layer.experts_path + "."
    tensors = {
        key.removeprefix(prefix): x
        for key, x in loader.read(layer.index).items()
        if key.removeprefix(prefix) in form.names and x.dim() == 3
    }
    out = np.zeros((layer.num_experts, len(widths)))
    for expert in range(layer.num_experts):
        one = {name: x[expert] for name, x in tensors.items()}
        for column, bits in enumerate(widths):
            out[expert, column] = relative_error(one, bits, form.transposed)
    return out, sum(prod(x.shape[1:]) for x in tensors.values())


def relative_error(tensors: Mapping[str, torch.Tensor], bits: int, transposed: bool) -> float:
    """Sum over one expert's matrices of |W - Q(W)|^2 / |W|^2; 0 at 16 bits.

    Args:
        tensors: its weights by name, [O, I], or [I, O] if transposed.
        bits: 16, 8 or 4.
        transposed: how the model keeps them.
    """
    if bits >= 16:
        return 0.0
    _, packed = packed_expert(dict(tensors), bits, transposed)
    total = 0.0
    for name, x in tensors.items():
        weight_OI = (x.T if transposed else x).float()
        error = unpacked(packed, name, len(weight_OI)).float() - weight_OI
        total += float(error.square().sum() / weight_OI.square().sum().clamp_min(1e-30))
    return total
