"""Every weight of a written model, read back, against the source under the plan: no short text reaches all experts.

Both are read layer by layer through the stock model's names, not by what wrote the files, and compared as the stock
model's parameters. What the plan only copies must be the same bit for bit; what it computes (merged, rounded, given
values) is computed again and may differ by rounding. Costs one reading of both models, and two layers of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moekit.apply.made import changes_weights, editing
from moekit.families.loader import OUTER
from moekit.families.model import Model
from moekit.layout import MoELayer
from moekit.plans import Plan
from moekit.plans.padding import Slots
from moekit.progress import Progress, silent

ROUNDING = 2.0**-7  # of the largest number of an expert's weight, for what is computed: one step of bfloat16


@dataclass(frozen=True)
class Weights:
    """What was compared and found.

    Attributes:
        experts: kept ones whose weights were compared, in all layers; none that a vector stands for.
        parameters: of the stock model.
        wrong: names of parameters that differ, with the first expert of the new model that does, or that are missing.
    """

    experts: int
    parameters: int
    wrong: tuple[str, ...]


def compare_weights(source: Model, plan: Plan, result: Model, progress: Progress = silent) -> Weights:
    """Compare all weights of `result` with those of `source` under the plan, in the dtype of `result`.

    Args:
        source: the model that was changed.
        plan: what was done to it.
        result: the new checkpoint.
        progress: told of "weights", in layers.
    """
    layout = source.layout
    theirs, ours = source.loader(result.dtype), result.loader(result.dtype)
    experts = parameters = 0
    wrong: list[str] = []
    places = plan.places(layout)
    editing(theirs, layout, plan)
    computed = changes_weights(plan)
    try:
        for done, index in enumerate((OUTER, *range(layout.num_layers)), 1):
            layer = layout.by_index.get(index)
            kept = plan.kept(layer) if layer else ()
            replaced = plan.replaced().get(index)
            compared = [place for place, e in enumerate(kept) if replaced is None or e not in replaced.experts]
            path = layer.experts_path if layer else ""
            of_experts = {f"{path}.{name}" for name in theirs.expert_form(path).names} if layer else set()
            expected, found = theirs.read(index), ours.read(index)
            if layer and index in places:
                found = _without_zeros(found, source, layer, places[index], of_experts)
            for key, tensor in expected.items():
                if key not in found:
                    wrong.append(f"{key}: missing")
                elif layer and key in of_experts:
                    place = _first_wrong(layer, tensor, found[key], kept, compared, computed)
                    wrong += [] if place is None else [f"{key}: expert {place}"]
                elif not _same(_cut(tensor, found[key], layer, kept), found[key], computed):
                    wrong.append(key)
            experts, parameters = experts + len(compared), parameters + len(expected)
            progress("weights", done, layout.num_layers + 1)
    finally:
        theirs.edit = None
    return Weights(experts, parameters, tuple(wrong))


def _without_zeros(
    found: dict[str, torch.Tensor], source: Model, layer: MoELayer, places: Slots, of_experts: set[str]
) -> dict[str, torch.Tensor]:
    """The written layer without the experts of zeros that fill it up (`moekit.plans.padding`)."""
    if None not in places:
        return found
    real = [place for place, expert in enumerate(places) if expert is not None]
    placed = source.understanding.placed
    axes = {placed[x.name].key: x.axis or 0 for x in layer.tensors if x.role == "router"} | dict.fromkeys(of_experts, 0)
    out = dict(found)
    for key, axis in axes.items():
        if key in found:
            rows = [*real, *range(len(places), found[key].shape[axis])]
            out[key] = found[key].index_select(axis, torch.tensor(rows))
    return out


def _first_wrong(
    layer: MoELayer,
    expected: torch.Tensor,
    found: torch.Tensor,
    kept: Sequence[int],
    compared: Sequence[int],
    computed: bool,
) -> int | None:
    """The first expert, by its new number, whose part of a fused parameter differs."""
    if expected.shape[0] != layer.num_experts or found.shape[0] != len(kept):
        return 0
    return next((x for x in compared if not _same(expected[kept[x]], found[x], computed)), None)


def _cut(expected: torch.Tensor, found: torch.Tensor, layer: MoELayer | None, kept: Sequence[int]) -> torch.Tensor:
    """What the source has, without the rows of experts that went; what lies behind the experts' rows stays."""
    if layer is None or expected.dim() != found.dim():
        return expected
    gone = layer.num_experts - len(kept)
    for axis, (before, after) in enumerate(zip(expected.shape, found.shape, strict=True)):
        if before != after and gone:
            each = (before - after) // gone
            rows = [e * each + i for e in kept for i in range(each)] + [*range(layer.num_experts * each, before)]
            return expected.index_select(axis, torch.tensor(rows)) if max(rows, default=0) < before else expected
    return expected


def _same(expected: torch.Tensor, found: torch.Tensor, computed: bool) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return True  # a table from tokens to experts has new numbers, and the logits tell whether they are right
    a, b = expected.contiguous(), found.contiguous()
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return True
    return computed and bool((a - b).abs().amax() <= ROUNDING * a.abs().amax())
