"""Experts in memory: a fixed number of slots, filled from the store by a few threads, emptied as a policy says."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from moekit.errors import RecipeError
from moekit.recipe import format_bytes
from moekit.serve.policies import Key, Policy
from moekit.serve.store import ExpertStore

READERS = 4  # reads in flight: what one needs for the disk's full speed, and no more memory than that


@dataclass
class Counts:
    """What the cache has done.

    Attributes:
        hits: experts found in memory, by MoE layer.
        misses: experts read, by MoE layer.
        read_bytes: from the disk.
        stall_s: time that the computation waited for reads.
        read_s: time that readers were busy, several at once.
    """

    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    read_bytes: int = 0
    stall_s: float = 0.0
    read_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of experts found in memory; 0 before the first."""
        total = sum(self.hits) + sum(self.misses)
        return sum(self.hits) / total if total else 0.0


class ExpertCache:
    """Slots for experts, each as large as the largest record.

    Args:
        store: what they are read from.
        memory_bytes: for all slots together.
        policy: which expert gives its place; made for the number of slots that `slots_in` says.
        verify: compare each record's checksum when it is read.

    Raises:
        RecipeError: not even one token's experts of a layer fit.
    """

    def __init__(self, store: ExpertStore, memory_bytes: int, policy: Policy, verify: bool = True):
        self.store, self.policy, self.verify = store, policy, verify
        self.indices = sorted(store.layers)  # decoder layer index by MoE layer number
        self._number = {index: number for number, index in enumerate(self.indices)}
        self.slot_bytes = slot_bytes(store)
        total = slots_in(store, memory_bytes)
        self._arena = mmap.mmap(-1, total * self.slot_bytes)  # its pages become real as they are written
        whole = torch.frombuffer(self._arena, dtype=torch.uint8)
        self._slots = list(whole.split(self.slot_bytes))
        self._free = list(range(total))
        self._resident: dict[Key, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="moekit-read")
        self.counts = Counts([0] * len(self.indices), [0] * len(self.indices))

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self._slots)

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert of a decoder layer is in memory."""
        return (self._number[layer], expert) in self._resident

    def run(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Give each of a layer's experts once, those in memory first, the others as they arrive.

        What is given lies in a slot and may be overwritten when the next one is asked for.

        Args:
            layer: decoder layer index.
            experts: needed now, each once.

        Raises:
            CheckpointError: a record cannot be read, or is damaged.
        """
        number = self._number[layer]
        keys = [(number, expert) for expert in experts]
        for key in keys:
            self.policy.used(key)
        here = [key for key in keys if key in self._resident]
        missing = [key for key in keys if key not in self._resident]
        self.counts.hits[number] += len(here)
        self.counts.misses[number] += len(missing)
        waiting = missing[::-1]
        busy: set[Key] = set(here)  # not to be evicted while this layer runs
        reads: dict[Future, tuple[Key, int, bool]] = {}
        try:
            self._start(layer, waiting, busy, reads)
            for key in here:
                yield key[1], self._views(layer, key[1], self._resident[key])
                busy.discard(key)
                self._start(layer, waiting, busy, reads)
            while reads:
                started = time.perf_counter()
                done, _ = wait(reads, return_when=FIRST_COMPLETED)
                self.counts.stall_s += time.perf_counter() - started
                for future in done:
                    key, slot, keep = reads.pop(future)
                    try:
                        future.result()
                    except BaseException:
                        self._free.append(slot)
                        raise
                    if keep:
                        self._resident[key] = slot
                    yield key[1], self._views(layer, key[1], slot)
                    if not keep:
                        self._free.append(slot)
                    busy.discard(key)
                    self._start(layer, waiting, busy, reads)
        finally:
            self._abandon(reads)

    def _abandon(self, reads: dict[Future, tuple[Key, int, bool]]) -> None:
        """Wait for reads that nobody wants any more, and take their slots back."""
        for future, (_, slot, _) in reads.items():
            future.cancel()
            wait([future])
            self._free.append(slot)

    def _start(
        self, layer: int, waiting: list[Key], busy: set[Key], reads: dict[Future, tuple[Key, int, bool]]
    ) -> None:
        """Begin as many reads as there are readers and places."""
        while waiting and len(reads) < READERS:
            key = waiting[-1]
            found = self._place(key, busy, bool(reads))
            if found is None:
                return
            waiting.pop()
            slot, keep = found
            busy.add(key)
            reads[self._pool.submit(self._read, layer, key[1], slot)] = (key, slot, keep)

    def _place(self, key: Key, busy: set[Key], may_wait: bool) -> tuple[int, bool] | None:
        """(slot, whether the expert stays in it); None while all are in use."""
        reserve = 0 if len(self._resident) < self.slots - READERS else 1
        if len(self._free) > reserve:
            keep = len(self._resident) < self.slots - 1
            return self._free.pop(), keep
        candidates = [other for other in self._resident if other not in busy]
        victim = self.policy.victim(key, candidates) if candidates else None
        if victim is not None:
            return self._resident.pop(victim), True
        if self._free:
            return self._free.pop(), False
        if may_wait or not candidates:
            return None
        return self._resident.pop(candidates[0]), True

    def _read(self, layer: int, expert: int, slot: int) -> None:
        started = time.perf_counter()
        form = self.store.read(layer, expert, self._slots[slot])
        if self.verify:
            self.store.check(layer, expert, self._slots[slot])
        self.counts.read_bytes += form.record_bytes
        self.counts.read_s += time.perf_counter() - started

    def _views(self, layer: int, expert: int, slot: int) -> dict[str, torch.Tensor]:
        return self.store.layers[layer].of(expert).views(self._slots[slot])

    def close(self) -> None:
        """End the readers."""
        self._pool.shutdown(cancel_futures=True)


def slot_bytes(store: ExpertStore) -> int:
    """Bytes of a slot: of the largest record."""
    return max(form.record_bytes for layer in store.layers.values() for form in layer.forms)


def slots_in(store: ExpertStore, memory_bytes: int) -> int:
    """How many experts fit; never more than there are.

    Raises:
        RecipeError: fewer than one can work with: an expert that is used while the next is read.
    """
    size, least = slot_bytes(store), READERS + 1
    slots = min(memory_bytes // size, sum(len(layer.offsets) for layer in store.layers.values()) + 1)
    if slots < least:
        raise RecipeError(
            "too little memory is left for experts",
            where="memory",
            expected=f"at least {format_bytes(least * size)} for {least} experts of {format_bytes(size)}",
            got=format_bytes(max(0, memory_bytes)),
            fix="give more memory, or pack the model with fewer bits",
        )
    return slots
