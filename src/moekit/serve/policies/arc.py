"""ARC: two lists, of experts needed once and of those needed again, whose lengths follow what was evicted too early.

T1 and T2 hold residents that were needed once, and more than once, lately; B1 and B2 remember those that left T1 and
T2. A miss that B1 remembers lets T1 grow (p up by max(1, |B2| / |B1|)), one that B2 remembers lets it shrink (p down by
max(1, |B1| / |B2|)). T1's oldest goes while T1 is longer than p, else T2's oldest. Every newcomer stays.

Paper: N. Megiddo, D. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4. Deviations:
none.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from moekit.serve.policies.base import Key, Policy, Sizes
from moekit.serve.routes import Routes


class Lists:
    """ARC's lists and target for `capacity` places; the oldest beyond |T1| + |B1| = c and 2 c in all are forgotten."""

    def __init__(self, capacity: int):
        self.capacity, self.p = capacity, 0.0
        self.once: OrderedDict[Key, None] = OrderedDict()
        self.often: OrderedDict[Key, None] = OrderedDict()
        self.was_once: OrderedDict[Key, None] = OrderedDict()
        self.was_often: OrderedDict[Key, None] = OrderedDict()

    def used(self, key: Key) -> None:
        """A hit goes to the head of T2; a remembered miss moves the target."""
        if key in self.once or key in self.often:
            self.once.pop(key, None)
            self.often.pop(key, None)
            self.often[key] = None
        elif key in self.was_once:
            self.p = min(self.capacity, self.p + max(1.0, len(self.was_often) / len(self.was_once)))
        elif key in self.was_often:
            self.p = max(0.0, self.p - max(1.0, len(self.was_once) / len(self.was_often)))

    def victim(self, incoming: Key) -> Key | None:
        """The oldest of T1 or T2; None where both are empty."""
        longer = len(self.once) > self.p or (incoming in self.was_often and len(self.once) == self.p)
        source = self.once if self.once and (longer or not self.often) else self.often
        return next(iter(source), None)

    def came(self, key: Key) -> None:
        """Into T2 where it is remembered, else into T1."""
        remembered = key in self.was_once or key in self.was_often
        self.was_once.pop(key, None)
        self.was_often.pop(key, None)
        (self.often if remembered else self.once)[key] = None
        while self.was_once and len(self.once) + len(self.was_once) > self.capacity:
            self.was_once.popitem(last=False)
        while self.was_often and self._all() > 2 * self.capacity:
            self.was_often.popitem(last=False)

    def left(self, key: Key) -> None:
        """Remember it."""
        if key in self.once:
            del self.once[key]
            self.was_once[key] = None
        elif key in self.often:
            del self.often[key]
            self.was_often[key] = None

    def _all(self) -> int:
        return len(self.once) + len(self.often) + len(self.was_once) + len(self.was_often)


class Arc(Policy):
    """Adaptive replacement over all layers."""

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        super().__init__(sizes, trace, future)
        self._lists = Lists(sizes.slots)

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Tell the lists."""
        for expert in experts.tolist():
            self._lists.used((layer, expert))

    def victim(self, incoming: Key, resident_LE: np.ndarray) -> Key | None:
        """Whom the lists name."""
        return self._lists.victim(incoming)

    def came(self, key: Key) -> None:
        """Tell the lists."""
        self._lists.came(key)

    def left(self, key: Key) -> None:
        """Tell the lists."""
        self._lists.left(key)
