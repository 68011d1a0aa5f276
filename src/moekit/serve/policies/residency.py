"""Which experts are in memory: a policy's decisions carried out, without any memory. Engine and simulator share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moekit.serve.policies.base import Key, Policy


@dataclass(frozen=True)
class Decision:
    """What happens as a layer runs.

    Attributes:
        hits: experts that were in memory.
        misses: experts that must be read, in the order in which they were asked for.
        kept: those of the misses that stay.
        evicted: experts that give their place; they may be hits, which are used before they go.
    """

    hits: tuple[int, ...]
    misses: tuple[int, ...]
    kept: frozenset[int]
    evicted: tuple[Key, ...]


class Residency:
    """Residents, at most `capacity`.

    A forward begins where a layer comes that does not lie behind the last one.

    Args:
        policy: who decides.
        capacity: experts that may stay.
    """

    def __init__(self, policy: Policy, capacity: int):
        self.policy, self.capacity = policy, capacity
        self.resident = np.zeros((policy.sizes.layers, policy.sizes.experts), bool)
        self.count = 0
        self._last = policy.sizes.layers

    def begin(self) -> None:
        """A new text begins."""
        self.policy.begin()
        self._last = self.policy.sizes.layers

    def layer(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> Decision:
        """A layer needs experts: decide for each that is not there whether it stays, and in whose place.

        Args:
            layer: MoE layer, counted from 0.
            experts: needed, each once.
            counts: tokens that need each; None: one.
        """
        ids = np.asarray(experts, np.int64)
        if self.count == self.resident.size:  # all are there for ever: nothing to decide, or to learn for it
            return Decision(tuple(ids.tolist()), (), frozenset(), ())
        if layer <= self._last:
            self.policy.step()
        self._last = layer
        self.policy.used(layer, ids, np.ones(len(ids)) if counts is None else np.asarray(counts, np.float64))
        there = self.resident[layer, ids]
        misses = ids[~there].tolist()
        kept: set[int] = set()
        evicted: list[Key] = []
        for expert in misses:
            key = (layer, expert)
            if self.count >= self.capacity:
                victim = self.policy.victim(key, self.resident)
                if victim is None:
                    continue
                self.drop(victim)
                kept.discard(victim[1]) if victim[0] == layer and victim[1] in kept else evicted.append(victim)
            self.resident[key] = True
            self.count += 1
            self.policy.came(key)
            kept.add(expert)
        return Decision(tuple(ids[there].tolist()), tuple(misses), frozenset(kept), tuple(evicted))

    def drop(self, key: Key) -> None:
        """An expert is no longer there."""
        if self.resident[key]:
            self.resident[key] = False
            self.count -= 1
            self.policy.left(key)
