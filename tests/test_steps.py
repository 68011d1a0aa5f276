"""Recipes of several steps: what each step makes, from which statistics, what is refused, what a killed run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from moekit import refmoe
from moekit.apply.bake import bake
from moekit.checkpoint.reader import Checkpoint
from moekit.cli import main
from moekit.errors import CheckpointError, OutputError, PlanError, RecipeError, VerificationError
from moekit.evaluation.compare import Subject, logits_of
from moekit.evaluation.verify import Verification
from moekit.families.model import Model
from moekit.measurement import measure
from moekit.pipeline import prepare, production, run, statistics
from moekit.pipeline.outlook import layout_after
from moekit.pipeline.statistics import carried
from moekit.plans import Drop, Group, Merge, Plan, PlanTensors, Quantize, QuantizeDense, Replace, drop_lowest
from moekit.plans.standins import constant_name
from moekit.recipe import Recipe

THREE = ["easy-ep keep=6", "m-smoe keep=4", "rtn-int4"]
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path, talker) -> Make:
    """A small job of several steps; settings can be changed."""
    text = tmp_path / "python.txt"
    text.write_text(refmoe.texts()["python"].read_text()[:5000])

    def make(*steps: str, **changes: object) -> Recipe:
        settings = {
            "model": str(talker),
            "data": {"python": str(text)},
            "steps": list(steps),
            "tokens": 512,
            "sequence_length": 64,
            "out": str(tmp_path / "out"),
        }
        return Recipe.from_flags(**settings | changes)

    return make


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what is made


def test_prune_merge_quantise_on_refmoe(tmp_path):
    """Every model of the chain is the plan applied live to the one before; the last is the result, for stock code."""
    pytest.importorskip("compressed_tensors", reason="pip install 'moekit[quantize]'")
    recipe = Recipe.from_flags(
        model="refmoe",
        data={"python": str(refmoe.calibration()["python"])},
        steps=["easy-ep keep=0.75", "m-smoe keep=0.5", "rtn-int4"],
        tokens=2048,
        sequence_length=128,
        out=str(tmp_path / "out"),
    )
    recipe.keep_steps = True
    job = prepare(recipe)
    expected = job.expected()
    result = run(job)
    places = [tmp_path / "out.work" / "step-1-easy-ep", tmp_path / "out.work" / "step-2-m-smoe", tmp_path / "out"]
    models = [job.model, *map(Model.open, places)]
    assert [x.layout.routed[0].num_experts for x in models] == [32, 24, 12, 12]
    for model, done, made, foreseen in zip(models, result.steps, models[1:], expected, strict=False):
        assert done.verification.ok
        assert foreseen.hash == made.layout.hash == layout_after(model.layout, done.plan).hash
        assert foreseen.total.bytes == pytest.approx(made.checkpoint.bytes, rel=0.02)
        batches = job.calibration.batches[:1]
        live = next(logits_of(Subject(model, done.plan), batches, torch.float32))
        baked = next(logits_of(Subject(made), batches, torch.float32))
        assert (live - baked).abs().max() < 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 12
    stock = models[3].load(torch.float32)  # the same, packed experts included, which it would leave in bfloat16
    ids = job.calibration.batches[0].ids[:1]
    with torch.inference_mode():
        theirs = stock(input_ids=ids).logits
    chain = next(
        logits_of(Subject(models[2], result.plan), [tiny.Batch(0, ids, torch.ones_like(ids) > 0)], torch.float32)
    )
    assert (theirs - chain).abs().max() < 1e-3
    assert result.baked.bytes_before == job.model.checkpoint.bytes


def test_every_kind_of_step_in_a_row(recipe, tmp_path):
    """Prune, merge, low rank, quantise, heal: each proven, the last for stock code, and told in one report."""
    pytest.importorskip("compressed_tensors", reason="pip install 'moekit[quantize]'")
    kinds = ["mc-smoe rank=4 format=dense", "rtn-int8", "router-lstsq"]
    result = run(prepare(recipe(*THREE[:2], *kinds)))
    assert [x.plan.kind for x in result.steps] == ["prune", "merge", "factor", "quantize", "heal"]
    assert all(x.verification.ok for x in result.steps)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 4
    said = "stock transformers needs the package compressed-tensors to load this model"
    assert said in json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert said in result.baked.notes


def test_two_steps_by_one_score_make_what_one_step_makes(recipe, tmp_path):
    """Scores of the experts that stay are carried over exactly, so that the lowest six of eight go either way."""
    run(prepare(recipe("reap keep=6 protect=none", "reap keep=4 protect=none")))
    one = recipe(steps=None, method="reap", keep=4, protect="none", out=str(tmp_path / "one"))
    result = run(prepare(one))
    assert same(tmp_path / "out", tmp_path / "one")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == {str(x.index): list(result.plan.kept(x)) for x in Model.open(one.model).layout.routed}
    alone = json.loads((tmp_path / "one" / "report.json").read_text())
    for index, share in alone["removed_gate_mass"].items():
        assert report["removed_gate_mass"][index] == pytest.approx(share)


def test_a_single_step_is_the_short_form(recipe, tmp_path):
    run(prepare(recipe("man keep=4 squared=true")))
    run(prepare(recipe(steps=None, method="man", keep=4, options={"squared": True}, out=str(tmp_path / "short"))))
    assert same(tmp_path / "out", tmp_path / "short")
    assert names(tmp_path / "out") == names(tmp_path / "short")
    assert names(tmp_path) == ["out", "python.txt", "short"]


def test_what_the_result_says_of_its_steps(recipe, tmp_path):
    made = recipe(*THREE, evaluation_data={"python": str(tmp_path / "python.txt")}, evaluation_sequence_length=64)
    result = run(prepare(made))
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert [x["method"] for x in report["steps"]] == ["easy-ep", "m-smoe", "rtn-int4"]
    sizes = [(x["bytes"]["before"], x["bytes"]["after"]) for x in report["steps"]]
    assert sizes[0][0] == Checkpoint.open(made.model).bytes > sizes[0][1] == sizes[1][0] > sizes[1][1] == sizes[2][0]
    assert sizes[2][1] == Checkpoint.open(out).bytes
    assert report["bytes"] == {"before": sizes[0][0], "after": sizes[2][1]}
    assert all(x["verification"]["ok"] for x in report["steps"])
    text = (out / "report.md").read_text()
    assert "with 4 of 8 experts a layer, quantised experts" in text
    for number, done in enumerate(result.steps, 1):
        assert f"| {number} | `{done.plan.method}` |" in text
        assert f"{done.verification.max_difference:.2g}" in text
        for note in done.plan.notes:
            assert f"- step {number}, {note}" in text
    head = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert {"pruned", "merged", "quantised"} <= set(head["tags"])
    made_of = json.loads((out / "moekit.json").read_text())
    assert made_of["source"]["fingerprint"] == Model.open(made.model).fingerprint
    assert [Plan(**x).ops for x in made_of["plans"]] == [x.plan.ops for x in result.steps]
    assert {x["tensors"] for x in made_of["plans"]} == {""}  # numbers that plans held are in the weights
    assert Recipe.load(out / "recipe.yaml") == made
    assert Plan.load(out / "plan.json").ops == result.plan.ops
    assert not (tmp_path / "out.work").exists()


def test_planning_only_makes_the_plans_of_the_run(recipe, tmp_path):
    made = recipe(*THREE)
    planned = run(prepare(made), plan_only=True)
    assert planned.path is None
    assert names(tmp_path / "out.work") == ["stats"]
    result = run(prepare(made))
    assert [x.plan.ops for x in planned.steps] == [x.plan.ops for x in result.steps]
    assert [x.plan.layout_hash for x in planned.steps] == [x.plan.layout_hash for x in result.steps]


def test_planning_only_stops_where_a_model_is_needed(recipe, tmp_path):
    planned = run(prepare(recipe("easy-ep keep=6", "m-smoe keep=4 remeasure=true", "rtn-int4")), plan_only=True)
    assert [x.plan.method for x in planned.steps] == ["easy-ep"]
    assert planned.plan.notes[-1] == "not planned: step 2 (m-smoe) needs a model that is not written"


# ---- statistics


def test_statistics_of_what_experts_that_nobody_chose_leave_are_exact(opened, tmp_path):
    """Two experts of each group can never be chosen: without them every carried number is what measuring gives."""
    model, folder = opened("deepseek_v3"), tmp_path / "biased"
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    for name in biases:
        tensors[name][[1, 3, 5, 6]] = -1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = Model.open(folder)
    layout = model.layout
    data = tiny.dataset(tiny.batch(0, 12, 9), tiny.batch(1, 12, 12))
    plan = Plan(layout_hash=layout.hash, ops=[Drop(layer=x.index, experts=(1, 3, 5, 6)) for x in layout.routed])
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(tmp_path / "out")
    before, wanted = measure(model, data, dtype=torch.float32), measure(made, data, dtype=torch.float32)
    assert len(biases) == len(layout.routed)
    assert not any(x.arrays["count"][:, [1, 3, 5, 6]].any() for x in before.layers.values())
    found = carried(before, layout, plan, made.layout, made.fingerprint)
    assert found.layout_hash == wanted.layout_hash == made.layout.hash
    assert found.layout == wanted.layout
    for index, layer in wanted.layers.items():
        assert layer.arrays.keys() - found.layers[index].arrays.keys() <= {"entropy", "margin", "weight_ratio"}
        for name, array in found.layers[index].arrays.items():
            assert array == pytest.approx(layer.arrays[name], rel=1e-4, abs=1e-4), name


def test_statistics_of_a_merged_group_are_those_of_its_members_together(opened):
    model = opened("qwen3_moe")
    layout = model.layout
    data = tiny.dataset(tiny.batch(0, 12, 9), tiny.batch(1, 12, 12))
    stats = measure(model, data, dtype=torch.float32)
    groups = (Group(members=(5, 0, 7), weights=(0.5, 0.3, 0.2)), Group(members=(2, 3), weights=(0.9, 0.1)))
    for router in ("dominant", "weighted"):
        ops = [Merge(layer=x.index, groups=groups, router=router) for x in layout.routed]
        plan = Plan(layout_hash=layout.hash, ops=ops)
        after = layout_after(layout, plan)
        found = carried(stats, layout, plan, after, "made")
        assert [x.num_experts for x in after.routed] == [5] * len(after.routed)
        members = [[1], [2, 3], [4], [5, 0, 7], [6]]
        rows = torch.zeros(5, 8, dtype=torch.float64)
        for new, old in enumerate(members):
            rows[new, old[0]] = 1.0
        if router == "weighted":
            rows[3, [5, 0, 7]] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
            rows[1, [2, 3]] = torch.tensor([0.9, 0.1], dtype=torch.float64)
        together = torch.zeros(5, 8, dtype=torch.float64)
        for new, old in enumerate(members):
            together[new, old] = 1.0
        for index, layer in stats.layers.items():
            old, new = layer.arrays, found.layers[index].arrays
            for name in ("count", "gate_mass", "norm", "gated_norm", "easy_ep", "sequence_share"):
                assert new[name] == pytest.approx(old[name] @ together.numpy().T)
            peaks = [[row[group].max() for group in members] for row in old["peak"]]
            assert new["peak"].tolist() == peaks
            assert new["output"] == pytest.approx(
                torch.einsum("ge,ned->ngd", together, torch.tensor(old["output"]).double()).numpy(),
                rel=1e-4,
                abs=1e-6,
            )
            gram = torch.einsum("ge,nef,hf->ngh", rows, torch.tensor(old["logit_gram"]), rows)
            assert new["logit_gram"] == pytest.approx(gram.numpy())
            assert new["logit"] == pytest.approx(old["logit"] @ rows.numpy().T)
            chosen = new["coactivation"]
            assert chosen[0, 3, 1] == old["coactivation"][0][[5, 0, 7]][:, [2, 3]].sum()
            assert chosen[:, range(5), range(5)].tolist() == new["count"].tolist()
            assert not {"sequence_share_sq", "sequence_mass_sq", "entropy"} & new.keys()
            if "transition" in old:
                moved = torch.einsum("gf,nfe,he->ngh", together, torch.tensor(old["transition"]), together)
                assert new["transition"] == pytest.approx(moved.numpy())


def test_carried_statistics_add_up(opened):
    """stats(A and B) carried = stats(A) carried + stats(B) carried; and they say where they come from."""
    model = opened("qwen3_moe")
    layout = model.layout
    ops = [Merge(layer=x.index, groups=(Group(members=(5, 0), weights=(0.5, 0.5)),)) for x in layout.routed]
    plan = Plan(layout_hash=layout.hash, ops=ops)
    after = layout_after(layout, plan)
    a, b = (measure(model, tiny.dataset(tiny.batch(n, 12, seed=n)), dtype=torch.float32) for n in (0, 1))
    whole = carried(a + b, layout, plan, after, "made")
    parts = carried(a, layout, plan, after, "made") + carried(b, layout, plan, after, "made")
    for index, layer in whole.layers.items():
        for name, array in layer.arrays.items():
            assert array == pytest.approx(parts.layers[index].arrays[name], rel=1e-5), name
    assert [x["carried_from"]["fingerprint"] for x in whole.parts] == [model.fingerprint] * 2
    assert whole.layout.hash == after.hash
    twice = carried(whole, after, Plan(layout_hash=after.hash), after, "made again")
    assert [x["carried_from"]["fingerprint"] for x in twice.parts] == [model.fingerprint] * 2
    assert [x["fingerprint"] for x in twice.parts] == ["made again"] * 2


def test_the_text_is_measured_once_and_again_where_asked(recipe, tmp_path, monkeypatch):
    seen: list[str] = []

    def counted(model: Model, *arguments: object, **settings: object) -> object:
        seen.append(model.fingerprint)
        return measure(model, *arguments, **settings)

    monkeypatch.setattr(statistics, "measure", counted)
    steps = [*THREE[:2], "reap keep=3"]
    source = Model.open(recipe(*steps).model).fingerprint
    result = run(prepare(recipe(*steps)))
    assert seen == [source]
    assert not any("statistics" in note for note in result.steps[0].plan.notes)
    gone = "what tokens do now whose experts are gone is not in them"
    assert result.steps[1].plan.notes[-1] == f"statistics carried over step 1 (easy-ep): {gone}"
    assert result.steps[2].plan.notes[-1] == f"statistics carried over step 1 (easy-ep), step 2 (m-smoe): {gone}"
    seen.clear()
    steps[1] += " remeasure=true"
    kept = recipe(*steps, out=str(tmp_path / "anew"))
    kept.keep_steps = True
    result = run(prepare(kept))
    first = Model.open(tmp_path / "anew.work" / "step-1-easy-ep")
    assert seen == [source, first.fingerprint]
    assert result.steps[1].plan.notes[-1] == "statistics measured anew on what step 1 (easy-ep) left"
    assert result.steps[1].plan.made_from["fingerprint"] == first.fingerprint
    assert result.steps[2].plan.notes[-1] == f"statistics carried over step 2 (m-smoe): {gone}"
    assert names(tmp_path / "anew.work") == [x + y for x in ("step-1-easy-ep", "step-2-m-smoe") for y in ("", ".json")]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2"])
def test_the_layout_to_come_is_known_beforehand(opened, family, tmp_path):
    """Numbers, hash and bytes, for statistics and checks of later steps; experts fused and apart, grouped or not."""
    model = opened(family)
    layout = model.layout
    drop = [drop_lowest(x, [float(e % 3) for e in range(8)], 4) for x in layout.routed]
    plan = Plan(layout_hash=layout.hash, ops=drop)
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made, foreseen = Model.open(tmp_path / "out").layout, layout_after(layout, plan)
    assert foreseen.hash == made.hash
    assert foreseen.total.bytes == pytest.approx(made.total.bytes, rel=0.02)
    assert foreseen.parts["experts"] == made.parts["experts"]
    assert [x.expert_bytes for x in foreseen.routed] == [x.expert_bytes for x in made.routed]


@pytest.mark.parametrize("form", ["compressed-tensors", "moekit"])
@pytest.mark.parametrize("dense", [{}, {"attention": 8}])
def test_bits_to_come_are_known_beforehand(opened, tmp_path, form, dense):
    model = opened("qwen3_moe")
    layout = model.layout
    bits = (1, 2, 3, 4, 5, 8, 16, 7) if form == "moekit" else 4
    ops = [Quantize(layer=x.index, bits=bits, group_size=8, format=form) for x in layout.routed]
    ops += [QuantizeDense(layer=x.index, bits=dense, group_size=16, format=form) for x in layout.routed if dense]
    plan = Plan(layout_hash=layout.hash, ops=ops)
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made, foreseen = Model.open(tmp_path / "out").layout, layout_after(layout, plan)
    assert (foreseen.hash, foreseen.quantisation) == (made.hash, made.quantisation)
    assert foreseen.total.bytes == pytest.approx(made.total.bytes, rel=0.05)
    assert foreseen.parts["experts"].bytes == pytest.approx(made.parts["experts"].bytes, rel=0.05)
    assert foreseen.parts["attention"].bytes == pytest.approx(made.parts["attention"].bytes, rel=0.05)


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "moekit"), ("gpt_oss", "stock")])
def test_stand_ins_to_come_are_known_beforehand(opened, tmp_path, family, form):
    """And what is left of them when experts go afterwards: their places are in the hash."""
    layout = opened(family).layout
    store = PlanTensors(tmp_path / "vectors")
    for x in layout.routed:
        store.write(x.index, {constant_name(x, e): torch.ones(x.width) for e in (1, 6)})
    ops = [Replace(layer=x.index, experts=(1, 6), format=form) for x in layout.routed]
    plans = [Plan(layout_hash=layout.hash, ops=ops, tensors=str(tmp_path / "vectors"))]
    model, foreseen = opened(family), layout
    for name in ("replaced", "pruned"):
        bake(model.checkpoint, model.understanding, plans[-1], tmp_path / name)
        model, foreseen = Model.open(tmp_path / name), layout_after(foreseen, plans[-1])
        assert foreseen.hash == model.layout.hash
        assert [x.constants for x in foreseen.routed] == [x.constants for x in model.layout.routed]
        assert foreseen.total.bytes == pytest.approx(model.layout.total.bytes, rel=0.15)
        drops = [Drop(layer=x.index, experts=(0, 6)) for x in layout.routed]
        plans.append(Plan(layout_hash=model.layout.hash, ops=drops))
    constants = (0,) if form == "moekit" else ()
    assert {x.constants for x in model.layout.routed} == {constants}


# ---- refused before any work


@pytest.mark.parametrize(
    ("steps", "kind", "words"),
    [
        (
            ["rtn-int4", "easy-ep keep=0.5"],
            RecipeError,
            ["step 2 (easy-ep): ", "quantised already", "easy-ep before rtn"],
        ),
        (["rtn-int8", "m-smoe keep=0.5"], RecipeError, ["step 2 (m-smoe): ", "write m-smoe before rtn-int8"]),
        (["rtn-int8", "rtn-int4"], RecipeError, ["quantised already", "leave one out"]),
        (["easy-ep keep=6", "reap keep=7"], PlanError, ["step 2 (reap): ", "1 to 6", "7"]),
        (["easy-ep keep=0.5", "reap keep=0.25"], PlanError, ["step 2 (reap): ", "at least 2 of 4", "keep at least 2"]),
        (["easy-ep", "rtn-int4"], RecipeError, ["step 1 (easy-ep): ", "how many experts to keep"]),
        (["easy-ep keep=6", "rtn-int4 keep=4"], RecipeError, ["step 2 (rtn-int4): ", "drops none"]),
        (["easy-ep keep=6", "raep keep=4"], RecipeError, ["step 2 (raep): ", "did you mean 'reap'?"]),
        (["easy-ep keep=6", "reap keep=4 squared=true"], RecipeError, ["step 2 (reap): ", "no option 'squared'"]),
        (
            ["easy-ep keep=6 spread=global", "rtn-int4"],
            RecipeError,
            ["step 1 (easy-ep): ", "different numbers", "spread"],
        ),
        (
            ["easy-ep keep=6", "naee keep=4"],
            RecipeError,
            ["step 2 (naee): ", "subset_error after easy-ep", "remeasure: true"],
        ),
        (["easy-ep keep=6", "rtn-int4 group_size=0"], PlanError, ["step 2 (rtn-int4): ", "group size"]),
    ],
)
def test_what_cannot_be_is_refused_first(recipe, tmp_path, steps, kind, words):
    before = names(tmp_path)
    with pytest.raises(kind) as caught:
        prepare(recipe(*steps))
    for part in words:
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5
    assert names(tmp_path) == before


def test_what_cannot_be_carried_can_be_measured_anew(recipe, tmp_path):
    result = run(prepare(recipe("easy-ep keep=6", "naee keep=4 remeasure=true")))
    assert result.steps[1].plan.notes[-1] == "statistics measured anew on what step 1 (easy-ep) left"
    assert Model.open(tmp_path / "out").layout.routed[0].num_experts == 4


def test_a_folder_named_as_a_step_that_is_not_ours(recipe, tmp_path):
    for name in ("step-1-easy-ep", "step-2-m-smoe.unverified"):
        folder = tmp_path / "out.work" / name
        folder.mkdir(parents=True)
        (folder / "thesis.tex").write_text("dear")
        with pytest.raises(OutputError, match="taken"):
            prepare(recipe(*THREE))
        assert (folder / "thesis.tex").read_text() == "dear"
        shutil.rmtree(tmp_path / "out.work")


def test_room_is_needed_for_the_models_between(recipe, tmp_path, monkeypatch):
    job = prepare(recipe(*THREE))
    sizes = [x.total.bytes for x in job.expected()]

    def free(count: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=count)
        monkeypatch.setattr("moekit.checkpoint.place.shutil.disk_usage", lambda _: usage)

    free(sum(sizes) - 1)
    with pytest.raises(OutputError, match="not enough disk space"):
        run(job)
    assert names(tmp_path) == ["python.txt"]
    free(sum(sizes) + 1_000_000)
    run(job)
    assert (tmp_path / "out" / "config.json").exists()


def test_three_tokens_of_text(recipe, tmp_path, capsys):
    (tmp_path / "three.txt").write_text("a b c")
    command = [
        "compress",
        recipe(*THREE).model,
        "--data",
        f"x={tmp_path / 'three.txt'}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, *(x for step in THREE for x in ("--step", step))]) == 2
    said = capsys.readouterr().err
    assert "fewer tokens than one sequence" in said
    assert "three.txt" in said
    assert names(tmp_path) == ["python.txt", "three.txt"]


# ---- what goes wrong on the way


def broken(folder: Path, source: Path, name: str, value: float) -> Path:
    """A copy of a model with one entry of a weight that is no number."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "step",
    [
        "easy-ep keep=4",
        "m-smoe keep=4",
        "hc-smoe keep=4",
        "ream keep=4 sequential=true",
        "mone keep=4",
        "rtn-int4",
        "gptq-int4",
        "mc-moe",
        "mc-smoe rank=4",
    ],
)
def test_a_weight_that_is_no_number_is_named(recipe, tmp_path, talker, value, step):
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    model = broken(tmp_path / "broken", talker, name, value)
    with pytest.raises(CheckpointError, match="no numbers") as caught:
        run(prepare(recipe(step, model=str(model))))
    assert name in str(caught.value.where)
    assert "NaN or infinity" in str(caught.value.got)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_in_an_expert_that_nobody_chose(tmp_path, talker, value):
    """Statistics do not show it: merging does."""
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    model = Model.open(broken(tmp_path / "broken", talker, name, value))
    layout = model.layout
    ops = [Merge(layer=x.index, groups=(Group(members=(2, 6), weights=(1.0, 0.0)),)) for x in layout.routed]
    with pytest.raises(CheckpointError, match="no numbers") as caught:
        bake(model.checkpoint, model.understanding, Plan(layout_hash=layout.hash, ops=ops), tmp_path / "out")
    assert str(caught.value.where).endswith(name)
    with pytest.raises(CheckpointError, match="no numbers"):
        list(logits_of(Subject(model, Plan(layout_hash=layout.hash, ops=ops)), [tiny.batch(0, 5)], torch.float32))


