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
    layout, placed = source.layout, source.understanding.placed
    theirs, ours = source.loader(result.dtype), result.loader(result.dtype)
    experts = parameters = 0
    wrong: list[str] = []
    places, computed = plan.places(layout), changes_weights(plan)
    editing(theirs, layout, plan)
    try:
        for done, index in enumerate((OUTER, *range(layout.num_layers)), 1):
            layer = layout.by_index.get(index)
            of_experts: set[str] = set()
            axes: dict[str, int] = {}
            pairs: list[tuple[int, int]] = []
            if layer:
                of_experts = {f"{layer.experts_path}.{x}" for x in theirs.expert_form(layer.experts_path).names}
                axes = {placed[x.name].key: x.axis for x in layer.tensors if x.expert is None and x.axis is not None}
                pairs = [(old, new) for new, old in enumerate(places[index]) if old is not None]
            stands_in = plan.replaced().get(index)
            compared = [x for x in pairs if stands_in is None or x[0] not in stands_in.experts]
            expected, found = theirs.read(index), ours.read(index)
            for key, tensor in expected.items():
                if key not in found:
                    wrong.append(f"{key}: missing")
                elif layer and key in of_experts:
                    first = _first_wrong(tensor, found[key], compared, computed)
                    wrong += [] if first is None else [f"{key}: expert {first}"]
                elif layer and key in axes:
                    cut = _rows_of_experts(tensor, found[key], axes[key], pairs, layer, len(places[index]))
                    wrong += [] if _same(*cut, computed) else [key]
                elif not _same(tensor, found[key], computed):
                    wrong.append(key)
            experts, parameters = experts + len(compared), parameters + len(expected)
            progress("weights", done, layout.num_layers + 1)
    finally:
        theirs.edit = None
    return Weights(experts, parameters, tuple(wrong))


def _first_wrong(
    expected: torch.Tensor, found: torch.Tensor, pairs: Sequence[tuple[int, int]], computed: bool
) -> int | None:
    """The first expert, by its new number, whose part of a fused parameter differs; `pairs` are (old, new) numbers."""
    if max((new for _, new in pairs), default=-1) >= len(found):
        return len(found)
    return next((new for old, new in pairs if not _same(expected[old], found[new], computed)), None)


def _rows_of_experts(
    expected: torch.Tensor,
    found: torch.Tensor,
    axis: int,
    pairs: Sequence[tuple[int, int]],
    layer: MoELayer,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both have for the experts of `pairs`, and behind all experts (shared ones); all where that is not there."""
    if expected.dim() != found.dim():
        return expected, found
    sides = []
    for side, tensor, experts in ((0, expected, layer.num_experts), (1, found, count)):
        rows = [*(pair[side] for pair in pairs), *range(experts, tensor.shape[axis])]
        if max(rows, default=0) >= tensor.shape[axis]:
            return expected, found
        sides.append(tensor.index_select(axis, torch.tensor(rows)))
    return sides[0], sides[1]


def _same(expected: torch.Tensor, found: torch.Tensor, computed: bool) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return True  # a table from tokens to experts has new numbers, and the logits tell whether they are right
    a, b = expected.contiguous(), found.contiguous()
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return True
    return computed and bool((a - b).abs().amax() <= ROUNDING * a.abs().amax())
