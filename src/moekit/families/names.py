"""From the names on disk to the stock model's parameters, through transformers' own conversion mapping.

Two facts make one implementation cover every family. (1) transformers declares how each checkpoint name becomes a
parameter name (`WeightRenaming`) or a part of a fused parameter (`WeightConverter`). (2) Which parameters have an
expert axis, and which axis it is, is found by building the weightless model twice, once with twice the experts: the
axis that grew is the expert axis. No list of tensor names is kept anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from moekit.plans.factoring import COLUMNS, COUNTS, LEFT, MASK, RIGHT, VALUES

# Ends of the names of a quantised weight's tensors, and what the weight's name has there: those that scale it, those
# that lie beside it, all.
SCALES = {"_scale_inv": "", "_scales": "", ".scale": ".weight", ".qscale_weight": ".weight", ".weight_scale": ".weight"}
FACTORS = tuple(".weight" + x for x in (RIGHT, VALUES, MASK, COLUMNS, COUNTS))  # beside the left one
COMPANIONS = SCALES | dict.fromkeys((".weight_shape", *FACTORS), ".weight")
PACKED_SUFFIX, FACTORED_SUFFIX = ".weight_packed", ".weight" + LEFT
QUANTISED = COMPANIONS | {"_blocks": "", PACKED_SUFFIX: ".weight", FACTORED_SUFFIX: ".weight"}
NUMBERED = re.compile(r"\.(\d+)\.weight$")  # end of what moekit calls one expert of a tensor that held them all


def quantised_suffix(name: str) -> str:
    """The key of `QUANTISED` that `name` ends in, or ""."""
    return next((x for x in QUANTISED if name.endswith(x)), "")


@dataclass(frozen=True)
class Placement:
    """Where a tensor on disk goes.

    Attributes:
        name: on disk.
        key: the parameter of the stock model (the first one, where a converter splits a tensor into several).
        expert: the expert that it holds, for checkpoints with one tensor per expert, and for packed experts of a
            family whose checkpoints have all in one.
        converter: the transformers converter that makes the parameter, or None when it is only renamed.
        pattern: the converter's source pattern that matched.
        suffix: the key of `QUANTISED` that the name ends in, for the tensors of a quantised weight, else "".
    """

    name: str
    key: str
    expert: int | None = None
    converter: WeightConverter | None = None
    pattern: str = ""
    suffix: str = ""

    @property
    def weight(self) -> str:
        """Name on disk of the weight that this is, or is a part of, or scales."""
        return self.name.removesuffix(self.suffix) + QUANTISED.get(self.suffix, "")

    @property
    def sources(self) -> list[str]:
        """Patterns of the converter's sources, in order (gate before up)."""
        return self.converter.source_patterns if self.converter else []

    @property
    def keys(self) -> list[str]:
        """All parameters that the tensor has a part in (several where a converter splits)."""
        targets = self.converter.target_patterns if self.converter else []
        return [self.key, *(self.key.replace(targets[0], other) for other in targets[1:])]

    @property
    def stacks(self) -> bool:
        """The parameter is made by stacking experts (and possibly laying gate and up side by side), nothing else."""
        operations = self.converter.operations if self.converter else []
        kinds = [type(op) for op in operations]
        return (
            (self.converter is None and self.expert is not None)
            or kinds == [MergeModulelist]
            or (
                kinds == [MergeModulelist, Concatenate]
                and operations[1].dim == 1
                and operations[1].num_shards_attribute is None
            )
        )