def test_a_step_that_fails_its_proof(recipe, tmp_path, monkeypatch, capsys):
    """Kept aside and marked, exit 1; nothing at OUT; the step before it stays, and is used when all is well again."""
    proofs: list[Verification] = []

    def second_fails(*arguments: object) -> Verification:
        proofs.append(verify(*arguments))
        return dataclasses.replace(proofs[-1], ok=len(proofs) != 2)

    verify = production.verify
    job = recipe(*THREE)
    flags = [x for step in THREE for x in ("--step", step)]
    command = ["compress", job.model, "--data", f"python={job.data['python']}", "--tokens", "512"]
    command += ["--sequence-length", "64", *flags, "--out", job.out]
    with monkeypatch.context() as patch:
        patch.setattr(production, "verify", second_fails)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "step 2 (m-smoe): the written model does not do what the plan says" in said
    assert names(tmp_path) == ["out.failed", "out.work", "python.txt"]
    assert not json.loads((tmp_path / "out.failed" / "VERIFICATION_FAILED").read_text())["ok"]
    assert names(tmp_path / "out.work") == ["stats", "step-1-easy-ep", "step-1-easy-ep.json"]
    with monkeypatch.context() as patch:
        again = [verify]
        patch.setattr(production, "verify", lambda *x: again.append(x[2].name) or verify(*x))
        assert main(command) == 0
    assert len(again) == 3  # steps 2 and 3
    assert names(tmp_path) == ["out", "out.failed", "python.txt"]


