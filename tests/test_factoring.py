"""Experts as low rank and sparse rest: files do what the live plan does, in both forms; small, read back, refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
import zoo
from family_proofs import INTEL
from moekit.apply.bake import bake
from moekit.data import Batch
from moekit.errors import CheckpointError, PlanError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.matrices import expert_matrices
from moekit.plans import Drop, Factor, Group, Merge, Plan, PlanTensors, Quantize

# one tensor an expert; experts in one tensor, turned, with biases; groups and shared experts; weights of the input;
# experts in one tensor; no gate
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe", "nemotron_h"]
OTHERS = {
    "": lambda layer: (),
    "drop": lambda layer: (Drop(layer=layer, experts=(1, 5)),),
    "merge": lambda layer: (
        Merge(
            layer=layer,
            groups=(Group(members=(1, 0), weights=(0.6, 0.4)), Group(members=(5, 4), weights=(0.5, 0.5))),
        ),
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    known = {}

    def get(family, dtype=torch.bfloat16):
        if (family, dtype) not in known:
            folder = tmp_path_factory.mktemp(family) / "model"
            zoo.build(family, dtype=dtype).save_pretrained(folder)
            known[family, dtype] = moekit.open(folder)
        return known[family, dtype]

    return get


def factors(model, others=OTHERS[""], **settings):
    settings = {"rank": 4, "density": 0.1} | settings
    ops = [op for x in model.layout.routed for op in (Factor(layer=x.index, **settings), *others(x.index))]
    return Plan(layout_hash=model.layout.hash, ops=ops)


def logits(model, plan=None):
    ids = zoo.inputs(model.layout.family)["input_ids"]
    subject = Subject(model, plan) if plan else Subject(model)
    return next(logits_of(subject, [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


def written(model, plan, folder):
    return moekit.open(bake(model.checkpoint, model.understanding, plan, folder).path)


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("form", ["moekit", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_do_what_the_live_plan_does(source, tmp_path, family, form, others):
    model = source(family)
    plan = factors(model, OTHERS[others], format=form)
    applied = logits(model, plan)
    made = written(model, plan, tmp_path / "out")
    # A router with fewer rows may be multiplied in another order of sums: on some CPUs the last bit differs.
    assert torch.allclose(logits(made), applied, rtol=0, atol=1e-5 if others and not INTEL else 0)  # streamed
    ids = zoo.inputs(model.layout.family)["input_ids"]
    with torch.no_grad():
        whole = made.load(torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(whole, applied, atol=1e-5)
    assert (applied - logits(model)).abs().max() > 1e-2
    assert {x.num_experts for x in made.layout.routed} == {6 if others else 8}
    if form == "dense":
        assert made.layout.quantisation is None
        stock = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(stock(input_ids=ids, use_cache=False).logits, applied, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_the_own_form_is_really_smaller_and_as_large_as_said(source, tmp_path, family):
    model = source(family)
    plan = factors(model, rank=3, density=0.05)
    made = written(model, plan, tmp_path / "out")
    held = sum(x.bytes for x in made.checkpoint.tensors.values())
    said = model.layout.total.bytes - plan.saved_bytes(model.layout)
    assert held < 0.6 * model.layout.total.bytes
    assert held == pytest.approx(said, rel=0.05)
    assert made.layout.quantisation == "moekit"
    assert made.layout.parts["experts"].params == model.layout.parts["experts"].params  # multiplied out
    assert json.loads((made.path / "config.json").read_text())["quantization_config"]["quant_method"] == "moekit"
    assert not list(made.path.glob("model*.safetensors"))  # nothing that stock transformers would half load
    dense = written(model, factors(model, rank=3, density=0.05, format="dense"), tmp_path / "dense")
    assert dense.layout.total.bytes == model.layout.total.bytes


def test_a_full_rank_changes_nothing(source):
    model = source("qwen3_moe", torch.float32)
    plan = factors(model, rank=100, density=0.0, format="dense")
    assert torch.allclose(logits(model, plan), logits(model), atol=1e-4)
    rest = factors(model, rank=1, density=1.0, format="dense")
    assert torch.allclose(logits(model, rest), logits(model), atol=1e-4)


def test_more_rank_and_more_rest_are_nearer(source):
    model = source("qwen3_moe", torch.float32)

    def distance(**settings):
        return float((logits(model, factors(model, format="dense", **settings)) - logits(model)).square().mean())

    assert distance(rank=16, density=0.1) < distance(rank=8, density=0.1) < distance(rank=2, density=0.1)
    assert distance(rank=4, density=0.5) < distance(rank=4, density=0.2) < distance(rank=4, density=0.0)


def test_a_factored_model_can_be_pruned(source, tmp_path):
    model = source("qwen3_moe")
    made = written(model, factors(model), tmp_path / "made")
    drop = Plan(layout_hash=made.layout.hash, ops=[Drop(layer=x.index, experts=(0, 7)) for x in made.layout.routed])
    pruned = written(made, drop, tmp_path / "pruned")
    assert torch.allclose(logits(pruned), logits(made, drop), rtol=0, atol=0 if INTEL else 1e-5)
    assert pruned.layout.total.bytes < made.layout.total.bytes


def test_factors_that_the_plan_carries_are_used(source, tmp_path):
    model = source("qwen3_moe")
    plan = factors(model, scheme="healed")
    store = PlanTensors(tmp_path / "tensors")
    drawn = torch.Generator().manual_seed(0)
    for layer in model.layout.routed:
        parts = {}
        for x in expert_matrices(model.checkpoint, model.understanding, layer):
            parts[x.name + "_left"] = torch.randn(x.rows, 4, generator=drawn).bfloat16()
            parts[x.name + "_right"] = torch.randn(4, x.columns, generator=drawn).bfloat16()
            count = round(0.1 * x.rows * x.columns)
            mask = torch.zeros(x.rows * x.columns, dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=drawn)[:count]] = True
            words = torch.nn.functional.pad(mask.view(x.rows, x.columns), (0, -x.columns % 16)).view(x.rows, -1, 16)
            bits = (words * 2 ** torch.arange(16)).sum(-1)
            parts[x.name + "_mask"] = torch.where(bits < 2**15, bits, bits - 2**16).short()
            parts[x.name + "_values"] = torch.randn(count, generator=drawn).bfloat16()
        store.write(layer.index, parts)
    plan.tensors = str(store.folder)
    made = written(model, plan, tmp_path / "own")
    assert torch.equal(logits(made), logits(model, plan))
    first = expert_matrices(model.checkpoint, model.understanding, model.layout.routed[0])[0]
    for suffix in ("_left", "_right", "_mask", "_values"):
        assert torch.equal(
            made.checkpoint.read(first.name + suffix), store.read(first_layer(model), first.name + suffix)
        )
    dense = plan.model_copy(update={"ops": [x.model_copy(update={"format": "dense"}) for x in plan.ops]})
    assert torch.allclose(logits(written(model, dense, tmp_path / "dense")), logits(model, dense), atol=1e-6)
    fewer = plan.model_copy(update={"ops": [x.model_copy(update={"rank": 3}) for x in plan.ops]})
    with pytest.raises(PlanError, match="do not fit"):
        logits(model, fewer)
    with pytest.raises(PlanError, match="not there"):
        factors(model, scheme="healed").check(model.layout)


def first_layer(model):
    return model.layout.routed[0].index


def test_the_plan_survives_json(source, tmp_path):
    plan = factors(source("qwen3_moe"))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.kind == "factor"
    assert plan.own_form
    assert not factors(source("qwen3_moe"), format="dense").own_form


def test_what_cannot_be_is_refused(source, tmp_path):
    model = source("qwen3_moe")
    layer = model.layout.routed[0].index

    def refused(match, *ops, bakeable=False):
        plan = Plan(layout_hash=model.layout.hash, ops=ops)
        with pytest.raises(PlanError, match=match) as error:
            (plan.check_bakeable if bakeable else plan.check)(model.layout)
        return error.value

    error = refused("no smaller", Factor(layer=layer, rank=24, density=0.1))
    assert "at most" in error.expected
    refused("once", Factor(layer=layer, rank=2, density=0.1), Factor(layer=layer, rank=3, density=0.1))
    refused("no MoE layer", Factor(layer=99, rank=2, density=0.1))
    others = [x.index for x in model.layout.routed]
    refused(
        "one form",
        Factor(layer=others[0], rank=2, density=0),
        Factor(layer=others[1], rank=2, density=0, format="dense"),
    )
    quantize = Quantize(layer=layer, bits=4, group_size=-1)
    refused("nothing else", Factor(layer=layer, rank=2, density=0.1), quantize, bakeable=True)
    made = written(model, factors(model), tmp_path / "made")
    with pytest.raises(PlanError, match="already"):
        factors(made).check(made.layout)


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    model = zoo.build("qwen3_moe")
    model.model.layers[0].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    opened = moekit.open(tmp_path / "model")
    for form in ("moekit", "dense"):
        with pytest.raises(CheckpointError, match=r"no numbers") as error:
            bake(opened.checkpoint, opened.understanding, factors(opened, format=form), tmp_path / form)
        assert "experts.3.down_proj" in str(error.value.where)
        assert not (tmp_path / form).exists()
