"""Divergence of usage is what the formula says, its noise what samples give; reports warn of unlike text."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import moekit
from moekit import refmoe
from moekit.cli.compress import after
from moekit.evaluation import evaluate
from moekit.evaluation.coverage import coverage
from moekit.families.model import Model
from moekit.measurement import measure
from moekit.pipeline import prepare, run
from moekit.pipeline.account import dropped_of_source
from moekit.pipeline.usage import Usage
from moekit.plans import Drop, Group, Merge, Plan, Replace
from moekit.recipe import Recipe
from moekit.stats import LayerStats, Stats
from test_methods import make_layout
from tiny import batch, dataset

LAYOUT = make_layout(layers=2, experts=8, top_k=2)


def stats_of(domains: tuple[str, ...], counts_NSE: list[np.ndarray], mass: np.ndarray | None = None) -> Stats:
    """Statistics of sequences [S, E] of counts for each domain, alike in all layers; every sequence has 10 tokens."""
    shares = [x / 10 for x in counts_NSE]
    arrays = {
        "count": np.stack([x.sum(0) for x in counts_NSE]).astype(float),
        "gate_mass": np.ones((len(domains), 8)) if mass is None else mass,
        "sequence_share": np.stack([x.sum(0) for x in shares]),
        "sequence_share_sq": np.stack([(x**2).sum(0) for x in shares]),
    }
    sequences = np.array([len(x) for x in counts_NSE])
    layers = {layer.index: LayerStats(dict(arrays)) for layer in LAYOUT.routed}
    return Stats(LAYOUT.hash, domains, 10 * sequences, sequences, layers)


def drawn(share_E, sequences: int, seed: int) -> np.ndarray:
    """Counts [S, E] of sequences with 20 slots each, whose shares vary about `share_E`."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(20, rng.dirichlet(30 * np.asarray(share_E))) for _ in range(sequences)])


ONE = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
OTHER = ONE[::-1]


def entropy(p) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def test_divergence_is_the_formula():
    a, b = drawn(ONE, 30, 0), drawn(OTHER, 20, 1)
    found = coverage(stats_of(("x",), [a]), LAYOUT, {}, ["x"], stats_of(("y",), [b])).drifts[0]
    p, q = a.sum(0) / a.sum(), b.sum(0) / b.sum()
    expected = entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2
    assert found.divergence == {0: pytest.approx(expected), 1: pytest.approx(expected)}
    assert found.mean == pytest.approx(expected)
    assert found.drifted
    apart = [np.array([[20, 0, 0, 0, 0, 0, 0, 0]] * 3), np.array([[0, 0, 0, 0, 0, 0, 0, 20]] * 3)]
    found = coverage(stats_of(("x",), apart[:1]), LAYOUT, {}, ["x"], stats_of(("y",), apart[1:])).drifts[0]
    assert found.mean == pytest.approx(1.0)


def test_noise_is_what_samples_of_one_text_give():
    drifts = [
        coverage(
            stats_of(("x",), [drawn(ONE, 60, seed)]), LAYOUT, {}, ["x"], stats_of(("y",), [drawn(ONE, 15, 999 + seed)])
        ).drifts[0]
        for seed in range(200)
    ]
    assert np.mean([x.noise[0] for x in drifts]) == pytest.approx(np.mean([x.mean for x in drifts]), rel=0.1)
    assert not any(x.drifted for x in drifts)


def test_one_sequence_tells_nothing():
    found = coverage(stats_of(("x",), [drawn(ONE, 9, 0)]), LAYOUT, {}, ["x"], stats_of(("y",), [drawn(OTHER, 1, 1)]))
    assert math.isnan(found.drifts[0].excess)
    assert not list(found.warnings())
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["drifts"][0]["excess"] is None


def test_the_nearest_calibration_domain_counts():
    calibration = stats_of(("x", "y"), [drawn(ONE, 50, 0), drawn(OTHER, 50, 1)])
    usage = stats_of(("a", "b"), [drawn(OTHER, 50, 2), drawn(ONE, 50, 3)])
    both = coverage(calibration, LAYOUT, {}, ["x", "y"], usage)
    assert [x.nearest for x in both.drifts] == ["y", "x"]
    assert not list(both.warnings())
    (warning,) = coverage(calibration, LAYOUT, {}, ["x"], usage).warnings()
    assert "'a' does not use experts as the calibration text does" in warning
    assert "from 'x'" in warning


