"""What methods share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moekit.layout import MoELayer

Domain = str | Iterable[str] | None  # the domains whose statistics count; None: all that were measured


class Choice(NamedTuple):
    """What a pruning method answers that chooses a set of experts instead of scoring each.

    Attributes:
        kept: the experts that stay, ascending.
        lost: share (0 to 1, or more) of the layer's output that goes with the others, as a norm.
    """

    kept: tuple[int, ...]
    lost: float


def per_token(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Means [E] from sums [E] over the tokens routed to each expert; 0 for an expert never routed to."""
    return np.divide(total, count, out=np.zeros(len(total)), where=count > 0)


def router_groups(layer: MoELayer) -> list[np.ndarray]:
    """The experts of each of the router's groups."""
    return np.split(np.arange(layer.num_experts), layer.router.groups)


def dominant_first(members: list[int], frequency_E: np.ndarray) -> list[int]:
    """Members by falling frequency, ties by number."""
    return sorted(members, key=lambda e: (-frequency_E[e], e))
