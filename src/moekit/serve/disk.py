"""How fast a store's disk gives experts."""

from __future__ import annotations

import mmap
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from moekit.serve.cache import READERS, slot_bytes
from moekit.serve.store import ExpertStore

SECONDS = 0.5


def read_speed(store: ExpertStore, seconds: float = SECONDS) -> float:
    """Bytes a second, records in random order, as many at once as the engine reads.

    Args:
        store: whose records are read.
        seconds: for about so long.
    """
    size = slot_bytes(store)
    arena = mmap.mmap(-1, READERS * size)
    buffers = torch.frombuffer(arena, dtype=torch.uint8).split(size)
    records = [(index, expert) for index, layer in store.layers.items() for expert in range(len(layer.offsets))]
    random.Random(0).shuffle(records)
    end = time.perf_counter() + seconds

    def reads(reader: int) -> int:
        done = 0
        for layer, expert in records[reader::READERS]:
            done += store.read(layer, expert, buffers[reader]).record_bytes
            if time.perf_counter() > end:
                break
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(reads, range(READERS)))
    return total / (time.perf_counter() - started)
