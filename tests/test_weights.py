"""Every weight that is written is checked, those of experts that no token of the proof chooses too."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.apply.bake import bake
from moekit.evaluation.verify import verify
from moekit.evaluation.weights import compare_weights
from moekit.families.model import Model
from moekit.plans import Group, Merge, Plan, Quantize, drop_lowest, keep_count
from tiny import batch, dataset

SHORT = dataset(batch(0, 2), batch(1, 2))


def half(model: Model) -> Plan:
    rng, layout = np.random.default_rng(0), model.layout
    ops = [drop_lowest(x, rng.random(x.num_experts).tolist(), keep_count(x, 0.5)) for x in layout.routed]
    return Plan(layout_hash=layout.hash, ops=[x for x in ops if x])


def made(model: Model, plan: Plan, folder) -> Model:
    return Model.open(bake(model.checkpoint, model.understanding, plan, folder).path)


def tampered(model: Model, folder, name: str, change) -> Model:
    shutil.copytree(model.path, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    return Model.open(folder)


@pytest.mark.parametrize(
    "family",
    ["mixtral", "gpt_oss", "llama4_text", "deepseek_v4", "phimoe", "granitemoe", "muse_spark", "zaya", "gemma4_text"],
)
def test_what_is_baked_has_the_weights_of_the_source(family, opened, tmp_path):
    model = opened(family)
    for name, plan in {"all": Plan(layout_hash=model.layout.hash), "half": half(model)}.items():
        found = compare_weights(model, plan, made(model, plan, tmp_path / name))
        assert not found.wrong
        assert found.experts == sum(len(plan.kept(x)) for x in model.layout.routed)


def test_other_experts_than_planned_are_told(opened, tmp_path):
    """What another plan has written differs in every layer, although all shapes are right."""
    model = opened("gpt_oss")
    layout = model.layout
    plans = [
        Plan(layout_hash=layout.hash, ops=[drop_lowest(x, scores[: x.num_experts], 4) for x in layout.routed])
        for scores in (list(range(16)), list(range(16, 0, -1)))
    ]
    assert plans[0].dropped() != plans[1].dropped()
    found = compare_weights(model, plans[0], made(model, plans[1], tmp_path / "out"))
    for layer in layout.routed:
        assert f"{layer.experts_path}.down_proj: expert 0" in found.wrong
        assert any(x.startswith(layer.router_path) for x in found.wrong)


def test_experts_that_no_token_chooses_are_checked(opened, tmp_path):
    """Each kept expert of a layer damaged in turn: the few tokens miss some of them, verification none."""
    model = opened("qwen3_moe", num_experts=16)
    plan = half(model)
    result = made(model, plan, tmp_path / "out")
    layer = model.layout.routed[-1]
    unseen = 0
    for expert in range(len(plan.kept(layer))):
        name = f"{layer.experts_path}.{expert}.up_proj.weight"
        bad = tampered(result, tmp_path / f"bad-{expert}", name, torch.zeros_like)
        found = verify(model, plan, bad, SHORT)
        assert not found.ok
        assert found.wrong == (f"{layer.experts_path}.gate_up_proj: expert {expert}",)
        unseen += found.within == 1
    assert unseen, "the logits have shown every expert: the test says nothing"
    right = verify(model, plan, result, SHORT)
    assert right.ok
    assert right.wrong == ()
    assert right.experts == sum(len(plan.kept(x)) for x in model.layout.routed)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"]
)
def test_one_bit_of_what_is_copied_is_told(name, opened, tmp_path):
    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).view(-1)[0] ^= 1
        return tensor

    model = opened("qwen3_moe")
    plan = half(model)
    bad = tampered(made(model, plan, tmp_path / "out"), tmp_path / "bad", name, flip)
    assert compare_weights(model, plan, bad).wrong == (name,)


@pytest.mark.parametrize("form", ["compressed-tensors", "moekit"])
def test_what_is_computed_may_differ_by_rounding(form, opened, tmp_path):
    model = opened("qwen3_moe", dtype=torch.bfloat16)
    layout = model.layout
    groups = (Group(members=(2, 0), weights=(0.25, 0.75)), Group(members=(1, 3), weights=(0.5, 0.5)))
    merge = Plan(layout_hash=layout.hash, ops=[Merge(layer=x.index, groups=groups) for x in layout.routed])
    ops = [Quantize(layer=x.index, bits=8, group_size=-1, format=form) for x in layout.routed]
    for number, plan in enumerate((merge, Plan(layout_hash=layout.hash, ops=ops))):
        result = made(model, plan, tmp_path / str(number))
        assert not compare_weights(model, plan, result).wrong
    other = merge.model_copy(
        update={
            "ops": [
                x.model_copy(update={"groups": (groups[0].model_copy(update={"weights": (0.5, 0.5)}), groups[1])})
                for x in merge.ops
            ]
        }
    )
    assert compare_weights(model, other, Model.open(tmp_path / "0")).wrong


def test_layers_that_are_filled_up_are_compared_where_they_have_experts(opened, tmp_path):
    """One layer keeps all of its experts, the others half, and as many that nobody chooses."""
    model = opened("gpt_oss")
    layout = model.layout
    ops = [drop_lowest(x, list(range(x.num_experts)), x.num_experts // 2) for x in layout.routed[1:]]
    plan = Plan(layout_hash=layout.hash, ops=ops, padding="exact")
    result = made(model, plan, tmp_path / "out")
    found = compare_weights(model, plan, result)
    assert not found.wrong
    assert found.experts == sum(len(plan.kept(x)) for x in layout.routed)
    name = f"{layout.routed[1].router_path}.weight"
    bad = tampered(result, tmp_path / "bad", name, lambda x: x.flip(0))
    assert compare_weights(model, plan, bad).wrong == (name,)
