"""REAM: groups against a brute-force version, the cap, its own weights; decided layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit import methods
from moekit.apply.live import live
from moekit.errors import PlanError, RecipeError
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.layout import Layout, MoELayer, Part, Router
from moekit.measurement import Gatherer, measure
from moekit.methods.merge import layer_merge
from moekit.plans import Merge, Plan
from moekit.stats import LayerStats, Stats
from moekit.stream import Stream
from moekit.view import MoEView
from tiny import batch, dataset

DATA = dataset(batch(0, 24, 24, 13), batch(1, 24, 20))


def make(experts: int = 12, router_groups: int = 1, seed: int = 0) -> tuple[Layout, Stats, dict[str, np.ndarray]]:
    """One layer with random outputs and logits for 300 tokens, and these themselves."""
    rng = np.random.default_rng(seed)
    router = Router("softmax", renormalised=True, groups=router_groups, groups_kept=1)
    layer = MoELayer(0, "", "", "", experts, (), experts, 2, router, 16, 0, (), 100)
    layout = Layout("toy", "toy", "Toy", 32, 1, 64, "float32", None, (layer,), {"experts": Part(1, 1)}, 1, ())
    logits = rng.normal(size=(300, experts)) @ rng.normal(size=(experts, experts))
    gates = np.exp(logits - logits.max(1, keepdims=True))
    gates /= gates.sum(1, keepdims=True)
    chosen = np.zeros_like(gates, bool)
    np.put_along_axis(chosen, np.argsort(-logits, 1)[:, :2], True, 1)
    chosen[:, -1] = False  # the last expert stays cold
    outputs = rng.normal(size=(300, experts, 5)) + rng.normal(size=(experts, 5)) * 2
    g = np.where(chosen, gates, 0.0)
    arrays = {
        "count": chosen.sum(0),
        "gate_mass": g.sum(0),
        "gated_norm": (g * np.linalg.norm(outputs, axis=2)).sum(0),
        "gated_output": np.einsum("te,ted->ed", g, outputs),
        "logit_gram": logits.T @ logits,
        "peak": np.ones(experts),
    }
    stats = Stats(
        layout.hash,
        ("text",),
        np.array([300]),
        np.array([1]),
        {0: LayerStats({name: np.asarray(x, float)[None] for name, x in arrays.items()})},
    )
    return layout, stats, {"logits": logits, "outputs": outputs, "g": g, "chosen": chosen}


def brute(raw: dict[str, np.ndarray], keep: int, cap: int, members: list[int]) -> tuple[dict[int, list[int]], list]:
    """Groups as the paper describes them, pair by pair."""
    g, outputs, logits = raw["g"], raw["outputs"], raw["logits"]
    everyone = range(g.shape[1])
    saliency = []
    for e in everyone:
        tokens = np.flatnonzero(raw["chosen"][:, e])
        saliency.append(float(np.mean([g[t, e] * np.linalg.norm(outputs[t, e]) for t in tokens])) if len(tokens) else 0)
    means = [np.mean([g[t, e] * outputs[t, e] for t in range(len(g))], axis=0) for e in everyone]
    columns = [logits[:, e] / np.linalg.norm(logits[:, e]) for e in everyone]
    distance = np.array([[np.linalg.norm(columns[a] - columns[b]) for b in everyone] for a in everyone])

    def similarity(a: int, b: int) -> float:
        lengths = np.linalg.norm(means[a]) * np.linalg.norm(means[b])
        cosine = float(means[a] @ means[b] / lengths) if lengths else 0.0
        return ((cosine + 1) / 2 + 1 - distance[a, b] / distance.max()) / 2

    ranked = sorted(members, key=lambda e: -saliency[e])
    left, found = ranked[keep:], {}
    for centroid in ranked[:keep]:
        nearest = sorted(left, key=lambda e: -similarity(centroid, e))[: cap - 1]
        left = [e for e in left if e not in nearest]
        found[centroid] = nearest
    assert not left
    return found, saliency


@pytest.mark.parametrize(("keep", "cap"), [(6, 16), (6, 3), (4, 4), (11, 16), (2, 16)])
def test_groups_are_those_of_the_paper(keep, cap):
    layout, stats, raw = make()
    plan = methods.make_plan("ream", stats, layout, keep=keep, protect="none", cap=cap)
    expected, saliency = brute(raw, keep, cap, list(range(12)))
    (op,) = plan.ops
    assert {x.members[0]: list(x.members[1:]) for x in op.groups} == {e: rest for e, rest in expected.items() if rest}
    least = min(x for x in saliency if x > 0)
    for group in op.groups:
        weights = [saliency[e] or min(0.5, least) for e in group.members]
        assert group.weights == pytest.approx([x / sum(weights) for x in weights])
    assert op.router == "dominant"


def test_experts_stay_within_their_router_group():
    layout, stats, raw = make(experts=12, router_groups=2)
    plan = methods.make_plan("ream", stats, layout, keep=6, protect="none")
    expected = brute(raw, 3, 16, list(range(6)))[0] | brute(raw, 3, 16, list(range(6, 12)))[0]
    (op,) = plan.ops
    assert {x.members[0]: list(x.members[1:]) for x in op.groups} == {e: rest for e, rest in expected.items() if rest}


def test_super_experts_stay_alone():
    layout, stats, _ = make()
    stats.layers[0].arrays["peak"][0, 11] = 100.0
    plan = methods.make_plan("ream", stats, layout, keep=6)
    assert any("0.11" in note for note in plan.notes)
    assert all(11 not in group.members for group in plan.ops[0].groups)
    assert len(plan.kept(layout.layers[0])) == 6


def test_a_cap_that_cannot_hold_all_is_refused():
    layout, stats, _ = make()
    with pytest.raises(PlanError, match="cannot hold all"):
        methods.make_plan("ream", stats, layout, keep=2, cap=5)
    with pytest.raises(RecipeError, match="wrong type"):
        methods.make_plan("ream", stats, layout, keep=2, cap=0.5)


def test_statistics_alone_cannot_go_layer_by_layer():
    layout, stats, _ = make()
    with pytest.raises(PlanError, match="layer by layer"):
        methods.make_plan("ream", stats, layout, keep=6, sequential=True)


def fit_of(model: Model, folder) -> Fit:
    stats = measure(model, DATA, groups=["scores", "outputs", "routing"], dtype=torch.float32)
    return Fit(model, model, stats, DATA, folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_each_layer_is_decided_behind_the_merged_ones(opened, family, tmp_path):
    model = opened(family)
    fit = fit_of(model, tmp_path / "fit")
    once = decide("ream", fit, keep=0.5)
    plan = decide("ream", fit, keep=0.5, options={"sequential": True})
    first, second, *_ = [layer.index for layer in model.layout.routed]
    assert plan.merges()[first] == once.merges()[first]
    assert plan.merges()[second] != once.merges()[second]
    assert plan.settings == once.settings | {"sequential": True}
    assert any("merged layers before it" in note for note in plan.notes)
    before = Plan(layout_hash=model.layout.hash, ops=[plan.merges()[first]])
    layer = model.layout.by_index[second]
    gatherer = Gatherer([layer], 2, ["scores", "outputs", "routing"])
    loader = model.loader(torch.float32)
    view = MoEView(loader.model, model.layout)
    with live(view, before, loader), view.watch(gatherer, layers=[second]):

        def around(_index, number):
            gatherer.batch = (number, DATA.batches[number])
            return torch.inference_mode()

        for _ in Stream(loader).run([x.ids for x in DATA.batches], around=around, last_layer=second):
            pass
    tokens = np.array([DATA.tokens[name] for name in DATA.domains])
    stats = Stats(model.layout.hash, DATA.domains, tokens, tokens, {second: gatherer.take(second, int(tokens.sum()))})
    protected = frozenset(x.expert for x in methods.super_experts(fit.stats, model.layout) if x.layer == second)
    settings = {"cap": 16, "sequential": True}
    expected = layer_merge(methods.get("ream"), stats, layer, 4, None, protected, router="dominant", settings=settings)
    ours = plan.merges()[second]
    assert [x.members for x in ours.groups] == [x.members for x in expected.groups]
    for a, b in zip(ours.groups, expected.groups, strict=True):
        assert a.weights == pytest.approx(b.weights, rel=1e-4)


def test_an_interrupted_pass_takes_no_statistics_twice(opened, tmp_path):
    model = opened("mixtral")
    fit = fit_of(model, tmp_path / "whole")
    whole = decide("ream", fit, keep=0.5, options={"sequential": True})

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 2 * len(DATA.batches):
            raise KeyboardInterrupt

    cut = Fit(model, model, fit.stats, DATA, tmp_path / "cut", dtype=torch.float32, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        decide("ream", cut, keep=0.5, options={"sequential": True})
    kept = sorted((tmp_path / "cut" / "merges").iterdir())
    assert kept
    stamps = [x.stat().st_mtime_ns for x in kept]
    again = Fit(model, model, fit.stats, DATA, tmp_path / "cut", dtype=torch.float32)
    assert decide("ream", again, keep=0.5, options={"sequential": True}).ops == whole.ops
    assert [x.stat().st_mtime_ns for x in kept] == stamps
    assert all(isinstance(op, Merge) for op in whole.ops)
