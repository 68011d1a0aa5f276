"""LFU: the expert that was needed least often goes; a newcomer that is needed less often than all others is not kept.

Counts are halved every `half_life` tokens, so that an old text's experts do not stay for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from moekit.serve.policies.base import Key, Policy, Sizes


class Lfu(Policy):
    """Least frequently used, with decay.

    Args:
        sizes: of the model and the memory.
        half_life: tokens after which a use counts half.
    """

    def __init__(self, sizes: Sizes, half_life: float = 512.0):
        super().__init__(sizes)
        self._growth = 2.0 ** (1.0 / (half_life * sizes.layers * sizes.top_k))  # newer uses count more, old ones stay
        self._weight = 1.0
        self._count: dict[Key, float] = defaultdict(float)

    def used(self, key: Key) -> None:
        """Count it."""
        self._weight *= self._growth
        self._count[key] += self._weight
        if self._weight > 1e100:
            for other in self._count:
                self._count[other] /= self._weight
            self._weight = 1.0

    def victim(self, incoming: Key, resident: Collection[Key]) -> Key | None:
        """The one needed least often, unless the newcomer is."""
        least = min(resident, key=lambda key: (self._count[key], key), default=None)
        if least is None or self._count[incoming] < self._count[least]:
            return None
        return least
