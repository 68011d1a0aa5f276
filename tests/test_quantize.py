"""Quantising: numbers and packing, files that stock transformers reads as the live plan says, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from transformers import AutoModelForCausalLM

import moekit
import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.checkpoint.grid import Grid, fitted_scale, nearest, quantised, read_back, split, widest_scale
from moekit.checkpoint.packing import dequantise_packed, pack, unpack
from moekit.cli.compress import run_recipe
from moekit.data import Batch
from moekit.errors import CheckpointError, ModelError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.model import Model
from moekit.methods.quantize import ways
from moekit.pipeline import prepare
from moekit.plans import OUTER, Drop, Group, Merge, Plan, Quantize, QuantizeDense
from moekit.recipe import Recipe


def plan_of(model: Model, bits: int, group_size: int) -> Plan:
    ops = [Quantize(layer=x.index, bits=bits, group_size=group_size) for x in model.layout.routed]
    return Plan(layout_hash=model.layout.hash, ops=ops)


def logits(model: Model, plan: Plan | None = None) -> torch.Tensor:
    ids = zoo.inputs(model.layout.family)["input_ids"]
    return next(logits_of(Subject(model, plan), [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [24, 64, 37])
def test_packing_is_that_of_compressed_tensors_and_comes_back(bits, columns):
    codes = torch.randint(2**bits, (5, columns), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack(packed, bits, columns), codes.to(torch.uint8))
    back = dequantise_packed(packed, torch.ones(5, 1), (5, columns), Grid(bits, half=True))
    assert torch.equal(back, codes - (2 ** (bits - 1) - 0.5))


def test_packed_numbers_that_do_not_fit_are_refused():
    packed, scale = pack(torch.zeros(2, 16), 4), torch.ones(2, 2)
    for wrong in (
        (packed, scale, (2, 24)),
        (packed, scale, (1, 2, 8)),
        (packed, scale[:1], (2, 16)),
        (packed, torch.ones(2, 3), (2, 16)),
        (packed.float(), scale, (2, 16)),
    ):
        with pytest.raises(CheckpointError, match="do not fit their weight"):
            dequantise_packed(*wrong, Grid(4, half=False), "w")


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "group"), [
    (Grid(4, half=False), 8), (Grid(4, half=False), -1), (Grid(8, half=False), 16), (Grid(1, half=True), 8),
    (Grid(3, half=True), 32),
])  # fmt: skip
def test_codes_are_the_nearest_and_zeros_stay_zeros(dtype, grid, group, fitted):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[2], weight[3] = 0, 1e-7  # nothing at all; too small for a float16 scale
    codes, scale = quantised(weight, grid, group, dtype, fitted)
    assert scale.shape == (6, 1 if group < 0 else 32 // group)
    assert (codes.int() < 2**grid.bits).all()
    back = read_back(codes, scale, grid)
    assert back.isfinite().all()
    assert (back[2] == 0).all()
    every = (
        split(weight.float(), group)[..., None]
        - grid.levels(torch.arange(2**grid.bits)) * scale.float()[..., None, None]
    )
    found = split(weight.float() - read_back(codes, scale.float(), grid), group).abs()
    assert torch.allclose(found, every.abs().amin(-1), atol=1e-6)


@pytest.mark.parametrize("grid", [Grid(2, half=False), Grid(2, half=True), Grid(4, half=False), Grid(1, half=True)])
def test_fitted_scales_have_nearly_the_least_error(grid):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))

    def error(scale):
        back = read_back(nearest(split(weight, 32), scale, grid).flatten(1), scale, grid)
        return split((weight - back).square(), 32).sum(-1)

    widest, fitted = (choose(split(weight, 32), grid, torch.float32) for choose in (widest_scale, fitted_scale))
    tried = torch.stack([error(widest * share) for share in torch.linspace(0.05, 1.2, 400)])
    assert (error(fitted) <= error(widest)).all()
    assert error(fitted).sum() <= 1.03 * tried.amin(0).sum()


def test_important_columns_are_read_back_better():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    importance = torch.ones(32)
    importance[:4] = 100
    grid, errors = Grid(2, half=True), []
    for given in (None, importance):
        scale = fitted_scale(split(weight, 32), grid, torch.float32, given)
        back = read_back(nearest(split(weight, 32), scale, grid).flatten(1), scale, grid)
        errors.append((back - weight)[:, :4].square().sum())
    assert errors[1] < errors[0]


def test_the_largest_of_a_group_is_kept():
    weight = torch.tensor([[-7.0, 3.0, 1.0, 0.4, 70.0, 30.0, 6.0, -4.0]])
    grid = Grid(4, half=False)
    back = read_back(*quantised(weight, grid, 4, torch.float32), grid)
    assert back.tolist() == [[-7.0, 3.0, 1.0, 0.0, 70.0, 30.0, 10.0, 0.0]]


@pytest.mark.parametrize(("model_type", "bits", "group"), [
    ("qwen3_moe", 4, 8), ("deepseek_v3", 8, -1), ("mixtral", 3, 8), ("jamba", 2, 8), ("nemotron_h", 6, 8),
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


def test_attention_is_read_back_alike_in_another_dtype(tmp_path):
    """compressed-tensors multiplies in the dtype that it is loaded in; the numbers are those of the source's own."""
    zoo.build("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    model = moekit.open(tmp_path / "model")
    plan = plan_of(model, 4, 8)
    plan.ops += [QuantizeDense(layer=i, bits={"attention": 8}, group_size=8) for i in range(model.layout.num_layers)]
    result = moekit.open(bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path)
    ids = zoo.inputs(model.layout.family)["input_ids"]
    with torch.no_grad():
        stock = result.load(torch.float32)(input_ids=ids, use_cache=False).logits
    assert stock.dtype == torch.float32
    assert torch.allclose(stock, logits(model, plan), atol=1e-5)


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
    between = moekit.open(bake(model.checkpoint, model.understanding, first, tmp_path / "first").path)
    second = bake(between.checkpoint, between.understanding, plan_of(between, 4, 8), tmp_path / "second")
    at_once = bake(model.checkpoint, model.understanding, both, tmp_path / "both")
    assert torch.allclose(logits(moekit.open(second.path)), logits(model, both), atol=1e-5)
    assert (second.path / "model.safetensors").read_bytes() == (at_once.path / "model.safetensors").read_bytes()
    saved = model.checkpoint.bytes - second.bytes_after
    assert saved == pytest.approx(both.saved_bytes(layout), rel=0.05)


ALL_WIDTHS = (1, 2, 3, 4, 5, 8, 16, 7)


def own_plan(model: Model) -> Plan:
    """Every width in every layer, and all else that can be packed."""
    dense = {"attention": 4, "shared experts": 8, "dense MLP": 6}
    ops = [
        *(Quantize(layer=x.index, bits=ALL_WIDTHS, group_size=8, scheme="fitted", format="moekit")
          for x in model.layout.routed),
        *(QuantizeDense(layer=i, bits=dense, group_size=48, format="moekit") for i in range(model.layout.num_layers)),
        QuantizeDense(layer=OUTER, bits={"embeddings": 8}, group_size=-1, format="moekit"),
    ]  # fmt: skip
    return Plan(layout_hash=model.layout.hash, ops=ops)


# one tensor an expert; without a gate; all in one, as they are, and turned with gate and up by turns; tied; no contract
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h", "granitemoe", "gpt_oss", "lfm2_moe", "llama4_text"])
def test_the_own_form_holds_any_width_and_is_pruned(family, tmp_path):
    model = moekit.open(zoo.save(family, tmp_path / "model"))
    plan = own_plan(model)
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    result = moekit.open(baked.path)
    assert result.layout.quantisation == "moekit"
    assert result.layout.hash == model.layout.hash
    assert result.layout.total.params == model.layout.total.params
    live = logits(model, plan)
    assert torch.equal(logits(result), live)
    assert (live - logits(model)).abs().max() > 1e-2
    ids = zoo.inputs(model.layout.family)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(result.load(torch.float32)(input_ids=ids, use_cache=False).logits, live, atol=1e-6)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(baked.path)
    drop = Plan(layout_hash=model.layout.hash, ops=[Drop(layer=x.index, experts=(0, 5)) for x in model.layout.routed])
    both = plan.model_copy(update={"ops": [*drop.ops, *plan.ops]})
    pruned = bake(result.checkpoint, result.understanding, drop, tmp_path / "pruned")
    at_once = bake(model.checkpoint, model.understanding, both, tmp_path / "both")
    assert torch.allclose(logits(moekit.open(pruned.path)), logits(model, both), atol=1e-5)
    assert torch.allclose(logits(moekit.open(at_once.path)), logits(model, both), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "jamba"])
