"""Reads by threads, natively and in Python: the same records, in the same order of importance, and damage named."""

from __future__ import annotations

import mmap
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import moekit
from moekit.errors import CheckpointError
from moekit.serve import reads as module
from moekit.serve.cache import slot_bytes
from moekit.serve.native import native
from moekit.serve.packing import pack
from moekit.serve.reads import NativeReads, PythonReads, StagedReads, reads_of
from moekit.serve.store import ExpertStore, checksum

KINDS = [
    pytest.param(NativeReads, marks=pytest.mark.skipif(native()[0] is None, reason="nothing can be compiled here")),
    PythonReads,
    StagedReads,
]
pytestmark = pytest.mark.parametrize("kind", KINDS)


class Stream:
    """In the place of a CUDA stream, on a machine that has none: copies must wait for what was told at the start."""

    def __init__(self, device=None):
        self.waited = 0

    def record_event(self):
        return self

    def wait_event(self, event):
        assert event is COMPUTING
        self.waited += 1

    def synchronize(self):
        assert self.waited


COMPUTING = Stream()


@pytest.fixture(autouse=True)
def no_gpu(kind, monkeypatch):
    """What of `StagedReads` is not CUDA's runs on any machine."""
    if kind is StagedReads:
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: COMPUTING)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(module, "_pinned", lambda size: torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(moekit.open("refmoe"), tmp_path_factory.mktemp("reads") / "store")


@pytest.fixture
def store(packed, tmp_path):
    """A copy that may be damaged."""
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    store = ExpertStore(tmp_path)
    yield store
    store.close()


def slots_of(store, count):
    size = slot_bytes(store)
    return list(torch.frombuffer(mmap.mmap(-1, count * size), dtype=torch.uint8).split(size))


def test_every_record_arrives(kind, store):
    slots = slots_of(store, 32)
    reads = kind(store, slots, 4, 2, True)
    for layer in store.layers:
        reads.start([(layer, expert, expert) for expert in range(32)])
        left = set(range(32))
        while left:
            slot = reads.wait(list(left))
            assert reads.over(slot)
            assert reads.take(slot) > 0
            assert not reads.has(slot)
            left.remove(slot)
        for expert in range(32):
            assert checksum(slots[expert]) == store.layers[layer].checksums[expert]
    reads.close()


def test_others_wait_for_urgent_ones_and_may_be_given_up(kind, store):
    """With one thread, and none of the others begun while any runs (quiet 0)."""
    reads = kind(store, slots_of(store, 8), 1, 0, True)
    reads.start([(0, 0, 0), (0, 1, 1)], urgent=False)
    reads.start([(0, 2, 2)])
    assert reads.wait([2]) == 2
    time.sleep(0.05)
    assert not reads.over(0)
    assert reads.hurry(0)
    assert reads.wait([0, 1]) == 0
    assert reads.cancel(1)
    assert not reads.cancel(1)
    assert not reads.has(1)
    assert reads.has(0)
    assert not reads.hurry(0)
    reads.close()


def test_others_begin_when_it_is_quiet(kind, store):
    reads = kind(store, slots_of(store, 8), 2, 1, True)
    reads.start([(0, expert, expert) for expert in range(8)], urgent=False)
    for _ in range(8):
        reads.take(reads.wait([x for x in range(8) if reads.has(x)]))
    reads.close()


@pytest.mark.parametrize("change", ["byte", "swapped"])
def test_damage_is_named_and_the_slot_can_be_used_again(kind, store, change):
    file = store.path / store.layers[2].file
    content, size = bytearray(file.read_bytes()), store.layers[2].of(3).record_bytes
    at = store.layers[2].offsets[3]
    if change == "byte":
        content[at + 1000] ^= 4
    else:  # two pages change places
        content[at : at + 8192] = content[at + 4096 : at + 8192] + content[at : at + 4096]
    file.write_bytes(content)
    reads = kind(store, slots_of(store, 4), 2, 1, True)
    reads.start([(2, 3, 1)])
    with pytest.raises(CheckpointError, match=r"damaged[\s\S]*layer 2, expert 3"):
        reads.take(reads.wait([1]))
    reads.start([(2, 4, 1)])
    reads.take(reads.wait([1]))
    reads.close()
    unchecked = kind(store, slots_of(store, 4), 2, 1, False)
    unchecked.start([(2, 3, 1)])
    unchecked.take(unchecked.wait([1]))
    unchecked.close()
    assert size > 8192


def test_the_kind_is_what_the_place_and_the_machine_allow(kind, store, monkeypatch):
    if kind is PythonReads:
        monkeypatch.setattr(module, "native", lambda: (None, "switched off"))
    slots = [SimpleNamespace(device=torch.device("cuda"))] if kind is StagedReads else slots_of(store, 4)
    reads = reads_of(store, slots, 2, 1, True)
    assert type(reads) is kind
    reads.close()
