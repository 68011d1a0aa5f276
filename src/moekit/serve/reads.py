"""Records read into slots by threads of their own, urgent ones first; one interface, natively or in Python.

A read is known by its slot. Natively (`native/reads.h`) a layer's reads begin in one call and neither reading nor
checking takes Python's lock; what a native read could not do is tried once more in Python, which says what is wrong.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from moekit.errors import CheckpointError
from moekit.serve.native import native
from moekit.serve.store import ExpertStore

Read = tuple[int, int, int]  # decoder layer index, expert, slot
_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int
_IDLE, _DONE = 0, 3  # states in between: not yet over; beyond: failed


class NativeReads:
    """Reads by threads in C.

    Args:
        store: what is read.
        slots: uint8, each as large as the largest record, starting at a multiple of 4 KiB.
        threads: reads at once.
        quiet: a read that is not urgent begins when fewer run than these, and no urgent one waits.
        verify: compare each record's checksum.

    Raises:
        OSError: there are no native functions, or no threads.
    """

    def __init__(self, store: ExpertStore, slots: Sequence[torch.Tensor], threads: int, quiet: int, verify: bool):
        kernels = native()[0]
        self._library: Any = None if kernels is None else _declared(kernels.library)
        if self._library is None:
            raise OSError("no native reads")
        self.store, self.verify, self._slots = store, verify, slots
        self._addresses = [x.data_ptr() for x in slots]
        self._state, self._seconds = (ctypes.c_int32 * len(slots))(), (ctypes.c_double * len(slots))()
        self._what: dict[int, tuple[int, int]] = {}
        self._pool = self._library.moekit_reads_begin(threads, len(slots), quiet, self._state, self._seconds)
        if not self._pool:
            raise OSError("no threads for native reads")

    def start(self, reads: Sequence[Read], urgent: bool = True) -> None:
        """Begin to read records into slots that have no read."""
        jobs = array("q")
        for layer, expert, slot in reads:
            stored = self.store.layers[layer]
            self._what[slot] = layer, expert
            total = stored.checksums[expert] if self.verify else -1
            size = stored.of(expert).record_bytes
            jobs.extend((self.store.handle(layer), stored.offsets[expert], size, self._addresses[slot], total))
        slots = array("i", [slot for _, _, slot in reads])
        self._library.moekit_reads_start(self._pool, len(slots), _at(slots), _at(jobs), urgent)

    def over(self, slot: int) -> bool:
        """Whether the slot's read has ended, well or not."""
        return self._state[slot] >= _DONE

    def wait(self, slots: Sequence[int]) -> int:
        """Wait until the read of one of these slots has ended; that slot."""
        wanted = array("i", slots)
        return int(self._library.moekit_reads_wait(self._pool, len(wanted), _at(wanted)))

    def take(self, slot: int) -> float:
        """Seconds that a read took which has ended; the slot has none any more.

        Raises:
            CheckpointError: the record cannot be read, or is damaged.
        """
        failed = self._state[slot] != _DONE
        self._state[slot] = _IDLE
        if failed:
            _read(self.store, *self._what[slot], self._slots[slot], self.verify)
        return self._seconds[slot]

    def has(self, slot: int) -> bool:
        """Whether the slot has a read that was not taken."""
        return self._state[slot] != _IDLE

    def hurry(self, slot: int) -> bool:
        """Make a read urgent; whether it had not begun."""
        return bool(self._library.moekit_reads_change(self._pool, slot, 1))

    def cancel(self, slot: int) -> bool:
        """Give up a read that has not begun; whether it had not."""
        return bool(self._library.moekit_reads_change(self._pool, slot, 0))

    def close(self) -> None:
        """End the threads, after the reads that they are at."""
        if self._pool:
            self._library.moekit_reads_end(self._pool)
            self._pool = None


def _read(store: ExpertStore, layer: int, expert: int, into: torch.Tensor, verify: bool) -> None:
    store.read(layer, expert, into)
    if verify:
        store.check(layer, expert, into)


