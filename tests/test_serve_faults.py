"""What goes wrong is named, harms nothing else, and can be gone on from: failing reads, full disks, killed packing."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch

import moekit
from moekit.errors import CheckpointError, OutputError
from moekit.serve import cache, packing
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.serve.reads import PythonReads
from moekit.serve.store import ExpertStore, experts_name

IDS = torch.arange(5, 45)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """refmoe packed, and its logits."""
    store = pack(moekit.open("refmoe"), tmp_path_factory.mktemp("faults") / "store")
    engine = Engine(store, context=64)
    logits = engine.logits(IDS)
    engine.close()
    return store, logits


def test_a_read_that_fails_is_named_and_the_next_run_is_right(whole, monkeypatch):
    store, logits = whole
    monkeypatch.setattr(cache, "reads_of", PythonReads)
    engine, stock, reads = Engine(store, context=64), os.preadv, []

    def broken(handle, buffers, offset):
        reads.append(offset)
        if len(reads) == 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stock(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"cannot be read[\s\S]*layer \d, expert \d+[\s\S]*Input/output error"):
        engine.logits(IDS)
    assert torch.equal(engine.logits(IDS), logits)
    engine.close()


def test_a_read_may_come_in_pieces(whole, monkeypatch):
    store, logits = whole
    monkeypatch.setattr(cache, "reads_of", PythonReads)
    engine, stock = Engine(store, context=64), os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: stock(handle, [buffers[0][:4096]], at))
    assert torch.equal(engine.logits(IDS), logits)
    engine.close()


def test_a_store_that_becomes_shorter_while_it_runs(whole, tmp_path):
    for file in whole[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    store = ExpertStore(tmp_path)
    os.truncate(tmp_path / experts_name(2), 5000)
    record = torch.frombuffer(mmap.mmap(-1, store.layers[2].of(0).record_bytes), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"ends early[\s\S]*layer 2, expert 0"):
        store.read(2, 0, record)
    with pytest.raises(CheckpointError, match="not whole"):
        ExpertStore(tmp_path)
    store.close()


@pytest.mark.parametrize("call", [3, 4])
def test_a_disk_that_fills_up_while_packing(whole, tmp_path, monkeypatch, call):
    """At an experts file (4), or at the others' (3): nothing has the final name, and the same command goes on."""
    stock, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"the disk is full[\s\S]*run the same again"):
        pack(moekit.open("refmoe"), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(os, "fsync", stock)
    assert_right(pack(moekit.open("refmoe"), tmp_path / "store"), whole)
    assert os.listdir(tmp_path) == ["store"]


def test_a_disk_that_is_full_for_safetensors(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull, ... })")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        pack(moekit.open("refmoe"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_is_too_small_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="not enough disk space"):
        pack(moekit.open("refmoe"), tmp_path / "store")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import moekit
from moekit.serve import cache, packing
stock = packing._write_experts
def killed(file, *rest):
    if file.name == "experts-00003.bin":
        file.write_bytes(b"half of a layer")
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(file, *rest)
packing._write_experts = killed
packing.pack(moekit.open("refmoe"), sys.argv[1])
"""


def test_a_killed_pack_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["store.partial"]
    stock, written = packing._write_experts, []
    monkeypatch.setattr(packing, "_write_experts", lambda *args: written.append(args[0].name) or stock(*args))
    with pytest.raises(OutputError, match="another job left unfinished work"):
        pack(moekit.open("refmoe"), tmp_path / "store", bits=8)
    store = pack(moekit.open("refmoe"), tmp_path / "store")
    assert written == [experts_name(i) for i in (3, 4, 5)]
    assert_right(store, whole)


def assert_right(store, whole):
    engine = Engine(store, context=64)
    assert torch.equal(engine.logits(IDS), whole[1])
    engine.close()