def test_stock_transformers_reads_a_width_for_each_part(family, tmp_path):
    model = moekit.open(zoo.save(family, tmp_path / "model"))
    dense = {"attention": 4, "shared experts": 8, "dense MLP": 6}
    ops = [
        *plan_of(model, 3, 8).ops,
        *(QuantizeDense(layer=i, bits=dense, group_size=32) for i in range(model.layout.num_layers)),
        QuantizeDense(layer=OUTER, bits={"head": 8}, group_size=64),
    ]
    plan = Plan(layout_hash=model.layout.hash, ops=ops)
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    result = moekit.open(baked.path)
    assert result.layout.quantisation == "int-mixed"
    assert result.layout.total.params == model.layout.total.params
    live = logits(model, plan)
    assert torch.equal(logits(result), live)
    ids = zoo.inputs(model.layout.family)["input_ids"]
    with torch.no_grad():
        stock = result.load(torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(stock, live, atol=1e-5)
    assert baked.bytes_before - baked.bytes_after == pytest.approx(plan.saved_bytes(model.layout), rel=0.1)


def test_what_stock_transformers_cannot_read_is_refused_with_what_it_can(model):
    layout, outer = model.layout, QuantizeDense(layer=OUTER, bits={"embeddings": 8}, group_size=8)

    def refused(*ops: Quantize | QuantizeDense) -> str:
        with pytest.raises(PlanError) as caught:
            Plan(layout_hash=layout.hash, ops=list(ops)).check(layout)
        return str(caught.value)

    mixed = [Quantize(layer=x.index, bits=(2, 3) * 4, group_size=8) for x in layout.routed]
    assert "one of 2, 3, 4, 5, 6, 7, 8 for all experts" in refused(*mixed)
    assert "experts with 1 bits" in refused(*plan_of(model, 1, 8).ops)
    assert "packed input embeddings" in refused(*plan_of(model, 4, 8).ops, outer)
    assert "all but the experts" in refused(QuantizeDense(layer=0, bits={"attention": 4}, group_size=8))
    assert "one packed form" in refused(*mixed, outer.model_copy(update={"format": "moekit"}))
    assert "not given for each" in refused(Quantize(layer=0, bits=(2, 3), group_size=8, format="moekit"))
    assert "cannot be quantised so" in refused(QuantizeDense(layer=99, bits={"attention": 4}, group_size=8))
    carried = Quantize(layer=0, bits=4, group_size=8, scheme="gptq")
    assert "numbers that this plan carries" in refused(carried)


def test_another_version_of_the_own_form_is_refused(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    out = bake(model.checkpoint, model.understanding, own_plan(model), tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another version of moekit"):
        moekit.open(out)


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

    assert "quantised once" in refused(*plan.ops, plan.ops[0])
    assert "layer 7 cannot be quantised" in refused(Quantize(layer=7, bits=4, group_size=8))
    assert "does not divide" in refused(Quantize(layer=0, bits=4, group_size=16))
    assert "in different ways" in refused(*plan.ops[:-1])
    fused = moekit.open(zoo.save("gpt_oss", tmp_path / "fused"))
    with pytest.raises(PlanError, match="one tensor on disk"):
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
    {"format": "float-quantized"}, {"num_bits": 1}, {"symmetric": False}, {"actorder": "group"}, {"strategy": "tensor"},
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
        ways(method, model.layout, method.settings({"group_size": 0}))
