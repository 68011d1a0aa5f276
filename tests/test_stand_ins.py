"""Constant vectors in the place of experts (MoNE): live, on disk, and what is decided."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.cli import main
from moekit.data import Batch
from moekit.errors import CheckpointError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.model import Model
from moekit.families.seam import Call, ExpertRows, Observer
from moekit.fitting import Fit, decide
from moekit.layout import Layout, MoELayer, Part, Router
from moekit.measurement import measure
from moekit.methods import replace
from moekit.plans import Drop, Group, Merge, Plan, PlanTensors, Quantize, Replace, constant_name
from moekit.stats import LayerStats, Stats
from moekit.view import MoEView
from tiny import batch, dataset

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"]
OTHERS = ["zaya"]


class Notes(Observer):
    """What every MoE call was, and each expert's outputs in it."""

    wants_outputs = True

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.outputs: dict[int, dict[int, ExpertRows]] = defaultdict(dict)
        self.results: dict[int, torch.Tensor] = {}

    def routed(self, call: Call) -> None:
        self.calls[call.layer.index] = call

    def expert(self, call: Call, rows: ExpertRows) -> None:
        self.outputs[call.layer.index][rows.expert] = ExpertRows(
            rows.expert, rows.tokens, rows.ranks, rows.output.clone()
        )

    def finished(self, call: Call, output: torch.Tensor) -> None:
        self.results[call.layer.index] = output.reshape(len(call.ids), -1).clone()


@torch.inference_mode()
def run(view: MoEView) -> torch.Tensor:
    return view.model(**zoo.inputs(view.layout.family), use_cache=False).logits


def seen(view: MoEView) -> tuple[torch.Tensor, Notes]:
    notes = Notes()
    with view.watch(notes):
        return run(view), notes


