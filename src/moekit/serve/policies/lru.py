"""LRU: the expert that was not needed for longest goes, whatever its layer."""

from __future__ import annotations

from collections.abc import Collection

from moekit.serve.policies.base import Key, Policy, Sizes


class Lru(Policy):
    """Least recently used."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._time = 0
        self._last: dict[Key, int] = {}

    def used(self, key: Key) -> None:
        """Note when."""
        self._time += 1
        self._last[key] = self._time

    def victim(self, incoming: Key, resident: Collection[Key]) -> Key | None:
        """The one whose last use lies farthest back."""
        return min(resident, key=lambda key: (self._last.get(key, 0), key), default=None)
