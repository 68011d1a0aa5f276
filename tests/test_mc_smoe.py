"""mc-smoe: factors from the weights alone, and healed towards the source; schedule, resuming, refusals."""

from __future__ import annotations

import pytest
import torch

import moekit
from moekit import methods
from moekit.apply.bake import bake
from moekit.errors import DataError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.matrices import expert_matrices
from moekit.fitting import Fit, decide
from moekit.fitting import factors as fitting
from moekit.methods.factor import _healing as healing
from moekit.pipeline import prepare, run
from moekit.plans import Group, Merge, Plan, PlanTensors
from moekit.recipe import Recipe
from tiny import batch, dataset

DATA = dataset(*(batch(0, 24, 24, 20, 17, seed=x) for x in range(5)), batch(1, 12, 9))
SETTINGS = {"rank": 4, "density": 0.1, "steps": 12, "sequences": 6, "rate": 3e-3}


def fit_of(model, folder, source=None, data=DATA, dtype=torch.float32):
    return Fit(model, source or model, None, data, folder, dtype)


def logits(model, plan=None):
    subject = Subject(model, plan) if plan else Subject(model)
    return torch.cat([x.flatten(0, 1) for x in logits_of(subject, DATA.batches, torch.float32)])


def kl(model, plan=None, source=None):
    p, q = (x.log_softmax(-1) for x in (logits(source or model), logits(model, plan)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_density_falls_as_a_cube_from_all_to_what_stays():
    found = [healing.density_at(step, 100, 0.1) for step in range(100)]
    assert found[:4] == [1.0] * 4
    assert found[-26:] == [0.1] * 26
    assert found == sorted(found, reverse=True)
    middle = healing.WHOLE * 100 + (1 - healing.FINAL - healing.WHOLE) * 100 / 2  # half of the way
    assert healing.density_at(round(middle) - 1, 100, 0.1) == pytest.approx(0.1 + 0.9 / 8, rel=0.02)
    assert healing.density_at(0, 1, 0.3) == 0.3


def test_importance_is_a_moving_average_of_weight_times_gradient():
    rest, gradient = torch.tensor([2.0, -3.0]), torch.tensor([-0.5, 0.1])
    first = healing.importance(torch.zeros(2), rest, gradient)
    assert torch.allclose(first, 0.15 * torch.tensor([1.0, 0.3]))
    assert torch.allclose(healing.importance(first, rest, 0 * gradient), 0.85 * first)
    assert torch.equal(healing.ranked_by(0, 20, rest, first), rest.abs())
    assert torch.equal(healing.ranked_by(10, 20, rest, first), first)


def test_without_steps_it_needs_no_text(opened, tmp_path):
    model = opened("qwen3_moe")
    assert methods.get("mc-smoe").groups == ()
    plan = decide("mc-smoe", fit_of(model, tmp_path), options={"rank": 4})
    assert plan == methods.make_plan("mc-smoe", None, model.layout, rank=4)
    assert {(op.rank, op.density, op.scheme, op.format) for op in plan.ops} == {(4, 0.1, "svd", "moekit")}
    assert not list(tmp_path.iterdir())
    with pytest.raises(PlanError, match="runs over text"):
        methods.make_plan("mc-smoe", None, model.layout, rank=4, steps=3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_healing_brings_the_source_back_and_is_written(opened, tmp_path, family):
    model = opened(family)
    bare = methods.make_plan("mc-smoe", None, model.layout, **{**SETTINGS, "steps": 0})
    plan = decide("mc-smoe", fit_of(model, tmp_path / "fit"), options=SETTINGS)
    before, after = plan.measured["held_out_kl"]
    assert after < before
    assert {op.scheme for op in plan.ops} == {"healed"}
    assert kl(model, plan) < 0.9 * kl(model, bare)
    made = moekit.open(bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path)
    assert torch.allclose(logits(made), logits(model, plan), atol=1e-5)
    bare_out = bake(model.checkpoint, model.understanding, bare, tmp_path / "bare")
    assert made.layout.total.bytes == moekit.open(bare_out.path).layout.total.bytes
    left = sorted(x.name for x in (tmp_path / "fit").iterdir())
    assert "state.pt" not in left
    assert "teacher" not in left


def test_a_merged_model_is_healed_towards_what_it_was_before(opened, tmp_path):
    source = opened("qwen3_moe")
    groups = (Group(members=(1, 0), weights=(0.5, 0.5)), Group(members=(5, 4), weights=(0.5, 0.5)))
    ops = [Merge(layer=x.index, groups=groups) for x in source.layout.routed]
    merge = Plan(layout_hash=source.layout.hash, ops=ops)
    model = moekit.open(bake(source.checkpoint, source.understanding, merge, tmp_path / "merged").path)
    plan = decide("mc-smoe", fit_of(model, tmp_path / "fit", source), options=SETTINGS)
    bare = methods.make_plan("mc-smoe", None, model.layout, **{**SETTINGS, "steps": 0})
    assert kl(model, plan, source) < 0.9 * kl(model, bare, source)


class KilledError(Exception):
    """The run is over."""


def test_an_interrupted_run_ends_as_one_that_was_not(opened, tmp_path):
    model = opened("qwen3_moe")
    whole = decide("mc-smoe", fit_of(model, tmp_path / "whole"), options=SETTINGS)

    def until_seven(stage, done, total):
        if stage == "heal" and done == 7:
            raise KilledError

    killed = fit_of(model, tmp_path / "killed")
    killed.progress = until_seven
    with pytest.raises(KilledError):
        decide("mc-smoe", killed, options=SETTINGS)
    steps = []
    again = fit_of(model, tmp_path / "killed")
    again.progress = lambda stage, done, total: steps.append(done) if stage == "heal" else None
    resumed = decide("mc-smoe", again, options=SETTINGS)
    assert steps[0] > 1
    assert resumed.measured == whole.measured
    for layer in model.layout.routed:
        a, b = PlanTensors(whole.tensors), PlanTensors(resumed.tensors)
        assert a.names(layer.index) == b.names(layer.index)
        for name in a.names(layer.index):
            assert torch.equal(a.read(layer.index, name), b.read(layer.index, name)), name
    steps.clear()
    assert decide("mc-smoe", again, options=SETTINGS) == resumed  # and what is finished is not done again
    assert not steps


def test_healing_that_helps_nothing_is_left_out(opened, tmp_path, monkeypatch):
    model = opened("qwen3_moe")
    found = iter([0.5, 0.7])
    monkeypatch.setattr(fitting._Healing, "_held_out", lambda self: next(found))
    plan = decide("mc-smoe", fit_of(model, tmp_path), options=SETTINGS)
    assert {op.scheme for op in plan.ops} == {"svd"}
    assert not plan.tensors
    assert any("no better" in note for note in plan.notes)


def test_what_cannot_be_healed_is_refused_first(opened, tmp_path, monkeypatch):
    model = opened("qwen3_moe")
    with pytest.raises(DataError, match="too little text"):
        decide("mc-smoe", fit_of(model, tmp_path / "a", data=dataset(batch(0, 9))), options=SETTINGS)
    with pytest.raises(RecipeError, match="format"):
        decide("mc-smoe", fit_of(model, tmp_path / "b"), options={"format": "zip"})
    with pytest.raises(PlanError, match="no smaller"):
        decide("mc-smoe", fit_of(model, tmp_path / "c"), options={"rank": 40, "steps": 3})
    monkeypatch.setattr(type(model), "fits", lambda self, dtype=None, device="cpu": False)
    with pytest.raises(PlanError, match="too large"):
        decide("mc-smoe", fit_of(model, tmp_path / "d"), options=SETTINGS)
    assert not list(tmp_path.glob("*/*.pt"))


def recipe(talker, text, out, *steps):
    raw = {"model": str(talker), "data": {"kjv": str(text)}, "out": str(out), "steps": [*steps]}
    return Recipe.from_flags(**raw, tokens=1024, sequence_length=64)


@pytest.fixture
def text():
    return moekit.refmoe.texts()["kjv"]


def test_a_recipe_merges_and_factors(talker, text, tmp_path):
    steps = ("m-smoe keep=0.5", "mc-smoe rank=3 density=0.05")
    job = prepare(recipe(talker, text, tmp_path / "out", *steps))
    result = run(job)
    assert result.verification.ok
    made = moekit.open(result.path)
    assert {x.num_experts for x in made.layout.routed} == {4}
    assert made.layout.quantisation == "moekit"
    assert result.baked.bytes_after == pytest.approx(job.expected()[-1].total.bytes, rel=0.03)
    first = expert_matrices(job.model.checkpoint, job.model.understanding, job.model.layout.routed[0])[0]
    assert first.name.removesuffix(".weight") + ".weight_left" in made.checkpoint.tensors


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (("mc-smoe rank=3", "rtn-int4"), "factored already"),
        (("mc-smoe rank=3", "m-smoe keep=0.5"), "factored already"),
        (("mc-smoe rank=3 keep=0.5",), "factors experts and drops none"),
        (("mc-smoe rank=60",), "no smaller"),
    ],
)
def test_impossible_recipes_are_refused_before_work(talker, text, tmp_path, steps, match):
    with pytest.raises((RecipeError, PlanError), match=match):
        prepare(recipe(talker, text, tmp_path / "out", *steps))
    assert not (tmp_path / "out").exists()


def test_multiplied_out_it_may_be_quantised(talker, text, tmp_path):
    prepare(recipe(talker, text, tmp_path / "out", "mc-smoe rank=3 format=dense", "rtn-int8"))