def vectors(model: Model, experts: tuple[int, ...], seed: int = 0) -> dict[int, dict[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.index: {e: torch.randn(layer.width, generator=generator) for e in experts}
        for layer in model.layout.routed
    }


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_slot_adds_its_weight_times_the_vector_and_nothing_else_changes(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, plain = seen(view)
    first = model.layout.routed[0]
    experts = tuple(plain.outputs[first.index])[:2]
    given = {first.index: vectors(model, experts)[first.index]}
    with view.replace(given):
        logits, notes = seen(view)
        unwatched = run(view)
    call, old = notes.calls[first.index], plain.results[first.index]
    assert torch.equal(call.ids, plain.calls[first.index].ids)
    expected = old.clone()
    for expert in experts:
        rows = plain.outputs[first.index][expert]
        weights = call.weights[rows.tokens, rows.ranks, None]
        gates = torch.ones_like(weights) if first.router.weighs_input else weights
        new = gates * given[first.index][expert]
        lost = rows.output if first.router.weighs_input else weights * rows.output
        expected.index_add_(0, rows.tokens, new - lost)
        shown = notes.outputs[first.index][expert].output
        assert torch.allclose(shown, given[first.index][expert].expand_as(shown))
    assert torch.allclose(notes.results[first.index], expected, atol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-3)
    assert torch.allclose(unwatched, logits, atol=1e-5)
    assert torch.equal(seen(view)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_no_token_chooses_may_be_anything(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, plain = seen(view)
    unused = {
        index: {e: torch.full((layer.width,), 1e6) for e in set(range(layer.num_experts)) - set(plain.outputs[index])}
        for index, layer in model.layout.by_index.items()
    }
    gone = {index: set(range(8)) - {0, 1} for index in unused} if family == "mixtral" else {}
    with view.replace(unused):
        assert torch.equal(seen(view)[0], before)
    if gone:  # every expert that is banned is one that no token chooses
        with view.ban(gone):
            banned = run(view)
            with view.replace({i: {e: torch.full((64,), 1e6) for e in experts} for i, experts in gone.items()}):
                assert torch.allclose(run(view), banned, atol=1e-5)


def test_vectors_may_be_laid_over_vectors(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)
    both = vectors(model, (0, 5))
    with view.replace(both):
        together = run(view)
    with (
        view.replace({i: {0: x[0]} for i, x in both.items()}),
        view.replace({i: {5: x[5]} for i, x in both.items()}),
    ):
        assert torch.equal(run(view), together)


def test_impossible_vectors_are_refused(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)
    for wrong, message in (
        ({0: {8: torch.zeros(64)}}, "no such expert"),
        ({9: {0: torch.zeros(64)}}, "no MoE layer"),
        ({0: {0: torch.zeros(63)}}, "width"),
    ):
        with pytest.raises(PlanError, match=message), view.replace(wrong):
            pass


# ---- as a plan, live and on disk


def plan_of(model: Model, folder, experts: tuple[int, ...] = (1, 3, 6), form: str = "moekit", seed: int = 0) -> Plan:
    """A plan whose vectors are random, as large as what experts give."""
    store = PlanTensors(folder)
    for index, by_expert in vectors(model, experts, seed).items():
        layer = model.layout.by_index[index]
        store.write(index, {constant_name(layer, e): 0.3 * x.to(model.dtype) for e, x in by_expert.items()})
    ops = [Replace(layer=x.index, experts=experts, format=form) for x in model.layout.routed]
    return Plan(layout_hash=model.layout.hash, ops=ops, tensors=str(folder))


def logits(model: Model, plan: Plan | None = None) -> torch.Tensor:
    ids = zoo.inputs(model.layout.family)["input_ids"]
    return next(logits_of(Subject(model, plan), [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


def save_mxfp4(folder: Path) -> None:
    """A tiny gpt-oss whose experts are blocks of 4-bit numbers."""
    zoo.build("gpt_oss", intermediate_size=32).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = x.shape
            blocks, scales = (experts, outer, inner // 32, 16), (experts, outer, inner // 32)
            tensors[name + "_blocks"] = torch.randint(256, blocks, dtype=torch.uint8, generator=generator)
            tensors[name + "_scales"] = torch.randint(120, 124, scales, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = x.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_own_form_is_what_the_live_plan_does_and_smaller(opened, family, tmp_path):
    model = opened(family)
    plan = plan_of(model, tmp_path / "new")
    live = logits(model, plan)
    assert (live - logits(model)).abs().max() > 1e-2
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    saved = out.bytes_before - out.bytes_after
    assert saved > 0
    made = Model.open(tmp_path / "out")
    assert made.layout.quantisation == "moekit"
    assert all(x.constants == (1, 3, 6) for x in made.layout.routed)
    assert made.layout.hash != model.layout.hash
    assert [x.num_experts for x in made.layout.routed] == [x.num_experts for x in model.layout.routed]
    assert made.layout.total.params < model.layout.total.params
    if not any("bias" in x.name for x in model.layout.routed[0].tensors if x.role == "expert"):
        assert plan.saved_bytes(model.layout) == saved
    assert torch.allclose(logits(made), live, atol=1e-5)
    assert not list((tmp_path / "out").glob("model*.safetensors"))  # nothing that stock transformers would load
    loaded = made.load(torch.float32)
    with torch.inference_mode():
        whole = loaded(**zoo.inputs(family), use_cache=False).logits
    assert torch.allclose(whole, live, atol=1e-4)
    watched, notes = seen(MoEView(loaded, made.layout))
    assert torch.allclose(watched, live, atol=1e-4)
    index = made.layout.routed[0].index
    for expert in {1, 3, 6} & set(notes.outputs[index]):
        shown = notes.outputs[index][expert].output
        assert torch.equal(shown, shown[:1].expand_as(shown))


def test_statistics_of_such_a_model_see_constants_as_experts(opened, tmp_path):
    model = opened("mixtral")
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new"), tmp_path / "out")
    made = Model.open(tmp_path / "out")
    stats = measure(made, dataset(batch(0, 24, 24), batch(1, 9)), groups=["scores", "outputs"], dtype=torch.float32)
    for layer in made.layout.routed:
        count, total = (stats.get(name, layer.index) for name in ("count", "output"))
        for expert in (1, 3, 6):
            vector = PlanTensors(tmp_path / "new").read(layer.index, constant_name(layer, expert))
            np.testing.assert_allclose(total[expert], count[expert] * vector.numpy(), rtol=1e-4, atol=1e-4)


def test_inspect_names_them(opened, tmp_path, capfd):
    model = opened("mixtral")
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new"), tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "8 experts (3 of them constants), top-2" in said
    assert "saves" not in said


def test_the_stock_form_loads_in_stock_transformers(opened, tmp_path):
    """gpt-oss, whose experts have biases: zero weights, and the bias is the vector."""
    model = opened("gpt_oss")
    assert all(layer.output_bias for layer in model.layout.routed)
    plan = plan_of(model, tmp_path / "new", form="stock")
    live = logits(model, plan)
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    assert out.bytes_after == out.bytes_before
    stock = Model.open(tmp_path / "out").load(torch.float32)
    stock.set_experts_implementation("eager")
    with torch.inference_mode():
        written = stock(**zoo.inputs("gpt_oss"), use_cache=False).logits
    assert torch.allclose(written, live, atol=1e-5)
    assert (live - logits(model)).abs().max() > 1e-2
    experts = stock.model.layers[0].mlp.experts
    assert not experts.down_proj[3].any()
    assert not experts.gate_up_proj[3].any()


def test_mxfp4_stays_mxfp4_in_the_stock_form(tmp_path):
    save_mxfp4(tmp_path / "model")
    model = Model.open(tmp_path / "model")
    plan = plan_of(model, tmp_path / "new", form="stock")
    live = logits(model, plan)
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(tmp_path / "out")
    assert made.layout.quantisation == "mxfp4"
    assert torch.allclose(logits(made), live, atol=1e-5)
    with pytest.raises(PlanError, match="quantised as mxfp4"):
        plan_of(model, tmp_path / "new").check(model.layout)


def test_a_form_that_the_family_has_not_is_refused(opened, tmp_path):
    model = opened("mixtral")
    with pytest.raises(PlanError, match="no place for a constant") as raised:
        plan_of(model, tmp_path / "new", form="stock").check(model.layout)
    assert "format: moekit" in raised.value.fix


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_pruning_afterwards_renumbers_the_vectors(opened, family, tmp_path):
    model = opened(family)
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new"), tmp_path / "first")
    made = Model.open(tmp_path / "first")
    gone = (0, 6) if family == "deepseek_v3" else (0, 3)
    ops = [Drop(layer=x.index, experts=gone) for x in made.layout.routed]
    plan = Plan(layout_hash=made.layout.hash, ops=ops)
    live = logits(made, plan)
    bake(made.checkpoint, made.understanding, plan, tmp_path / "second")
    last = Model.open(tmp_path / "second")
    expected = (0, 2) if family == "deepseek_v3" else (0, 4)
    assert all(x.constants == expected for x in last.layout.routed)
    assert torch.allclose(logits(last), live, atol=1e-5)


def test_one_vector_whose_number_is_that_of_its_layer_is_renumbered(opened, tmp_path):
    model = opened("qwen2_moe")
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new", (1,)), tmp_path / "first")
    made = Model.open(tmp_path / "first")
    plan = Plan(layout_hash=made.layout.hash, ops=[Drop(layer=x.index, experts=(0,)) for x in made.layout.routed])
    live = logits(made, plan)
    bake(made.checkpoint, made.understanding, plan, tmp_path / "second")
    assert torch.allclose(logits(Model.open(tmp_path / "second")), live, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_is_left_can_be_quantised_in_the_own_form(opened, family, tmp_path):
    model = opened(family)
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new"), tmp_path / "first")
    made = Model.open(tmp_path / "first")
    ops = [Quantize(layer=x.index, bits=8, group_size=8, format="moekit") for x in made.layout.routed]
    plan = Plan(layout_hash=made.layout.hash, ops=ops)
    live = logits(made, plan)
    assert 0 < (live - logits(made)).abs().max() < 0.5
    bake(made.checkpoint, made.understanding, plan, tmp_path / "second")
    last = Model.open(tmp_path / "second")
    assert all(x.constants == (1, 3, 6) for x in last.layout.routed)
    assert torch.allclose(logits(last), live, atol=1e-5)
    stock = [op.model_copy(update={"format": "compressed-tensors"}) for op in ops]
    with pytest.raises(PlanError, match="constants"):
        plan.model_copy(update={"ops": stock}).check(made.layout)


def test_what_cannot_be_written_or_be_is_refused(opened, tmp_path):
    model = opened("mixtral")
    plan = plan_of(model, tmp_path / "new")
    first = plan.ops[0]
    for ops, message in (
        ([*plan.ops, first], "twice"),
        ([first.model_copy(update={"experts": (3, 1)})], "ascending"),
        ([first.model_copy(update={"experts": (8,)})], "no such expert"),
        ([first.model_copy(update={"experts": tuple(range(8))})], "must stay"),
        ([first.model_copy(update={"layer": 9})], "no MoE layer"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.model_copy(update={"ops": ops}).check(model.layout)
    with pytest.raises(PlanError, match="are not there"):
        plan.model_copy(update={"tensors": ""}).check(model.layout)
    both = plan.model_copy(update={"ops": [*plan.ops, Drop(layer=0, experts=(0,))]})
    with pytest.raises(PlanError, match="a plan of their own"):
        both.check_bakeable(model.layout)
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(tmp_path / "out")
    again = plan.model_copy(update={"layout_hash": made.layout.hash})
    with pytest.raises(PlanError, match="already"):
        again.check(made.layout)
    merge = Merge(layer=0, groups=(Group(members=(0, 3), weights=(0.5, 0.5)),))
    with pytest.raises(PlanError, match="cannot be merged"):
        Plan(layout_hash=made.layout.hash, ops=[merge]).check(made.layout)


def test_plans_with_vectors_survive_json_and_layouts_too(opened, tmp_path):
    model = opened("mixtral")
    plan = plan_of(model, tmp_path / "new")
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.kind == "replace"
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    layout = Model.open(tmp_path / "out").layout
    back = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert back.hash == layout.hash
    assert [x.constants for x in back.routed] == [x.constants for x in layout.routed]


def test_an_expert_with_vector_and_weights_or_neither_is_found_out(opened, tmp_path):
    model = opened("qwen2_moe")
    bake(model.checkpoint, model.understanding, plan_of(model, tmp_path / "new"), tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    vector = next(x for x in tensors if x.endswith("experts.3.constant"))
    broken = {name: x for name, x in tensors.items() if name != vector}
    save_file(broken, file)
    with pytest.raises(CheckpointError, match="has not the 8 experts"):
        Model.open(tmp_path / "out")
    weight = next(x for x in tensors if x.endswith("experts.2.up_proj.weight"))
    save_file(tensors | {weight.replace("experts.2.", "experts.3."): tensors[weight].clone()}, file)
    with pytest.raises(CheckpointError, match="one for expert 3"):
        Model.open(tmp_path / "out")


# ---- what is decided


def toy(experts: int = 6, biased: bool = False) -> tuple[Layout, Stats, dict[str, np.ndarray]]:
    """Two layers with random outputs of 200 tokens, and the first layer's tokens themselves."""
    rng = np.random.default_rng(0)
    router = Router("softmax", renormalised=True)
    layers, raw, statistics = [], {}, {}
    for index in range(2):
        layers.append(
            MoELayer(
                index, "", f"layers.{index}.experts", "", experts, (), experts, 2, router, 16, 0, (), 100,
                width=5, output_bias=biased,
            )
        )  # fmt: skip
        chosen = np.zeros((200, experts), bool)
        np.put_along_axis(chosen, rng.random((200, experts - 1)).argsort(1)[:, :2], True, 1)  # the last stays cold
        gates = np.where(chosen, rng.random((200, experts)) * rng.random(experts) + 0.01, 0.0)
        outputs = rng.normal(size=(200, experts, 5)) * rng.random(experts)[:, None] * 3 + rng.normal(size=(experts, 5))
        statistics[index] = LayerStats(
            {
                "count": chosen.sum(0)[None].astype(float),
                "gate_mass": gates.sum(0)[None],
                "norm_sq": (np.square(outputs).sum(2) * chosen).sum(0)[None],
                "output": (outputs * chosen[..., None]).sum(0)[None].astype(np.float32),
                "peak": np.ones((1, experts)),
            }
        )
        raw = raw or {"chosen": chosen, "gates": gates, "outputs": outputs}
    layout = Layout("toy", "toy", "Toy", 5, 2, 64, "float32", None, tuple(layers), {"experts": Part(1, 1)}, 1, ())
    stats = Stats(layout.hash, ("text",), np.array([200]), np.array([1]), statistics)
    return layout, stats, raw


def replacing(stats: Stats, layout: Layout, **given) -> Plan:
    settings = {"keep": 3, "domain": None, "spread": "uniform", "protect": "none", **given}
    return replace.make_plan(methods.get("mone"), stats, layout, settings={"format": "auto"}, **settings)


def test_scores_are_use_times_spread_token_by_token():
    layout, stats, raw = toy()
    expected, means = [], []
    for e in range(6):
        mine = raw["outputs"][raw["chosen"][:, e], e]
        means.append(mine.mean(0) if len(mine) else np.zeros(5))
        variance = sum(float(np.var(mine[:, d])) for d in range(5)) if len(mine) else 0.0
        expected.append(raw["gates"][:, e].sum() * variance**0.5)
    found = methods.get("mone")(stats, layout.layers[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(replace.stand_ins(stats, layout.layers[0], (0, 4, 5)), np.array(means)[[0, 4, 5]], 1e-5)
    plan = replacing(stats, layout)
    assert plan.ops[0].experts == tuple(sorted(np.argsort(expected)[:3].tolist()))
    assert plan.ops[0].format == "moekit"
    mass = raw["gates"].sum(0)
    lost = plan.measured["replaced_gate_mass"]["0"]
    assert lost == pytest.approx(mass[list(plan.ops[0].experts)].sum() / mass.sum())


def test_a_cold_expert_goes_first_and_all_kept_changes_nothing():
    layout, stats, _ = toy()
    assert all(op.experts == (5,) for op in replacing(stats, layout, keep=5).ops)
    assert replacing(stats, layout, keep=1.0).ops == []
    assert [len(op.experts) for op in replacing(stats, layout, keep=1).ops] == [5, 5]  # fewer than top_k may stay


def test_super_experts_keep_their_weights():
    layout, stats, _ = toy()
    stats.layers[0].arrays["peak"][0, 5] = 1000.0
    assert 5 in replacing(stats, layout).ops[0].experts
    protected = replacing(stats, layout, protect="super")
    assert 5 not in protected.ops[0].experts
    assert any("0.5" in note for note in protected.notes)


def test_a_global_budget_has_the_same_total():
    layout, stats, _ = toy()
    for array in ("gate_mass",):
        stats.layers[1].arrays[array] *= np.array([1, 1, 1, 1, 20, 20])
    plan = replacing(stats, layout, spread="global")
    assert sum(len(op.experts) for op in plan.ops) == 6
    assert len(plan.ops[0].experts) != len(plan.ops[1].experts)


def test_the_form_follows_the_family():
    layout, stats, _ = toy(biased=True)
    assert {op.format for op in replacing(stats, layout).ops} == {"stock"}
    with pytest.raises(RecipeError, match="no format"):
        replace.form_of(layout, "onnx")


def test_vectors_need_a_folder(opened):
    layout, stats, _ = toy()
    with pytest.raises(PlanError, match="a folder"):
        methods.make_plan("mone", stats, layout, keep=3)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_decided_on_text_written_and_run(opened, family, tmp_path):
    """Mean outputs as a plain loop takes them; with all experts kept nothing changes."""
    model = opened(family)
    data = dataset(batch(0, 24, 24), batch(1, 20))
    stats = measure(model, data, groups=["scores", "outputs"], dtype=torch.float32)
    fit = Fit(model, model, stats, data, tmp_path / "new", dtype=torch.float32)
    plan = decide("mone", fit, keep=0.5)
    notes, total, count = Notes(), defaultdict(lambda: torch.zeros(64)), Counter()
    view = MoEView(model.load(torch.float32), model.layout)
    layer = model.layout.routed[0]
    for part in data.batches:
        with view.watch(notes), torch.inference_mode():
            view.model(input_ids=part.ids)
        for expert, rows in notes.outputs[layer.index].items():
            total[expert] += rows.output.sum(0)
            count[expert] += len(rows.output)
        notes.outputs.clear()
    for expert in plan.replaced()[layer.index].experts:
        found = PlanTensors(plan.tensors).read(layer.index, constant_name(layer, expert))
        assert torch.allclose(found, total[expert] / max(count[expert], 1), atol=1e-5)
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(tmp_path / "out")
    assert torch.allclose(logits(made), logits(model, plan), atol=1e-5)
    assert (made.layout.quantisation is None) == (family == "gpt_oss")
    assert decide("mone", fit, keep=1.0).ops == []