CHILD = """
import os, signal, sys
from moekit.cli import main
from moekit.pipeline import production
calls, real = [], getattr(production, sys.argv[1])
def dies(*arguments, **settings):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **settings)
setattr(production, sys.argv[1], dies)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("function", "call"), [("bake", 2), ("give_name", 1)])
def test_killed_in_the_middle_and_run_again(recipe, tmp_path, function, call):
    """What is finished is not made again, and the result is that of a run which nothing disturbed."""
    steps = [*THREE[:2], "reap keep=3"]
    run(prepare(recipe(*steps, out=str(tmp_path / "whole"))))
    job = recipe(*steps)
    job.keep_steps = True
    (tmp_path / "recipe.yaml").write_text(job.to_yaml())
    command = [sys.executable, "-c", CHILD, function, str(call), "compress", str(tmp_path / "recipe.yaml")]
    killed = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    first = tmp_path / "out.work" / "step-1-easy-ep" / "model.safetensors"
    written = first.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "measure", None)  # nor is the text read again
        result = run(prepare(job))
    assert first.stat().st_mtime_ns == written
    assert len(result.steps) == 3
    assert result.steps[0].verification.ok
    assert same(tmp_path / "out", tmp_path / "whole")
    assert names(tmp_path / "out.work") == [x + y for x in ("step-1-easy-ep", "step-2-m-smoe") for y in ("", ".json")]


def test_steps_of_another_job_are_made_again(recipe, tmp_path):
    """The first step is used for another second one, and not when it is itself another one."""
    job = recipe(*THREE)
    job.keep_steps = True
    run(prepare(job))
    first = tmp_path / "out.work" / "step-1-easy-ep" / "model.safetensors"
    written = first.stat().st_mtime_ns
    later = recipe(THREE[0], "m-smoe keep=3", THREE[2])
    later.keep_steps = True
    run(prepare(later, overwrite=True), overwrite=True)
    assert first.stat().st_mtime_ns == written
    assert Model.open(tmp_path / "out").layout.routed[0].num_experts == 3
    other = recipe("easy-ep keep=5", *THREE[1:])
    run(prepare(other, overwrite=True), overwrite=True)
    assert not (tmp_path / "out.work").exists()
    run(prepare(recipe("easy-ep keep=5", *THREE[1:], out=str(tmp_path / "whole"))))
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_failed_proof_is_an_error_with_its_step(recipe, monkeypatch, tmp_path):
    wrong = Verification(False, "stock transformers", "float32", 9, 0.0, 1e-4, 7.0)
    monkeypatch.setattr(production, "verify", lambda *_: wrong)
    with pytest.raises(VerificationError, match=r"^step 1 \(easy-ep\): the written model") as caught:
        run(prepare(recipe(*THREE)))
    assert caught.value.where == tmp_path / "out.failed"
