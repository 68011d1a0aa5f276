"""Merging: alignment keeps every expert's function, plans are checked, files do what the live plan does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.apply.live import live
from moekit.apply.merge import ExpertUnits, merge_experts
from moekit.data import Batch
from moekit.errors import PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.family import Family
from moekit.methods.merge import layer_merge
from moekit.plans import Group, Merge, Plan
from moekit.stats import LayerStats, Stats
from moekit.view import MoEView

FORMS = ["qwen3_moe", "gpt_oss", "aria_text", "nemotron_h", "deepseek_v3", "granitemoe", "inkling2_text"]


def experts_of(model_type):
    model = zoo.build(model_type)
    return next(x for x in model.modules() if hasattr(x, "_apply_gate"))


@torch.no_grad()
def run_expert(experts, hidden, expert):
    ids = torch.full((len(hidden), 1), expert)
    return experts(hidden, ids, torch.ones(len(hidden), 1))


@pytest.mark.parametrize("model_type", FORMS)
def test_permuting_units_keeps_the_function(model_type):
    experts = experts_of(model_type)
    tensors = {name: x.data for name, x in experts.named_parameters(recurse=False)}
    units = ExpertUnits(Family().expert_form(experts), tensors)
    order = torch.randperm(len(units.units(1)), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, experts.down_proj.shape[2 if experts.is_transposed else 1])
    before = run_expert(experts, hidden, 1)
    for name, x in units.tensors.items():
        x[1] = units.permuted(name, 1, order)
    assert torch.allclose(run_expert(experts, hidden, 1), before, atol=1e-5)
    assert not torch.equal(units.alignment(1, 1), order)


@pytest.mark.parametrize("model_type", FORMS)
def test_a_shuffled_copy_is_found_and_merging_with_it_changes_nothing(model_type):
    experts = experts_of(model_type)
    form = Family().expert_form(experts)
    tensors = {name: x.data for name, x in experts.named_parameters(recurse=False)}
    units = ExpertUnits(form, tensors)
    order = torch.randperm(len(units.units(0)), generator=torch.Generator().manual_seed(1))
    for name, x in units.tensors.items():
        x[2] = units.permuted(name, 0, order)
    assert torch.equal(order[units.alignment(0, 2)], torch.arange(len(order)))
    merged = merge_experts(form, tensors, Merge(layer=0, groups=(Group(members=(0, 2), weights=(0.4, 0.6)),)))
    for name, x in merged.items():
        assert torch.allclose(x[0], tensors[name][0], atol=1e-6)
        assert torch.equal(x[1:], tensors[name][1:])


def test_the_mean_is_weighted_and_unaligned_on_request():
    experts = experts_of("qwen3_moe")
    form = Family().expert_form(experts)
    tensors = {name: x.data for name, x in experts.named_parameters(recurse=False)}
    group = Group(members=(3, 1), weights=(0.25, 0.75))
    merged = merge_experts(form, tensors, Merge(layer=0, groups=(group,), align=False))
    for name, x in merged.items():
        assert torch.allclose(x[3], 0.25 * tensors[name][3] + 0.75 * tensors[name][1])


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def merged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = moekit.open(zoo.save(request.param, folder / "model"))
    groups = (
        (Group(members=(1, 0), weights=(0.7, 0.3)), Group(members=(5, 4), weights=(0.5, 0.5)))
        if model.layout.routed[0].router.groups > 1
        else (Group(members=(1, 0, 6), weights=(0.5, 0.3, 0.2)),)
    )
    ops = [Merge(layer=x.index, groups=groups, router="weighted") for x in model.layout.routed]
    return model, Plan(layout_hash=model.layout.hash, ops=ops), folder


def test_files_do_what_the_live_plan_does(merged):
    model, plan, folder = merged
    out = bake(model.checkpoint, model.understanding, plan, folder / "out")
    assert out.bytes_after < out.bytes_before
    stock = moekit.open(out.path).load(torch.float32)
    ids = zoo.inputs(model.layout.family)["input_ids"]
    batch = Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))
    (applied,) = logits_of(Subject(model, plan), [batch], torch.float32)
    (before,) = logits_of(Subject(model), [batch], torch.float32)
    with torch.no_grad():
        written = stock(input_ids=ids, use_cache=False).logits
    assert torch.allclose(written, applied, atol=1e-4)
    assert (written - before).abs().max() > 1e-2


def test_merged_files_really_shrink_and_stock_transformers_runs_them(merged):
    model, plan, folder = merged
    out = bake(model.checkpoint, model.understanding, plan, folder / "stock")
    gone = plan.dropped()
    expected = 0
    for layer in model.layout.routed:
        share = len(gone[layer.index]) / layer.num_experts
        expected += len(gone[layer.index]) * layer.expert_bytes
        for tensor in layer.tensors:
            info = model.checkpoint.info(tensor.name)
            if tensor.role == "router" and info.shape[tensor.axis or 0] == layer.num_experts:
                expected += round(share * info.bytes)
    assert out.bytes_before - out.bytes_after == expected
    assert sum(x.stat().st_size for x in out.path.glob("*.safetensors")) < out.bytes_before
    stock = AutoModelForCausalLM.from_pretrained(out.path, dtype=torch.float32).eval()
    left = {x.num_experts for x in moekit.open(out.path).layout.routed}
    assert left == {len(plan.kept(x)) for x in model.layout.routed}
    ids = zoo.inputs(model.layout.family)["input_ids"]
    batch = Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))
    (applied,) = logits_of(Subject(model, plan), [batch], torch.float32)
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids, use_cache=False).logits, applied, atol=1e-4)
    written = stock.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False)
    assert written.shape == (len(ids), 7)


@torch.no_grad()
def test_alignment_keeps_every_expert_of_a_trained_model_what_it_was():
    """Each of refmoe's experts brought into the order of another computes the same, and is no less like it."""
    stock = moekit.open("refmoe").load(torch.float32)
    drawn = torch.Generator().manual_seed(0)
    for path, experts in stock.named_modules():
        if not hasattr(experts, "_apply_gate"):
            continue
        tensors = {name: x.data for name, x in experts.named_parameters(recurse=False)}
        units = ExpertUnits(Family().expert_form(experts), tensors)
        hidden = torch.randn(4, experts.down_proj.shape[1], generator=drawn)
        for expert in range(1, experts.num_experts, 3):
            before, ours = run_expert(experts, hidden, expert), units.units(expert)
            order = units.alignment(0, expert)
            assert sorted(order.tolist()) == list(range(len(order)))
            likeness = (units.units(0) * ours).sum()
            for name, x in units.tensors.items():
                x[expert] = units.permuted(name, expert, order)
            assert torch.allclose(run_expert(experts, hidden, expert), before, atol=1e-5), path
            assert torch.equal(units.units(expert), ours[order])
            assert (units.units(0) * units.units(expert)).sum() >= likeness


