"""plan-run: sizes are the engine's, more memory and a faster disk never make it slower, what does not fit is said."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import moekit
import zoo
from moekit.cli import main
from moekit.families.model import Model as Opened
from moekit.serve.engine import Engine
from moekit.serve.machine import Disk
from moekit.serve.outlook import Model, Speeds, describe, foresee, hit_range
from moekit.serve.packing import pack
from moekit.serve.store import ExpertStore

MODEL = Model(24, 96, 24 * 64, 64, {16: 6 << 20, 4: 2 << 20}, 1 << 30, 1 << 30, 64 << 20, (1024, 1024, 512))
SPEEDS = Speeds(Disk(True, 1e9, 5e8), {16: 1e10, 4: 8e9}, {16: 8e9, 4: 1e10}, 1e-6)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_sizes_are_those_of_the_store_and_the_engine(bits, tmp_path):
    opened = moekit.open("refmoe")
    store = ExpertStore(pack(opened, tmp_path / "store", bits=bits))
    before = describe(opened.path, opened.layout, 2048, None, [bits])
    packed = describe(store.path, store.layout, 2048, store, [bits])
    assert before == packed
    engine = Engine(store)
    assert before.context == engine.memory.context
    assert before.rest == sum(x.nbytes for index in range(-1, 6) for _, x in store.rest(index))
    engine.close()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jamba", "llama4_text"])
def test_other_families_are_described(family, tmp_path):
    zoo.build(family).save_pretrained(tmp_path)
    opened = Opened.open(tmp_path)
    found = describe(opened.path, opened.layout, 100, None, [16, 4])
    assert 0 < found.record[4] <= found.record[16]
    assert found.rest_read <= found.rest
    assert found.context is None or found.context > 0
    assert all(x > 0 for x in found.sizes)


def test_hits_from_even_use_to_zipf():
    assert hit_range(0.0, 64) == (0.0, 0.0)
    assert hit_range(1.0, 64) == (1.0, 1.0)
    assert hit_range(0.5, 4) == (0.5, (1 + 2**-1.5) / (1 + 2**-1.5 + 3**-1.5 + 4**-1.5))
    low, high = hit_range(0.25, 128)  # what benchmarks/offload.py found lies between
    assert low < 0.83 < 0.89 < high
    ranges = [hit_range(x / 50, 32) for x in range(51)]
    assert all(low <= high for low, high in ranges)
    assert ranges == sorted(ranges, key=lambda x: x[1])


def test_more_memory_is_never_slower_and_the_limit_moves():
    found = [foresee(MODEL, SPEEDS, 16, gib << 30) for gib in (1, 3, 5, 8, 12, 20)]
    assert [x.fits for x in found] == [False, True, True, True, True, True]
    assert found[0].tokens_s == (0.0, 0.0)
    assert all(a.tokens_s[0] <= b.tokens_s[0] and a.tokens_s[1] <= b.tokens_s[1] for a, b in pairwise(found))
    assert found[1].limit == "disk"
    assert found[-1].held == 1.0
    assert found[-1].disk_bytes == (0.0, 0.0)
    assert found[-1].limit == "memory"
    assert all(x.tokens_s[0] <= x.tokens_s[1] for x in found)
    slow_calls = foresee(MODEL, replace(SPEEDS, call_s=1e-3), 16, 20 << 30)
    assert slow_calls.limit == "calls"


def test_what_it_says_it_needs_is_enough():
    tight = foresee(MODEL, SPEEDS, 16, 1 << 30)
    assert not foresee(MODEL, SPEEDS, 16, tight.least - (64 << 20)).fits
    assert foresee(MODEL, SPEEDS, 16, tight.least + (64 << 20)).fits
    assert foresee(MODEL, SPEEDS, 16, tight.all_experts + (64 << 20)).held == 1.0


def test_the_verb(capsys, tmp_path):
    store = pack(moekit.open("refmoe"), tmp_path / "store", bits=4)
    assert main(["plan-run", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["bits"] for x in found["plans"]] == [4]
    assert found["plans"][0]["held"] == 1.0
    assert main(["plan-run", "refmoe", "--memory", "100MB", "--bits", "8"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "8 bits: give at least" in shown
    for arguments, message in (
        (["refmoe", "--bits", "5"], "cannot be packed so"),
        ([str(store), "--bits", "8"], "its own"),
    ):
        assert main(["plan-run", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(Path.cwd().glob(".moekit-probe-*"))
