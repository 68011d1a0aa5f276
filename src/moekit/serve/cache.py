"""Experts in memory: a fixed number of slots, filled from the store by a few threads, emptied as a policy says.

What stays is decided when a layer begins, by `moekit.serve.policies.Residency`, as the simulator decides it; reads of
what is missing begin before that. A few slots are for experts that come and go: those that are not kept, and those that
a predictor asks for ahead. The latter are read while the disk has nothing else to do, and only as many as fit into the
pauses of the disk that were measured; they take no resident's place: prefetching changes neither numbers nor hits.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from moekit.errors import CheckpointError, RecipeError
from moekit.recipe import format_bytes
from moekit.serve.forms import Held
from moekit.serve.policies import Decision, Key, Policy, Residency
from moekit.serve.reads import reads_of
from moekit.serve.store import ExpertStore, Form

READERS = 4  # reads in flight: what one needs for the disk's full speed, and no more memory than that
QUIET = 2  # fewer reads in flight than these: one more may be read ahead
PASSING = 8  # slots for experts that come and go, at most
PASSING_SHARE = 8  # one in so many slots is for them
CPU = torch.device("cpu")
TOUCHED_BYTES = 4 << 30  # of slots that are made real at the start; more would take seconds
FORGETTING = 0.1  # weight of the newest time among those measured


@dataclass
class Counts:
    """What the cache has done.

    Attributes:
        hits: experts found in memory, by MoE layer.
        misses: experts read, by MoE layer.
        read_bytes: from the disk.
        stall_s: time that the computation waited for reads.
        read_s: time that readers were busy, several at once.
        ahead: of the misses, those whose read had begun before they were asked for.
        wasted: experts read ahead that nobody asked for.
    """

    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    read_bytes: int = 0
    stall_s: float = 0.0
    read_s: float = 0.0
    ahead: int = 0
    wasted: int = 0

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
        policy: which expert gives its place; made for as many slots as `residents_in` says.
        verify: compare each record's checksum when it is read.
        device: in whose memory the slots are.

    Attributes:
        holds_all: there is room for all experts: none of them ever goes, and the policy is asked only about newcomers.
        predict: from the decoder index of the layer that runs, the experts that the next MoE layer will need, likeliest
            first; None: nothing is read ahead.

    Raises:
        RecipeError: not even one token's experts of a layer fit.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory_bytes: int,
        policy: Policy,
        verify: bool = True,
        device: torch.device = CPU,
    ):
        self.store, self.policy, self.verify = store, policy, verify
        self.indices = sorted(store.layers)  # decoder layer index by MoE layer number
        self._number = {index: number for number, index in enumerate(self.indices)}
        self.slot_bytes = slot_bytes(store)
        total = slots_in(store, memory_bytes)
        self._slots = _arena(total * self.slot_bytes, device).split(self.slot_bytes)
        self._free = list(range(total))[::-1]
        self._residency = Residency(policy, residents_in(store, memory_bytes))
        every = sum(len(layer.offsets) for layer in store.layers.values())
        self.holds_all = self._residency.capacity >= every
        self._resident: dict[Key, int] = {}
        self._held: list[tuple[Form, Held] | None] = [None] * total  # by slot: views of it, made once
        self.reads = reads_of(store, self._slots, READERS, QUIET, verify)
        self.counts = Counts([0] * len(self.indices), [0] * len(self.indices))
        self.predict: Callable[[int], Sequence[int]] | None = None
        self._early: dict[Key, int] = {}
        self._unwanted: list[int] = []
        self._one_read_s = 0.0
        self._pause_s = 0.0
        self._idle_since: float | None = None

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self._slots)

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert of a decoder layer is in memory."""
        return (self._number[layer], expert) in self._resident

    def begin(self) -> None:
        """Tell the policy that a new text begins."""
        self._residency.begin()

    def run(
        self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Give each of a layer's experts once, those in memory first, the others as they arrive.

        What is given lies in a slot and may be overwritten when the next one is asked for, unless all are in memory.

        Args:
            layer: decoder layer index.
            experts: needed now, each once.
            counts: tokens that need each; None: one.

        Raises:
            CheckpointError: a record cannot be read, or is damaged.
        """
        number = self._number[layer]
        if self.holds_all and self.predict is None and all((number, x) in self._resident for x in experts):
            self.counts.hits[number] += len(experts)
            for expert in experts:
                yield expert, self._views(layer, expert, self._resident[number, expert])
            return
        self._pause_ends()
        missing = [x for x in experts if not self._residency.resident[number, x]]
        reading: dict[int, int] = {}  # expert by slot
        going: dict[int, int] = {}
        kept: frozenset[int] = frozenset()
        waiting = self._take_early(number, missing, reading)
        try:
            self._start(layer, waiting, reading)
            decision = self._residency.layer(number, experts, counts)
            kept = decision.kept
            self.counts.hits[number] += len(decision.hits)
            self.counts.misses[number] += len(decision.misses)
            going = self._make_room(number, decision)
            self._start(layer, waiting, reading)
            self._look_ahead(layer, waiting)
            self._rests(waiting, reading)
            for expert in decision.hits:
                slot = going[expert] if expert in going else self._resident[number, expert]
                yield expert, self._views(layer, expert, slot)
                if expert in going:
                    self._free.append(going.pop(expert))
                self._start(layer, waiting, reading)
            while reading:
                slot = self._arrived(list(reading))
                self._took(layer, reading[slot], slot)
                expert = reading.pop(slot)
                if expert in kept:
                    self._resident[number, expert] = slot
                else:
                    going[expert] = slot
                self._rests(waiting, reading)
                yield expert, self._views(layer, expert, slot)
                if expert in going:
                    self._free.append(going.pop(expert))
                self._start(layer, waiting, reading)
        finally:
            self._abandon(number, kept, waiting, reading)
            self._free += going.values()

    def _arrived(self, slots: list[int]) -> int:
        """One of these slots whose read has ended."""
        for slot in slots:
            if self.reads.over(slot):
                return slot
        started = time.perf_counter()
        slot = self.reads.wait(slots)
        self.counts.stall_s += time.perf_counter() - started
        return slot

    def _took(self, layer: int, expert: int, slot: int) -> None:
        """Count a read that has ended.

        Raises:
            CheckpointError: it has failed.
        """
        took = self.reads.take(slot)
        self.counts.read_s += took
        self.counts.read_bytes += self.store.layers[layer].of(expert).record_bytes
        self._one_read_s += (FORGETTING if self._one_read_s else 1.0) * (took - self._one_read_s)

    def _make_room(self, number: int, decision: Decision) -> dict[int, int]:
        """Take the places of experts that go; those that are needed first, with their slots, by expert."""
        going = {}
        for key in decision.evicted:
            slot = self._resident.pop(key)
            if key[0] == number and key[1] in decision.hits:
                going[key[1]] = slot
            else:
                self._free.append(slot)
        return going

    def _start(self, layer: int, waiting: deque[int], reading: dict[int, int]) -> None:
        """Begin as many reads as there are places."""
        if not waiting:
            return
        self._reap()
        if not self._free and not reading and self._unwanted:
            self.reads.wait(self._unwanted)
            self._reap()
        begun = []
        while waiting and self._free:
            expert, slot = waiting.popleft(), self._free.pop()
            begun.append((layer, expert, slot))
            reading[slot] = expert
        if begun:
            self.reads.start(begun)

    def _abandon(self, number: int, kept: frozenset[int], waiting: deque[int], reading: dict[int, int]) -> None:
        """Wait for reads that nobody wants any more, take their slots back, and forget what was not read."""
        for slot in reading:
            self._drop_read(slot)
        for expert in [*waiting, *reading.values()]:
            if expert in kept:
                self._residency.drop((number, expert))

    def _drop_read(self, slot: int) -> None:
        """End a read, whatever it may bring."""
        if self.reads.has(slot) and not self.reads.cancel(slot):
            self.reads.wait([slot])
            with suppress(CheckpointError):
                self.reads.take(slot)
        self._free.append(slot)

    def _take_early(self, number: int, missing: Sequence[int], reading: dict[int, int]) -> deque[int]:
        """Go on with what was begun ahead and is needed, give up the rest; the experts that are still to be read."""
        waiting = deque(missing)
        for key, slot in self._early.items():
            if key[0] == number and key[1] in missing:
                waiting.remove(key[1])
                reading[slot] = key[1]
                self.counts.ahead += not self.reads.hurry(slot)
            elif self.reads.cancel(slot):
                self._free.append(slot)
            else:
                self.counts.wasted += 1
                self._unwanted.append(slot)
        self._early.clear()
        return waiting

    def _reap(self) -> None:
        """Take back the slots of reads that nobody asked for, once they are over."""
        for slot in [x for x in self._unwanted if self.reads.over(x)]:
            self._unwanted.remove(slot)
            with suppress(CheckpointError):
                self.reads.take(slot)
            self._free.append(slot)

    def _look_ahead(self, layer: int, waiting: deque[int]) -> None:
        """Read what the next layer is likely to need, as far as the disk's next pause will last."""
        number = self._number[layer] + 1
        if self.predict is None or number >= len(self.indices) or not self._one_read_s or waiting:
            return
        self._reap()
        count = min(int(READERS * self._pause_s / self._one_read_s), len(self._free) - 1)
        if count <= 0:
            return
        likely = [x for x in self.predict(layer) if not self._residency.resident[number, x]][:count]
        for expert in likely:
            self._early[number, expert] = self._free.pop()
        if likely:
            index = self.indices[number]
            self.reads.start([(index, expert, self._early[number, expert]) for expert in likely], urgent=False)

    def _rests(self, waiting: deque[int], reading: dict[int, int]) -> None:
        """Note since when the disk has had nothing demanded to read."""
        if not reading and not waiting and self._idle_since is None:
            self._idle_since = time.perf_counter()

    def _pause_ends(self) -> None:
        """Note how long the disk had nothing demanded to read."""
        if self._idle_since is not None:
            pause = time.perf_counter() - self._idle_since
            self._pause_s += (FORGETTING if self._pause_s else 1.0) * (pause - self._pause_s)
            self._idle_since = None

    def _views(self, layer: int, expert: int, slot: int) -> dict[str, torch.Tensor]:
        form = self.store.layers[layer].of(expert)
        held = self._held[slot]
        if held is None or held[0] is not form:
            held = self._held[slot] = (form, Held(form.views(self._slots[slot])))
        return held[1]

    def close(self) -> None:
        """End the readers."""
        self.reads.close()


def _arena(size: int, device: torch.device) -> torch.Tensor:
    """Memory for all slots; on the CPU its pages are real from the start, up to `TOUCHED_BYTES`."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # large ones: some hundred times fewer for a read to get and to pin
        pages.madvise(mmap.MADV_HUGEPAGE)
    arena = torch.frombuffer(pages, dtype=torch.uint8)
    arena[:TOUCHED_BYTES].zero_()  # to make a slot's pages real takes as long as to read into it
    return arena


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


def residents_in(store: ExpertStore, memory_bytes: int) -> int:
    """How many experts may stay: the slots less a few for experts that come and go.

    Raises:
        RecipeError: as `slots_in`.
    """
    slots, every = slots_in(store, memory_bytes), sum(len(layer.offsets) for layer in store.layers.values())
    return every if slots > every else slots - max(1, min(PASSING, slots // PASSING_SHARE))