def test_a_model_in_memory_says_that_it_cannot(merged):
    model, plan, _ = merged
    view = MoEView(model.load(torch.float32), model.layout)
    with pytest.raises(PlanError, match="streamed"), live(view, plan):
        pass


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([((0, 1), (0.5, 0.5)), ((1, 2), (0.5, 0.5))], "disjoint"),
        ([((0,), (1.0,))], "at least two"),
        ([((0, 1), (0.5, 0.6))], "sum to 1"),
        ([((0, 99), (0.5, 0.5))], "no expert 99|not that many"),
    ],
)
def test_impossible_merges_are_refused(groups, message):
    model = moekit.open("refmoe")
    made = tuple(Group(members=members, weights=weights) for members, weights in groups)
    plan = Plan(layout_hash=model.layout.hash, ops=[Merge(layer=0, groups=made)])
    with pytest.raises(PlanError, match=message):
        plan.check(model.layout)


def test_merge_ops_survive_json(tmp_path, merged):
    _, plan, _ = merged
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


@pytest.fixture(scope="module")
def stats():
    layout = moekit.open("refmoe").layout
    rng = np.random.default_rng(0)
    layers = {}
    for layer in layout.routed:
        logits = rng.normal(size=(500, 32))
        logits[:, 16:] = logits[:, :16] + 0.1 * rng.normal(size=(500, 16))  # expert 16 + i is like expert i
        output = np.repeat(rng.normal(size=(16, 256)), 2, 0).reshape(16, 2, 256).transpose(1, 0, 2).reshape(32, 256)
        layers[layer.index] = LayerStats(
            {
                "count": np.r_[np.full(16, 20.0), np.full(16, 10.0)][None],
                "logit_gram": (logits.T @ logits)[None],
                "output": (output * np.r_[np.full(16, 20.0), np.full(16, 10.0)][:, None])[None].astype(np.float32),
                "peak": np.ones((1, 32)),
                "gate_mass": np.ones((1, 32)),
            }
        )
    manifest = {"layout": layout.to_dict()}
    return Stats(layout.hash, ("text",), np.array([120]), np.array([1]), layers, manifest)


@pytest.mark.parametrize("name", ["m-smoe", "hc-smoe"])
def test_alike_experts_find_each_other(stats, name):
    plan = moekit.plan(name, stats, keep=0.5, protect="none")
    for op in plan.ops:
        assert {group.members for group in op.groups} == {(e, 16 + e) for e in range(16)}
        assert all(group.weights == pytest.approx((2 / 3, 1 / 3)) for group in op.groups)


