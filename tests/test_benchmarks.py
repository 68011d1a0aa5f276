"""The benchmarks' own parts: the line of goals, the arguments, the checkpoints that they make. None of them is run."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moekit
from moekit import methods, refmoe

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
BENCHMARKS = sorted(FOLDER.glob("[a-z]*.py"))


@pytest.fixture
def load(monkeypatch):
    """Import a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def get(name: str) -> ModuleType:
        return __import__(name)

    return get


def test_the_last_line_is_one_json_object(load, capsys):
    goals = {
        "low": (1.23456789, 1.3, "<="),
        "high": (0.5, 0.6, ">="),
        "exact": (2, 2, ">="),
        "none": (math.nan, 1, "<="),
    }
    returned = load("_goals").finish("name", goals, quick=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == returned
    assert printed["benchmark"] == "name"
    assert printed["quick"] is True
    assert {goal: row["met"] for goal, row in printed["goals"].items()} == {
        "low": True,
        "high": False,
        "exact": True,
        "none": False,
    }
    assert printed["goals"]["low"] == {"value": 1.235, "goal": 1.3, "sign": "<=", "met": True}
    assert printed["goals"]["none"]["value"] is None


def test_a_value_is_judged_before_it_is_rounded(load):
    assert not load("_goals").finish("x", {"a": (1.30001, 1.3, "<=")})["goals"]["a"]["met"]


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda x: x.stem)
def test_every_benchmark_has_a_quick_mode_and_ends_with_its_goals(file, load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        load(file.stem).main()
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out
    assert re.search(rf'\bfinish\(\s*"{file.stem}",', file.read_text())
    assert f"| [{file.stem}]({file.name}) |" in (FOLDER / "README.md").read_text()


def test_the_readme_names_no_benchmark_that_is_gone():
    named = {x.split(")")[0] for x in (FOLDER / "README.md").read_text().split("](")[1:]}
    assert {FOLDER / x for x in named if x.endswith(".py")} == set(BENCHMARKS)


@pytest.fixture
def checkpoint(load, tmp_path) -> moekit.families.model.Model:
    synthetic = load("_synthetic")
    shape = synthetic.Shape(hidden=64, inner=32, experts=8, chosen=2, heads=2, kv_heads=1, head=32)
    synthetic.make(tmp_path / "model", 3, shape)
    model = moekit.open(tmp_path / "model")
    sizes = [sum(x.bytes for x in model.checkpoint.tensors.values() if f".layers.{i}." in x.name) for i in range(3)]
    assert len(set(sizes)) == 1
    norms = 2 * (2 * 64 + 2 * 32)
    assert sizes[0] == shape.layer_bytes() + norms
    return model


def test_synthetic_tokens_use_different_experts_about_equally_often(checkpoint):
    data = moekit.load_data(checkpoint, {"python": refmoe.texts()["python"]}, tokens=4096, sequence_length=256)
    stats = moekit.measure(checkpoint, data, dtype=torch.float32)
    for layer in checkpoint.layout.routed:
        count_E = stats.get("count", layer.index)
        assert count_E.max() < 3 * count_E.mean()
        rows = stats.layers[layer.index].vocabulary
        token, counts = rows[:, 1], rows[:, 3]
        often = [t for t in set(token.tolist()) if counts[token == t].sum() >= 40]
        top_2 = [sorted(counts[token == t])[-2:] for t in often]
        assert sum(map(sum, top_2)) > 0.6 * sum(counts[token == t].sum() for t in often)  # chance: 0.25


def test_shallow_and_deep_checkpoints_share_their_layers(load, tmp_path, checkpoint):
    synthetic = load("_synthetic")
    synthetic.make(tmp_path / "shallow", 1, synthetic.Shape(64, 32, 8, 2, 2, 1, 32))
    shallow = moekit.open(tmp_path / "shallow").checkpoint
    for name in shallow.tensors:
        assert torch.equal(shallow.read(name), checkpoint.checkpoint.read(name)), name


def test_calls_take_turns_at_being_first(load):
    order: list[str] = []

    def call(name: str) -> str:
        order.append(name)
        return name

    calls = [lambda x=x: call(x) for x in "ab"]
    assert [load("stream").in_turn(i, *calls) for i in range(3)] == [["a", "b"]] * 3
    assert order == list("abbaab")


def test_peak_rss_sees_what_was_allocated(load):
    stream = load("stream")
    before = stream.peak_rss()
    torch.ones(before // 2, dtype=torch.uint8)
    assert 1.3 * before < stream.peak_rss() < 2 * before


def test_pruning_results_are_means_of_ratios(load, tmp_path):
    module = load("prune_methods")
    full = {"a": 10.0, "b": 20.0}
    scores = {
        ("reap", 0.5, "a"): [{"a": 11.0, "b": 40.0}],
        ("reap", 0.5, "b"): [{"a": 30.0, "b": 22.0}],
        ("reap", 0.5, "mixed"): [{"a": 12.0, "b": 24.0}],
        ("random", 0.5, "mixed"): [{"a": 10.0, "b": 80.0}, {"a": 40.0, "b": 20.0}],
    }
    results = module.Results(full, scores)
    assert results.inside("reap", 0.5) == pytest.approx([1.1, 1.1])
    assert results.outside("reap", 0.5) == pytest.approx([3.0, 2.0])
    assert results.mixed("reap", 0.5) == pytest.approx([1.2, 1.2])
    assert results.inside("random", 0.5) == results.mixed("random", 0.5) == pytest.approx([2.0, 2.0])
    assert results.luck(0.5) == pytest.approx((2.0, 2.0))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured:start -->\nold\n<!-- measured:end -->\nafter\n")
    module.fill(page, module.slot(results, "reap", [0.5]))
    text = page.read_text()
    assert "| 50% | 1.10 | 2.45 | 1.20 |\n\nRandom: 2.00 at 50%.\n<!-- measured:end -->\nafter\n" in text
    assert "old" not in text
    module.fill(page, "new")
    assert page.read_text() == "before\n<!-- measured:start -->\nnew\n<!-- measured:end -->\nafter\n"


def test_every_scoring_method_is_planned_for_every_calibration(load, monkeypatch):
    module = load("prune_methods")
    monkeypatch.setattr(module.moekit, "plan", lambda name, stats, **settings: settings)
    stats = type("Stats", (), {"domains": ("a", "b")})
    rows = list(module.plans(stats, (0.5, 0.25), 3))
    scored = sum(not methods.get(x).most_experts for x in methods.names("prune")) - 1
    assert len(rows) == 2 * (3 * scored + 3)
    assert [x["seed"] for key, x in rows if key == ("random", 0.5, "mixed")] == [0, 1, 2]
    assert [x["domain"] for key, x in rows if key[:2] == ("reap", 0.5)] == ["a", "b", None]
