"""Steering written into weights: the files do what the plan does live, or it is refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch

import moekit
import zoo
from moekit.apply.hold import CORRECTION, DELETED, ROUTER_BIAS, SCALED, SWAPPED, held
from moekit.cli import main
from moekit.errors import PlanError
from moekit.pipeline import produce
from moekit.plans import Drop, Hold, Plan, Scope, Steer


def opened(family, tmp_path):
    return moekit.open(zoo.save(family, tmp_path / family))


def plan_of(model, *ops):
    layers = [x.index for x in model.layout.routed]
    made = [Steer(**({"layer": layers[-1]} | op)) for op in ops]
    return Plan(layout_hash=model.layout.hash, ops=made, method="steermoe")


def baked(model, plan, out):
    """(the largest logit difference to the plan applied live, what is held)"""
    found = held(plan, model.understanding)
    result = produce(model, found.plan, out, instead=plan)
    assert result.verification.ok
    assert result.verification.experts
    return result.verification.max_difference, found


BIAS = {"expert": 1, "action": "bias", "strength": 1.5}
BAN = {"expert": 2, "action": "ban"}
SCALE = {"expert": 3, "action": "scale", "strength": 0.25}
EMPTY = {"expert": 4, "action": "scale", "strength": 0.0}
SWAP = {"expert": 0, "action": "swap", "partner": 1}


@pytest.mark.parametrize(
    ("family", "ops", "engines"),
    [
        ("gpt_oss", [BIAS, BAN, SCALE, SWAP], (ROUTER_BIAS, SCALED, SWAPPED)),
        ("deepseek_v3", [BAN, SCALE, EMPTY], (CORRECTION, SCALED)),
        ("glm4_moe", [BAN, SWAP], (CORRECTION, SWAPPED)),
        ("qwen3_moe", [SCALE, EMPTY, SWAP], (SCALED, SWAPPED)),
        ("mixtral", [SCALE], (SCALED,)),
    ],
)
def test_files_do_what_the_plan_does_live(tmp_path, family, ops, engines):
    model = opened(family, tmp_path)
    difference, found = baked(model, plan_of(model, *ops), tmp_path / "out")
    assert difference < 1e-3
    assert found.engines == engines
    assert all(isinstance(op, Hold) for op in found.plan.ops)
    out = moekit.open(tmp_path / "out")
    assert out.layout.layers[0].num_experts == model.layout.layers[0].num_experts
    ids = torch.randint(out.layout.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain, new = (x.load(torch.float32)(input_ids=ids, use_cache=False).logits for x in (model, out))
    assert (plain - new).abs().max() > 1e-4, "the plan did nothing"


def test_bans_of_every_layer_are_deleted(tmp_path):
    model = moekit.open("refmoe")
    ops = [{"layer": x.index, "expert": x.index, "action": "ban"} for x in model.layout.routed]
    difference, found = baked(model, plan_of(model, *ops), tmp_path / "out")
    assert difference < 1e-3
    assert found.engines == (DELETED,)
    assert all(isinstance(op, Drop) for op in found.plan.ops)
    assert moekit.open(tmp_path / "out").layout.layers[0].num_experts == 31


@pytest.mark.parametrize(
    ("family", "op", "reason"),
    [
        ("qwen3_moe", BIAS, "no bias"),
        ("deepseek_v3", BIAS, "changes the choice and not the weight"),
        ("qwen3_moe", BAN, "different numbers of experts"),
        ("gpt_oss", {"expert": 1, "action": "force"}, "no bias makes every token choose it"),
        ("gpt_oss", EMPTY | {"renormalise": True}, "the weight of an empty slot"),
        ("gpt_oss", BIAS | {"scope": Scope(part="prompt")}, "the prompt part of a text"),
        ("deepseek_v3", {"expert": 0, "action": "swap", "partner": 7}, "different groups"),
        ("llama4_text", SCALE, "not their output"),
    ],
)
def test_what_no_file_holds_is_refused(tmp_path, family, op, reason):
    model = opened(family, tmp_path)
    with pytest.raises(PlanError, match=f"no file of this model holds {op['action']}") as error:
        held(plan_of(model, op), model.understanding)
    assert reason in str(error.value)


def test_a_hold_that_does_not_fit_is_refused(tmp_path):
    model = opened("qwen3_moe", tmp_path)
    layer = model.layout.routed[0].index
    for ops, message in [
        ([Hold(layer=99)], "no MoE layer"),
        ([Hold(layer=layer, factors={99: 1.0})], "no such expert"),
        ([Hold(layer=layer), Hold(layer=layer)], "once"),
        ([Hold(layer=layer, biases={1: 1.0})], "cannot hold that"),
    ]:
        with pytest.raises(PlanError, match=message):
            Plan(layout_hash=model.layout.hash, ops=ops).check(model.layout)


def test_the_verb_writes_and_says_who_honours_it(tmp_path, capsys):
    model = opened("gpt_oss", tmp_path)
    plan_of(model, BIAS, SCALE).save(tmp_path / "plan.json")
    command = ["steer", "bake", str(tmp_path / "plan.json"), str(tmp_path / "gpt_oss"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 ops are in its weights" in shown
    assert ROUTER_BIAS in shown
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["ops"][0]["op"] == "hold"
    assert main(command) == 2, "the folder is taken"