@pytest.mark.parametrize("name", ["m-smoe", "hc-smoe"])
@pytest.mark.parametrize("keep", [4, 11, 0.75, 31])
def test_the_budget_is_exact_and_every_expert_is_somewhere(stats, name, keep):
    plan = moekit.plan(name, stats, keep=keep)
    wanted = keep if isinstance(keep, int) else round(keep * 32)
    for layer in stats.layout.routed:
        assert len(plan.kept(layer)) == wanted
    plan.check_bakeable(stats.layout)


@pytest.mark.parametrize("name", ["m-smoe", "hc-smoe"])
def test_super_experts_in_all_places_leave_nobody_to_join(stats, name):
    layer, method, safe = stats.layout.routed[0], methods.get(name), frozenset(range(4))

    def merged(keep: int) -> list[Group]:
        return layer_merge(method, stats, layer, keep, None, safe, router="dominant", settings={}).groups

    with pytest.raises(PlanError, match="no other expert") as raised:
        merged(4)
    assert (raised.value.expected, raised.value.got) == ("at least 5", 4)
    assert {e for group in merged(5) for e in group.members} == set(range(4, 32))


def test_a_global_budget_has_the_same_total(stats):
    plan = moekit.plan("m-smoe", stats, keep=0.5, spread="global")
    assert sum(len(plan.kept(layer)) for layer in stats.layout.routed) == 6 * 16


def used(layout, counts_LE):
    """Statistics that say how often experts were chosen, and that none is like another."""
    experts = counts_LE.shape[1]
    layers = {
        layer.index: LayerStats(
            {
                "count": counts_E[None].astype(float),
                "logit_gram": np.eye(experts)[None],
                **{name: np.ones((1, experts)) for name in ("peak", "gate_mass")},
            }
        )
        for layer, counts_E in zip(layout.routed, counts_LE, strict=True)
    }
    return Stats(layout.hash, ("text",), np.array([10_000]), np.array([1]), layers, {"layout": layout.to_dict()})


def thresholded(counts_LE, total):
    """How many experts each layer keeps by the paper's rule: shares pooled, each layer's best 1, a threshold."""
    phi_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    phi_LE[np.arange(len(phi_LE)), phi_LE.argmax(1)] = 1.0
    threshold = np.sort(phi_LE.ravel())[::-1][total]
    return (phi_LE > threshold).sum(1).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [2, 8, 0.5, 30])
def test_a_global_budget_is_the_adaptive_threshold_of_the_paper(seed, keep):
    source = moekit.open("refmoe").layout
    layout = dataclasses.replace(source, layers=tuple(dataclasses.replace(x, top_k=1) for x in source.layers))
    counts_LE = np.random.default_rng(seed).pareto(0.7, (6, 32)) + 1e-3  # no two alike
    plan = moekit.plan("m-smoe", used(layout, counts_LE), keep=keep, spread="global", protect="none")
    total = 6 * (keep if isinstance(keep, int) else round(keep * 32))
    found = [len(plan.kept(layer)) for layer in layout.routed]
    assert found == thresholded(counts_LE, total)
    assert sum(found) == total
    for layer, counts_E in zip(layout.routed, counts_LE, strict=True):  # and they are the most used ones
        kept = list(plan.kept(layer))
        assert counts_E[kept].min() >= np.delete(counts_E, kept).max(initial=0)


def test_ties_of_a_global_budget_are_broken_by_rank():
    layout = moekit.open("refmoe").layout
    plan = moekit.plan("m-smoe", used(layout, np.ones((6, 32))), keep=11, spread="global", protect="none")
    assert [len(plan.kept(layer)) for layer in layout.routed] == [11] * 6
    counts_LE = np.ones((6, 32))
    counts_LE[2, :20] = 3.0  # one layer has more that are used alike
    found = [
        len(moekit.plan("m-smoe", used(layout, counts_LE), keep=11, spread="global", protect="none").kept(layer))
        for layer in layout.routed
    ]
    assert found[2] == 20
    assert sum(found) == 66
    assert max(found[:2] + found[3:]) - min(found[:2] + found[3:]) <= 1


def test_options_are_checked(stats):
    with pytest.raises(RecipeError, match="router"):
        moekit.plan("m-smoe", stats, keep=0.5, router="best")
    assert methods.get("m-smoe").kind == "merge"
    plan = moekit.plan("m-smoe", stats, keep=0.5, router="weighted")
    assert {op.router for op in plan.ops} == {"weighted"}
