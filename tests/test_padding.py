"""Layers filled up with experts that nobody chooses: the same numbers, loaded by stock transformers, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
import zoo
from moekit.apply.bake import bake
from moekit.data import Batch
from moekit.errors import PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.pipeline import prepare, run
from moekit.plans import Drop, Factor, Group, Merge, Plan
from moekit.plans.padding import check_paddable, slots
from moekit.recipe import Recipe
from tiny import save_talker

# correction bias, groups; the same, fused; a bias of logits, experts with biases; softmax and a bias [1, E]; a table;
# shared experts in the router; a bias on logits before top-k
BIASED = ["deepseek_v3", "hy_v4", "gpt_oss", "ernie4_5_moe", "deepseek_v4", "inkling_text", "kolibri1"]


def uneven(layout, **settings):
    """Fewer experts from layer to layer, the same number in every router group."""
    cuts = [(1, 5), (0, 2, 5, 7)] if layout.routed[0].router.groups > 1 else [(1, 5), (0, 2, 3), (6,)]
    ops = [Drop(layer=x.index, experts=gone) for x, gone in zip(layout.routed, 9 * cuts, strict=False)]
    return Plan(layout_hash=layout.hash, ops=ops, **settings)


def logits(model, plan=None):
    ids = zoo.inputs(model.layout.family)["input_ids"]
    subject = Subject(model, plan) if plan else Subject(model)
    return next(logits_of(subject, [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


@pytest.mark.parametrize("family", BIASED)
def test_files_do_what_the_live_plan_does_and_stock_transformers_loads_them(opened, tmp_path, family):
    model = opened(family)
    plan = uneven(model.layout, padding="exact")
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = moekit.open(baked.path)
    most = max(len(plan.kept(x)) for x in model.layout.routed)
    assert {x.num_experts for x in made.layout.routed} == {most}
    assert any("experts of zeros" in note for note in baked.notes)
    applied = logits(model, plan)
    assert torch.allclose(logits(made), applied, atol=1e-4)
    assert (applied - logits(model)).abs().max() > 1e-2
    ids = zoo.inputs(model.layout.family)["input_ids"]
    stock = AutoModelForCausalLM.from_pretrained(baked.path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids, use_cache=False).logits, applied, atol=1e-4)
    said = model.layout.total.bytes - plan.saved_bytes(model.layout)
    assert made.layout.total.bytes == pytest.approx(said, rel=0.02)


def test_merged_layers_are_filled_up_too(opened, tmp_path):
    model = opened("deepseek_v3")
    first, second = model.layout.routed[:2]
    pairs = tuple(Group(members=x, weights=(0.5, 0.5)) for x in ((1, 0), (5, 4)))
    ops = [Merge(layer=first.index, groups=pairs), Drop(layer=second.index, experts=(0, 2, 5, 7))]
    plan = Plan(layout_hash=model.layout.hash, ops=ops, padding="exact")
    made = moekit.open(bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path)
    assert torch.allclose(logits(made), logits(model, plan), atol=1e-4)


def test_every_group_is_filled_up_at_its_end(opened):
    layer = opened("deepseek_v3").layout.routed[0]
    assert layer.router.groups == 2
    assert slots(layer, (1, 3, 4, 7), 6) == (1, 3, None, 4, 7, None)
    plain = opened("gpt_oss").layout.routed[0]
    assert slots(plain, (1, 3, 4, 7), 6) == (1, 3, 4, 7, None, None)
    assert slots(plain, (1, 3), 2) == (1, 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4_text", "zaya"])
def test_routers_that_would_notice_are_refused(opened, tmp_path, family):
    model = opened(family)
    with pytest.raises(PlanError, match="never chosen"):
        check_paddable(model.layout)
    with pytest.raises(PlanError, match="never chosen"):
        bake(model.checkpoint, model.understanding, uneven(model.layout, padding="exact"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_padding_it_is_refused_and_an_even_plan_needs_none(opened, tmp_path):
    model = opened("gpt_oss")
    with pytest.raises(PlanError, match="different numbers") as refused:
        uneven(model.layout).check_bakeable(model.layout)
    assert "padding: exact" in refused.value.fix
    even = [Drop(layer=x.index, experts=(2,)) for x in model.layout.routed]
    plans = [Plan(layout_hash=model.layout.hash, ops=even, padding=x) for x in ("none", "exact")]
    a, b = (bake(model.checkpoint, model.understanding, x, tmp_path / x.padding) for x in plans)
    assert a.bytes_after == b.bytes_after
    assert not b.notes
    factors = [*uneven(model.layout).ops, Factor(layer=model.layout.routed[0].index, rank=2, density=0.0)]
    with pytest.raises(PlanError, match="filled up"):
        Plan(layout_hash=model.layout.hash, ops=factors, padding="exact").check_bakeable(model.layout)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    return {x: save_talker(folder / x, x) for x in ("gpt_oss", "qwen3_moe")}


def recipe(model, out, **settings):
    raw = {"model": str(model), "data": {"kjv": str(moekit.refmoe.texts()["kjv"])}, "out": str(out)}
    more = {"method": "reap", "keep": 0.5, "spread": "global", "tokens": 1024, "sequence_length": 64}
    return Recipe.from_flags(**raw | more | settings)


def test_a_recipe_writes_and_proves_a_global_budget(talkers, tmp_path):
    job = prepare(recipe(talkers["gpt_oss"], tmp_path / "out", padding="exact", protect="none"))
    result = run(job)
    assert result.verification.ok
    kept = {len(result.plan.kept(x)) for x in job.model.layout.routed}
    assert len(kept) > 1
    assert sum(len(result.plan.kept(x)) for x in job.model.layout.routed) == 4 * len(job.model.layout.routed)
    assert {x.num_experts for x in moekit.open(result.path).layout.routed} == {max(kept)}
    assert Plan.load(result.path / "plan.json").padding == "exact"


@pytest.mark.parametrize("padding", ["none", "exact"])
def test_what_cannot_be_written_is_refused_before_it_is_measured(talkers, tmp_path, monkeypatch, padding):
    from moekit.pipeline import statistics

    monkeypatch.setattr(statistics, "measure", None)  # would be a TypeError
    job = prepare(recipe(talkers["qwen3_moe"], tmp_path / "out", padding=padding))
    with pytest.raises(PlanError, match="never chosen" if padding == "exact" else "different numbers"):
        run(job)
    assert not list(tmp_path.iterdir())


def test_it_can_be_planned_and_a_budget_that_leaves_no_choice_is_written(talkers, tmp_path):
    job = prepare(recipe(talkers["qwen3_moe"], tmp_path / "out"))
    assert run(job, plan_only=True).plan.ops
    fewest = run(prepare(recipe(talkers["qwen3_moe"], tmp_path / "two", keep=2)))
    assert fewest.verification.ok


def test_an_unknown_padding_is_refused(talkers, tmp_path):
    with pytest.raises(RecipeError, match="padding"):
        recipe(talkers["gpt_oss"], tmp_path / "out", padding="some")