class NameMap:
    """Maps disk names to the parameters of one stock model.

    Args:
        model: the weightless stock model.
    """

    def __init__(self, model: PreTrainedModel):
        mapping = get_model_conversion_mapping(model)
        self.renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        self.converters = [x for x in mapping if isinstance(x, WeightConverter)]
        self._by_pattern = {pattern: x for x in self.converters for pattern in x.source_patterns}
        self._prefix = model.base_model_prefix
        self._experts: dict[tuple[str, ...], Placement] = {}
        self.shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    def place(self, name: str) -> Placement | None:
        """The placement of disk tensor `name`, or None when the stock model has no use for it."""
        parts = name.split(".")
        at = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), 0)
        kind = (*parts[:at], "", *parts[at + 1 :])
        if kind in self._experts:  # placed alike for another expert of the layer: there may be 100,000 of them
            return replace(self._experts[kind], name=name, expert=int(parts[at]))
        found = self._find(name)
        if found is not None and found.expert is not None and parts[at] == str(found.expert):
            self._experts[kind] = found
        return found

    def _find(self, name: str) -> Placement | None:
        found = self._place(name, name, "")
        suffix = quantised_suffix(name)
        base = name.removesuffix(suffix) + QUANTISED[suffix] if suffix else name
        if found is None and suffix:
            found = self._place(name, base, suffix)
        if found is None and (match := NUMBERED.search(base)):
            whole = self._place(name, base[: match.start()], suffix)
            found = replace(whole, expert=int(match.group(1))) if whole and not whole.converter else None
        return found

    def _place(self, name: str, base: str, suffix: str) -> Placement | None:
        key, pattern = rename_source_key(base, self.renamings, self.converters, self._prefix, self.shapes)
        if key not in self.shapes and base in self.shapes:  # already under the model's own name
            key, pattern = base, None
        if key not in self.shapes:
            return None
        if pattern is None:
            return Placement(name, key, suffix=suffix)
        converter = self._by_pattern[pattern]
        expert = None
        if "*" in pattern:
            match = re.search(pattern.replace("*.", r"(\d+)\."), apply_renamings(base, self.renamings))
            numbers = [int(group) for group in match.groups() if group and group.isdigit()] if match else []
            expert = numbers[-1] if numbers else None
        return Placement(name, key, expert, converter, pattern, suffix)

    def place_all(self, names: Iterable[str]) -> tuple[dict[str, Placement], list[str]]:
        """(placements by disk name, names that the stock model has no use for)."""
        placed, unused = {}, []
        for name in names:
            found = self.place(name)
            if found is None:
                unused.append(name)
            else:
                placed[name] = found
        return placed, unused


def grown_axes(small: dict[str, tuple[int, ...]], large: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters whose shape differs between two builds, with the axis that grew."""
    axes = {}
    for key, shape in small.items():
        other = large.get(key)
        if other is not None and other != shape and len(other) == len(shape):
            axes[key] = next(i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)
    return axes


def disk_axis(placement: Placement, shape: tuple[int, ...], model_axis: int, size: int) -> int | None:
    """The expert axis of a fused tensor as it lies on disk.

    Args:
        placement: where the tensor goes.
        shape: on disk.
        model_axis: the expert axis of the parameter that it goes to.
        size: length of that axis.

    Returns:
        The axis; None for a tensor that belongs to one expert, or when it cannot be told.
    """
    if placement.expert is not None:
        return None
    if placement.suffix:  # blocks and scales keep the experts in front
        return 0
    if placement.converter is None:
        return model_axis
    found = [axis for axis, length in enumerate(shape) if length == size]
    moves = any(isinstance(op, Transpose) and model_axis in (op.dim0, op.dim1) for op in placement.converter.operations)
    if not moves and model_axis in found:
        return model_axis
    return found[0] if len(found) == 1 else None


def natural_key(name: str) -> list[int | str]:
    """Sort key that orders `experts.2` before `experts.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def convert(
    converter: WeightConverter, placements: list[Placement], tensors: dict[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Run transformers' own converter for one parameter.

    Args:
        converter: of the placements.
        placements: all disk tensors of one key.
        tensors: by disk name.

    Returns:
        Parameters by key (several where the converter splits).
    """
    fresh = converter.copy(
        converter._original_source_patterns, converter._original_target_patterns, operations=converter.operations
    )
    patterns = dict(zip(converter.source_patterns, fresh.source_patterns, strict=True))
    for placement in sorted(placements, key=lambda x: natural_key(x.name)):
        fresh.add_tensor(placement.key, placement.name, patterns[placement.pattern], tensors[placement.name])
    made = fresh.convert(placements[0].key, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
