"""Quantising: numbers and packing, files that stock transformers reads as the live plan says, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

import moekit
import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.apply.quantize import round_to_nearest, rounded
from moekit.checkpoint.weights import dequantise_packed, pack_integers
from moekit.cli.compress import run_recipe
from moekit.data import Batch
from moekit.errors import CheckpointError, ModelError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.model import Model
from moekit.methods.quantize import ways
from moekit.pipeline import prepare
from moekit.plans import Drop, Group, Merge, Plan, Quantize
from moekit.recipe import Recipe


def plan_of(model: Model, bits: int, group_size: int) -> Plan:
    ops = [Quantize(layer=x.index, bits=bits, group_size=group_size) for x in model.layout.routed]
    return Plan(layout_hash=model.layout.hash, ops=ops)


def logits(model: Model, plan: Plan | None = None) -> torch.Tensor:
    ids = zoo.inputs(model.layout.family)["input_ids"]
    return next(logits_of(Subject(model, plan), [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [24, 64, 37])
def test_packing_is_that_of_compressed_tensors_and_comes_back(bits, columns):
    values = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), generator=torch.Generator().manual_seed(0)
    )
    packed = pack_integers(values, bits)
    assert torch.equal(packed, pack_to_int32(values.to(torch.int8), bits))
    back = dequantise_packed(packed, torch.ones(5, 1), (5, columns), bits, torch.float32)
    assert torch.equal(back, values.float())


def test_packed_numbers_that_do_not_fit_are_refused():
    packed, scale = pack_integers(torch.zeros(2, 16), 4), torch.ones(2, 2)
    for wrong in (
        (packed, scale, (2, 24)),
        (packed, scale, (1, 2, 8)),
        (packed, scale[:1], (2, 16)),
        (packed, torch.ones(2, 3), (2, 16)),
    ):
        with pytest.raises(CheckpointError, match="do not fit their weight"):
            dequantise_packed(*wrong, 4, torch.float32, "w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, -1), (8, 16)])
def test_rounding_is_to_the_nearest_and_scales_are_never_zero(dtype, bits, group):
    op = Quantize(layer=0, bits=bits, group_size=group)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[2], weight[3] = 0, 1e-7  # nothing at all; too small for a float16 scale
    values, scale = round_to_nearest(weight, op, dtype)
    assert scale.shape == (6, 1 if group < 0 else 32 // group)
    assert (scale > 0).all()
    assert torch.equal(values, values.round())
    assert values.abs().max() <= 2 ** (bits - 1)
    back = rounded(weight, op, dtype)
    step = scale.float().repeat_interleave(32 // scale.shape[1], 1)
    slack = torch.finfo(dtype).eps * weight.float().abs()
    assert ((back.float() - weight.float()).abs() <= 0.5 * step + 2 * slack).all()
    assert torch.equal(rounded(back, op, dtype)[2], torch.zeros(32, dtype=dtype))


def test_the_largest_of_a_group_is_kept():
    weight = torch.tensor([[-7.0, 3.0, 1.0, 0.4, 70.0, 30.0, 6.0, -4.0]])
    back = rounded(weight, Quantize(layer=0, bits=4, group_size=4), torch.float32)
    assert back.tolist() == [[-7.0, 3.0, 1.0, 0.0, 70.0, 30.0, 10.0, 0.0]]


@pytest.mark.parametrize(("model_type", "bits", "group"), [
    ("qwen3_moe", 4, 8), ("deepseek_v3", 8, -1), ("mixtral", 4, 8), ("jamba", 8, 8), ("nemotron_h", 4, 8),
])  # fmt: skip
def test_files_do_what_the_live_plan_does(model_type, bits, group, tmp_path):
    model = moekit.open(zoo.save(model_type, tmp_path / "model"))
    plan = plan_of(model, bits, group)
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    result = moekit.open(baked.path)
    assert result.layout.quantisation == f"int{bits}"
    assert result.layout.total.params == model.layout.total.params
    assert result.dtype == model.dtype
    live, before = logits(model, plan), logits(model)
    assert (live - before).abs().max() > 1e-3
    ids = zoo.inputs(model.layout.family)["input_ids"]
    with torch.no_grad():
        stock = result.load(torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(stock, live, atol=1e-5)
    assert torch.allclose(logits(result), live, atol=1e-5)
    assert baked.bytes_before - baked.bytes_after == pytest.approx(plan.saved_bytes(model.layout), rel=0.05)


def test_a_quantised_model_is_pruned_but_not_quantised_again(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    baked = bake(model.checkpoint, model.understanding, plan_of(model, 4, 8), tmp_path / "int4")
    quantised = moekit.open(baked.path)
    drop = Plan(
        layout_hash=quantised.layout.hash, ops=[Drop(layer=x.index, experts=(0, 5)) for x in model.layout.routed]
    )
    pruned = moekit.open(bake(quantised.checkpoint, quantised.understanding, drop, tmp_path / "pruned").path)
    assert torch.allclose(logits(pruned), logits(quantised, drop), atol=1e-5)
    with pytest.raises(PlanError, match="quantised already"):
        plan_of(quantised, 8, -1).check(quantised.layout)


@pytest.mark.parametrize("merge", [False, True])
def test_dropping_and_quantising_at_once_is_what_one_after_the_other_writes(merge, tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    layout = model.layout
    group = Group(members=(3, 1), weights=(0.75, 0.25))
    first = Plan(
        layout_hash=layout.hash,
        ops=[
            Merge(layer=x.index, groups=(group,)) if merge else Drop(layer=x.index, experts=(1,)) for x in layout.routed
        ],
    )
    both = first.model_copy(update={"ops": [*first.ops, *plan_of(model, 4, 8).ops]})
    with pytest.raises(PlanError, match="a plan of its own"):
        both.check_bakeable(layout)
    between = moekit.open(bake(model.checkpoint, model.understanding, first, tmp_path / "first").path)
    second = bake(between.checkpoint, between.understanding, plan_of(between, 4, 8), tmp_path / "second")
    assert torch.allclose(logits(moekit.open(second.path)), logits(model, both), atol=1e-5)
    saved = model.checkpoint.bytes - second.bytes_after
    assert saved == pytest.approx(both.saved_bytes(layout), rel=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return moekit.open(zoo.save("qwen3_moe", tmp_path_factory.mktemp("quantize") / "model"))


def test_ops_survive_json_and_are_told_apart(model, tmp_path):
    plan = plan_of(model, 4, 8)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.diff(plan) == ""
    assert "here 4 bits, there 8 bits" in plan.diff(plan_of(model, 8, 8))
    assert "there unquantised" in plan.diff(Plan(layout_hash=model.layout.hash))


def test_what_cannot_be_quantised_is_refused(model, tmp_path):
    plan, layout = plan_of(model, 4, 8), model.layout

    def refused(*ops: Quantize | Drop) -> str:
        with pytest.raises(PlanError) as caught:
            Plan(layout_hash=layout.hash, ops=list(ops)).check_bakeable(layout)
        return str(caught.value)

    assert "a plan of its own" in refused(*plan.ops, Drop(layer=0, experts=(1,)))
    assert "quantised once" in refused(*plan.ops, plan.ops[0])
    assert "layer 7 cannot be quantised" in refused(Quantize(layer=7, bits=4, group_size=8))
    assert "does not divide" in refused(Quantize(layer=0, bits=4, group_size=16))
    assert "in different ways" in refused(*plan.ops[:-1])
    fused = moekit.open(zoo.save("gpt_oss", tmp_path / "fused"))
    with pytest.raises(PlanError, match="all experts in one"):
        bake(fused.checkpoint, fused.understanding, plan_of(fused, 4, 8), tmp_path / "out")


def test_weights_that_are_no_numbers_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = zoo.save("qwen3_moe", tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken = moekit.open(folder)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        bake(broken.checkpoint, broken.understanding, plan_of(broken, 8, -1), tmp_path / "out")


@pytest.mark.parametrize("change", [
    {"format": "float-quantized"}, {"num_bits": 3}, {"symmetric": False}, {"actorder": "group"}, {"strategy": "tensor"},
])  # fmt: skip
def test_other_forms_of_compressed_tensors_are_refused(change, model, tmp_path):
    out = bake(model.checkpoint, model.understanding, plan_of(model, 4, 8), tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    settings = config["quantization_config"]
    for key, value in change.items():
        (settings if key == "format" else settings["config_groups"]["group_0"]["weights"])[key] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="this form of compressed-tensors"):
        moekit.open(out)


def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    return str(path)


def test_a_recipe_quantises_without_keep(tmp_path):
    given = {"model": "refmoe", "data": {"code": text(tmp_path)}, "out": str(tmp_path / "out"), "method": "rtn-int4"}
    recipe = Recipe.from_flags(**given, tokens=256, sequence_length=64)
    result = run_recipe(recipe)
    assert result.verification.ok
    assert result.verification.loaded_by == "stock transformers"
    assert {op.group_size for op in result.plan.ops} == {64}
    assert any("group size 64, not 128" in note for note in result.plan.notes)
    assert result.baked.bytes_after < 0.45 * result.baked.bytes_before
    assert "quantised" in (tmp_path / "out" / "README.md").read_text()
    assert "quantised experts" in (tmp_path / "out" / "report.md").read_text()


def test_keep_is_for_methods_that_drop(model, tmp_path):
    given = {"model": "refmoe", "data": {"code": text(tmp_path)}, "out": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="must be told how many"):
        prepare(Recipe.from_flags(**given))
    with pytest.raises(RecipeError, match="drops none"):
        prepare(Recipe.from_flags(**given, method="rtn-int8", keep=0.5))
    method = methods.get("rtn-int8")
    with pytest.raises(PlanError, match="group size"):
        ways(method, model.layout, {"group_size": 0})