def test_kept_mass_and_cold_experts():
    mass = np.array([[1.0, 2, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    stats = stats_of(("x", "y"), [drawn(ONE, 50, 0), drawn(OTHER, 50, 1)], mass)
    found = coverage(stats, LAYOUT, {1: [3, 4]}, ["x"], stats_of(("e",), [drawn(ONE, 50, 2)], mass[1:]))
    assert found.kept_mass == {0: 1.0, 1: pytest.approx(0.6)}
    assert found.drifts[0].kept_mass == {0: 1.0, 1: pytest.approx(0.75)}
    assert found.tokens == 500
    count = stats.get("count", 0, "x")
    assert found.cold[0] == tuple(np.flatnonzero(count < 100))
    assert 0 < len(found.cold[0]) < 8


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama4_text"])
def test_usage_seen_in_an_evaluation_is_that_of_a_measurement(opened, family):
    model = opened(family)
    data = dataset(batch(0, 12, 9, 1), batch(0, 7, 7, seed=1), batch(1, 10, 2))
    usage = Usage(model.layout, data)
    watched = evaluate(model, data, against=model, watcher=usage, dtype=torch.float32)
    assert watched == evaluate(model, data, against=model, dtype=torch.float32)
    found, expected = usage.stats(), measure(model, data, groups=(), dtype=torch.float32)
    assert (found.sequences == expected.sequences).all()
    for index, layer in expected.layers.items():
        for name, array in layer.arrays.items():
            np.testing.assert_allclose(found.layers[index].arrays[name], array, rtol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def measured() -> tuple[Model, Stats, Stats]:
    """refmoe on calibration text of three domains, and on held-out text of all."""
    model = Model.open("refmoe")

    def of(texts):
        return measure(model, moekit.load_data(model, texts, tokens=4_096, sequence_length=256), groups=())

    calibration = {name: path for name, path in refmoe.calibration().items() if name in ("python", "json", "math")}
    return model, of(calibration), of(refmoe.texts())


def test_refmoe_tells_domains_apart(measured):
    """Held-out text of a calibrated domain has not drifted; that of every other domain, other code too, has."""
    model, calibration, held_out = measured
    for domains in (["python"], ["json", "math"], ["python", "json", "math"]):
        found = coverage(calibration, model.layout, {}, domains, held_out)
        assert {x.domain: x.drifted for x in found.drifts} == {x: x not in domains for x in held_out.domains}


def test_refmoe_small_samples_do_not_alarm(measured):
    """Eight rows of a domain's own text, whichever, are not told to have drifted."""
    model, calibration, _ = measured
    data = moekit.load_data(model, {"python": refmoe.texts()["python"]}, tokens=8_192, sequence_length=128)
    rows = [
        dataclasses.replace(x, ids=x.ids[i : i + 1], mask=x.mask[i : i + 1])
        for x in data.batches
        for i in range(len(x.ids))
    ]
    for start in range(0, 64, 16):
        part = dataset(*rows[start : start + 8], domains=("python",))
        usage = measure(model, part, groups=())
        assert not coverage(calibration, model.layout, {}, ["python"], usage).drifts[0].drifted


def test_a_run_warns_of_text_that_was_not_measured(tmp_path):
    small = {"tokens": 4_096, "sequence_length": 256}
    texts = {name: str(refmoe.texts()[name]) for name in ("python", "kjv")}
    recipe = Recipe(
        model="refmoe",
        data={"python": str(refmoe.calibration()["python"])},
        keep=0.5,
        calibration=small,
        evaluation={"data": texts, **small},
        out=str(tmp_path / "out"),
    )
    job = prepare(recipe)
    result = run(job)
    report = json.loads((result.path / "report.json").read_text())
    found = report["coverage"]
    assert {x["domain"]: x["drifted"] for x in found["drifts"]} == {"python": False, "kjv": True}
    (warning,) = found["warnings"]
    assert "'kjv' does not use experts as the calibration text does" in warning
    assert warning in report["notes"]
    assert f"  {warning}" in after(job, result)
    for layer, removed in report["removed_gate_mass"].items():
        assert found["kept_mass"][layer] == pytest.approx(1 - removed)
    ours, others = (np.mean(list(x["kept_mass"].values())) for x in found["drifts"])
    assert ours > others + 0.1
    for name in ("report.md", "README.md"):
        page = (result.path / name).read_text()
        assert warning in page
        assert "| kjv | python |" in page


def test_methods_without_statistics_say_nothing_of_calibration(tmp_path, talker):
    recipe = Recipe(model=str(talker), data={"code": __file__}, method="random", keep=0.5, out=str(tmp_path / "out"))
    result = run(prepare(recipe))
    assert result.coverage is None
    assert json.loads((result.path / "report.json").read_text())["coverage"] is None


def test_what_is_dropped_of_the_source_over_several_plans():
    """Merging loses nobody; what a later plan drops takes along what was merged into it."""
    groups = (Group(members=(1, 0), weights=(0.5, 0.5)), Group(members=(5, 4), weights=(0.5, 0.5)))
    merge = Plan(layout_hash="a", ops=[Merge(layer=0, groups=groups), Drop(layer=0, experts=(7,))])
    drop = Plan(layout_hash="b", ops=[Drop(layer=0, experts=(0, 4)), Drop(layer=1, experts=(2,))])
    assert dropped_of_source(LAYOUT, [merge]) == {0: {7}}  # left: {0, 1}, 2, 3, {4, 5}, 6
    constant = Plan(layout_hash="", ops=[Replace(layer=0, experts=(1, 3))])
    assert dropped_of_source(LAYOUT, [constant]) == {0: {1, 3}}  # they keep their places, and nothing of what they did
    assert dropped_of_source(LAYOUT, [merge, drop]) == {0: {0, 1, 6, 7}, 1: {2}}