def _pinned(size: int) -> torch.Tensor:
    """Memory that a GPU copies from by itself; it begins at a page."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _at(numbers: array) -> int:
    """Address of numbers, which must live until it is used."""
    return numbers.buffer_info()[0]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL | None:
    if getattr(library, "moekit_reads_begin", None) is None:
        return None  # compiled where there are no POSIX threads
    library.moekit_reads_begin.argtypes = [_INT, _INT, _INT, _ADDRESS, _ADDRESS]
    library.moekit_reads_begin.restype = _ADDRESS
    library.moekit_reads_start.argtypes = [_ADDRESS, _INT, _ADDRESS, _ADDRESS, _INT]
    library.moekit_reads_change.argtypes = [_ADDRESS, _INT, _INT]
    library.moekit_reads_wait.argtypes = [_ADDRESS, _INT, _ADDRESS]
    library.moekit_reads_end.argtypes = [_ADDRESS]
    library.moekit_checksum.argtypes = [_ADDRESS, ctypes.c_long]
    library.moekit_checksum.restype = ctypes.c_uint32
    return library


class PythonReads:
    """The same by threads in Python, where nothing can be compiled."""

    def __init__(self, store: ExpertStore, slots: Sequence[torch.Tensor], threads: int, quiet: int, verify: bool):
        self.store, self.verify, self.quiet, self._slots = store, verify, quiet, slots
        self._changed = threading.Condition()
        self._queues: tuple[deque[int], deque[int]] = deque(), deque()  # urgent ones; others
        self._what: dict[int, tuple[int, int]] = {}
        self._ended: dict[int, float | CheckpointError] = {}
        self._running, self._stopped = 0, False
        self._threads = [threading.Thread(target=self._work, name="moekit-read", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, reads: Sequence[Read], urgent: bool = True) -> None:
        """As `NativeReads.start`."""
        with self._changed:
            for layer, expert, slot in reads:
                self._what[slot] = layer, expert
                self._queues[not urgent].append(slot)
            self._changed.notify_all()

    def over(self, slot: int) -> bool:
        """As `NativeReads.over`."""
        return slot in self._ended

    def wait(self, slots: Sequence[int]) -> int:
        """As `NativeReads.wait`."""
        with self._changed:
            self._changed.wait_for(lambda: any(x in self._ended for x in slots))
            return next(x for x in slots if x in self._ended)

    def take(self, slot: int) -> float:
        """As `NativeReads.take`."""
        del self._what[slot]
        found = self._ended.pop(slot)
        if isinstance(found, BaseException):
            raise found
        return found

    def has(self, slot: int) -> bool:
        """As `NativeReads.has`."""
        return slot in self._what

    def hurry(self, slot: int) -> bool:
        """As `NativeReads.hurry`."""
        with self._changed:
            if found := self._unqueue(slot):
                self._queues[0].append(slot)
                self._changed.notify_all()
            return found

    def cancel(self, slot: int) -> bool:
        """As `NativeReads.cancel`."""
        with self._changed:
            if found := self._unqueue(slot):
                del self._what[slot]
            return found

    def _unqueue(self, slot: int) -> bool:
        queue = next((x for x in self._queues if slot in x), None)
        if queue is not None:
            queue.remove(slot)
        return queue is not None

    def close(self) -> None:
        """As `NativeReads.close`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _fetch(self, slot: int) -> None:
        _read(self.store, *self._what[slot], self._slots[slot], self.verify)

    def _next(self) -> int | None:
        urgent, others = self._queues
        if urgent:
            return urgent.popleft()
        return others.popleft() if others and self._running < self.quiet else None

    def _work(self) -> None:
        while True:
            with self._changed:
                slot = self._next()
                while slot is None:
                    if self._stopped:
                        return
                    self._changed.wait()
                    slot = self._next()
                self._running += 1
            found: float | CheckpointError
            started = time.perf_counter()
            try:
                self._fetch(slot)
                found = time.perf_counter() - started
            except CheckpointError as error:
                found = error
            with self._changed:
                self._running -= 1
                self._ended[slot] = found
                self._changed.notify_all()


class StagedReads(PythonReads):
    """Reads into slots that lie on a GPU: each thread reads into pinned pages, which the GPU copies by itself.

    Copies have a stream of their own, so that the GPU computes with the experts that it has meanwhile. A copy waits
    for what the GPU had been told when its read began: until then it may still use what lay in the slot before.
    """

    def __init__(self, store: ExpertStore, slots: Sequence[torch.Tensor], threads: int, quiet: int, verify: bool):
        self._copies = torch.cuda.Stream(slots[0].device)
        self._free_from: dict[int, Any] = {}
        self._own = threading.local()
        super().__init__(store, slots, threads, quiet, verify)

    def start(self, reads: Sequence[Read], urgent: bool = True) -> None:
        """As `NativeReads.start`."""
        told = torch.cuda.current_stream(self._slots[0].device).record_event()
        self._free_from |= {slot: told for _, _, slot in reads}
        super().start(reads, urgent)

    def _fetch(self, slot: int) -> None:
        into = self._slots[slot]
        if getattr(self._own, "pages", None) is None:
            self._own.pages = _pinned(len(into))
        _read(self.store, *self._what[slot], self._own.pages, self.verify)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free_from[slot])
            into.copy_(self._own.pages, non_blocking=True)
            self._copies.record_event().synchronize()


def reads_of(
    store: ExpertStore, slots: Sequence[torch.Tensor], threads: int, quiet: int, verify: bool
) -> NativeReads | PythonReads:
    """Reads into a GPU's slots if that is where they lie; else native ones where there are any."""
    if slots[0].device.type == "cuda":
        return StagedReads(store, slots, threads, quiet, verify)
    try:
        return NativeReads(store, slots, threads, quiet, verify)
    except OSError:
        return PythonReads(store, slots, threads, quiet, verify)
