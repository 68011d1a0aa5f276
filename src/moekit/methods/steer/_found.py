"""What a steering method says of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Found(NamedTuple):
    """A layer's experts between two kinds of text.

    Attributes:
        scores: float64 [E], above zero where an expert belongs to kind a more than to kind b.
        off: fields of `moekit.plans.Steer` that switch an expert off.
        on: fields that switch one on.
    """

    scores: np.ndarray
    off: Mapping[str, Any]
    on: Mapping[str, Any]


BAN, FORCE = {"action": "ban"}, {"action": "force"}
EMPTY = {"action": "scale", "strength": 0.0, "renormalise": True}
