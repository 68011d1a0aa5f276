"""Which models stock transformers can load with packed experts (compressed-tensors).

Where experts are packed, transformers puts its unpacking step before every one of a family's converters whose sources
are weights (`HfQuantizer.update_weight_conversions`). That step gives on what it has unpacked, and nothing else: a
converter of tensors that are not packed (three convolutions joined to one, gate and up of a dense MLP) gets nothing,
and one that splits a tensor cannot be built at all, for it would have many sources and many targets.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from moekit.families.detect import Understanding

WEIGHT = ".weight"


def unloadable(understanding: Understanding) -> str:
    """Why stock transformers cannot load the model once its experts are packed; "" when it can."""
    for converter in get_model_conversion_mapping(understanding.model):
        if isinstance(converter, WeightConverter) and _unpacked_first(converter) and len(converter.target_patterns) > 1:
            return f"it would have to split {converter.source_patterns[0]}, which it cannot where weights are packed"
    packed = {x.name for layer in understanding.layout.layers for x in layer.tensors if x.role == "expert"}
    for name, placement in understanding.placed.items():
        if name not in packed and placement.converter and _unpacked_first(placement.converter):
            return f"it makes {placement.key} of several tensors, which it cannot where weights are packed"
    return ""


def _unpacked_first(converter: WeightConverter) -> bool:
    return all(source.endswith(WEIGHT) for source in converter.source_patterns)
