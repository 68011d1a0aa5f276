"""Experts that are constant vectors (MoNE), in files of moekit's own form.

The vector of expert 3 lies under the stock model's own name of the experts, as `model.layers.2.mlp.experts.3.constant`,
whatever the disk calls the weights of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moekit.families.stock import ExpertsAt

CONSTANT = ".constant"
_NAME = re.compile(r"(.*)\.(\d+)" + re.escape(CONSTANT))


def split_constants(names: Iterable[str], experts: list[ExpertsAt]) -> tuple[dict[int, dict[int, str]], list[str]]:
    """Tell the vectors that stand for experts from other tensors that the stock model has no use for.

    Args:
        names: of tensors on disk.
        experts: where the model has experts.

    Returns:
        (names of vectors by decoder layer index and expert, the other names).
    """
    layers = {at.path: at.layer for at in experts}
    found: dict[int, dict[int, str]] = {}
    others = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match[1] in layers:
            found.setdefault(layers[match[1]], {})[int(match[2])] = name
        else:
            others.append(name)
    return found, others


def is_constant(name: str) -> bool:
    """Whether a tensor of a layer's experts is such a vector."""
    return name.endswith(CONSTANT)
