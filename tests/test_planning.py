"""The planner: exact sizes, predictions against what is true, what is measured, chosen, and said."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import moekit
import tiny
import zoo
from moekit import methods, refmoe
from moekit.apply.bake import bake
from moekit.apply.made import editing
from moekit.data import Dataset
from moekit.errors import DataError, PlanError
from moekit.evaluation.compare import Subject, evaluate, logits_of
from moekit.families.model import Model
from moekit.fitting import FITTED, Fit, decide
from moekit.measurement import measure
from moekit.planning import Candidate, Fitting, candidates, groups, hold_out, plan_for_budget, shortlist
from moekit.planning.outlook import REFILL, Outlook
from moekit.planning.sizes import Sizes
from moekit.planning.ways import Space
from moekit.planning.weights import Weights, look
from moekit.plans import Drop, Group, Merge, Plan, Quantize, QuantizeDense
from moekit.recipe import Step, format_bytes

DATA = tiny.dataset(*(tiny.batch(domain, 12, 9, 12, 12, seed=seed) for domain in (0, 1) for seed in range(3)))
# Families whose experts are tensors of their own, and fused, with groups, with router rows behind the experts', ...
DROPPABLE = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "inkling_text", "zaya"]
APART = ["qwen3_moe", "deepseek_v3", "nemotron_h"]


def all_ways(model: Model) -> dict[str, list]:
    return {f"{x.step.method} {x.rest}": list(x.ops) for x in Space(model).ways if x.step}


@pytest.fixture(scope="module")
def tiny_case(opened_tiny):
    return opened_tiny, measure(opened_tiny, DATA)


@pytest.fixture(scope="module")
def opened_tiny(tmp_path_factory) -> Model:
    return moekit.open(zoo.save("qwen3_moe", tmp_path_factory.mktemp("planning") / "model"))


# ---- sizes


@pytest.mark.parametrize("family", DROPPABLE)
def test_sizes_are_those_that_are_written(opened, family, tmp_path):
    model = opened(family)
    sizes = Sizes(model)
    assert sizes.of(sizes.experts) == sizes.source == model.checkpoint.bytes
    for keep in sizes.counts[:-1][::3]:
        baked = bake(model.checkpoint, model.understanding, sizes.drop(keep), tmp_path / str(keep))
        assert sizes.of(keep) == baked.bytes_after < sizes.source


@pytest.mark.parametrize("family", APART)
def test_sizes_of_fewer_experts_in_fewer_bits(opened, family, tmp_path):
    model = opened(family)
    sizes = Sizes(model)
    keep = sizes.counts[0]
    fewer = bake(model.checkpoint, model.understanding, sizes.drop(keep), tmp_path / "fewer")
    between = moekit.open(fewer.path)
    for (name, before), after in zip(all_ways(model).items(), all_ways(between).values(), strict=True):
        plan = Plan(layout_hash=between.layout.hash, ops=[*after])
        baked = bake(between.checkpoint, between.understanding, plan, tmp_path / name)
        assert sizes.of(keep, before) == baked.bytes_after
        assert sizes.of(keep, before) < min(sizes.of(keep), sizes.of(sizes.experts, before))


def test_experts_that_must_stay_are_said_why(opened):
    sizes = Sizes(opened("qwen3_moe", num_experts=2, num_local_experts=2))
    assert sizes.counts == [2]
    assert "every token needs 2 of 2" in sizes.cannot_drop


# ---- predictions


def outlook_of(shares: list[float], likeness: float = 0.0, rounding: float = 0.0) -> tuple[Outlook, Plan]:
    """One layer of a toy, whose experts have these shares of what is put out; a plan that does nothing."""
    from test_methods import make_layout, make_stats

    layout = make_layout(layers=1, experts=len(shares))
    half = np.array([shares, shares]) / 2
    stats = make_stats(layout, {0: {"gated_norm_sq": 4 * half, "routed_norm_sq": np.array([2.0, 2.0])}})
    way = Quantize(layer=0, bits=4, group_size=8)
    weights = Weights({way: rounding}, {0: likeness}, {("attention", 8, 8, "rtn", "compressed-tensors"): 0.003})
    return Outlook(layout, stats, weights), Plan(layout_hash=layout.hash, ops=[way])


def test_dropping_costs_what_the_dropped_put_out():
    outlook, _ = outlook_of([0.5, 0.2, 0.2, 0.1])
    plan = Plan(layout_hash=outlook.layout.hash, ops=[Drop(layer=0, experts=(1, 3))])
    assert outlook.error(plan) == pytest.approx(REFILL * 0.3)
    assert outlook.error(Plan(layout_hash=outlook.layout.hash)) == 0


def test_rounding_adds_to_dropping():
    outlook, rounded = outlook_of([0.5, 0.2, 0.2, 0.1], rounding=0.01)
    assert outlook.error(rounded) == pytest.approx(0.01)
    both = rounded.model_copy(update={"ops": [Drop(layer=0, experts=(3,)), *rounded.ops]})
    assert outlook.error(both) == pytest.approx(REFILL * 0.1 + 0.01)
    some = rounded.ops[0].model_copy(update={"bits": (4, 16, 4, 16)})  # the dropped one's slots are the others' now
    both.ops[1] = some
    assert outlook.error(both) == pytest.approx(REFILL * 0.1 + 0.01 * 0.7 / 0.9)
    both.ops.append(QuantizeDense(layer=0, bits={"attention": 8, "shared experts": 16}, group_size=8))
    assert outlook.error(both) == pytest.approx(REFILL * 0.1 + 0.01 * 0.7 / 0.9 + 0.003)


def test_merging_costs_more_than_dropping_unless_experts_are_alike():
    merge = Merge(layer=0, groups=(Group(members=(0, 3), weights=(0.75, 0.25)),))
    outlook, plan = outlook_of([0.5, 0.2, 0.2, 0.1])
    plan.ops = [merge]
    assert outlook.error(plan) == pytest.approx(REFILL * 0.1 + 0.5 * ((1 - 0.75**3) ** 2 + 0.25**6))
    alike, _ = outlook_of([0.5, 0.2, 0.2, 0.1], likeness=1.0)
    assert alike.error(plan) == pytest.approx(0)
    between, _ = outlook_of([0.5, 0.2, 0.2, 0.1], likeness=0.5)
    assert 0 < between.error(plan) < outlook.error(plan)


def test_fewer_experts_and_fewer_bits_are_never_predicted_to_be_better(tiny_case):
    model, stats = tiny_case
    found, notes = candidates(model, stats, model.checkpoint.bytes // 2)
    assert notes == ["without naee: the statistics lack subset_error"]
    table: dict[tuple[str, ...], dict[int, Candidate]] = {}
    for x in (x for x in found if not x.rest):
        table.setdefault(tuple(step.method for step in x.steps), {})[x.keep] = x
    pruned = {name: rows for name, rows in table.items() if name and methods.get(name[0]).kind == "prune"}
    assert len(pruned) >= 18
    for name, rows in pruned.items():  # dropped experts are nested; merged groups are not
        errors = [rows[keep].predicted for keep in sorted(rows)]
        assert errors == sorted(errors, reverse=True), name
        sizes = [rows[keep].bytes for keep in sorted(rows)]
        assert sizes == sorted(sizes)
    for x in (x for x in found if x.rest):
        plain = next(y for y in table[tuple(step.method for step in x.steps)].values() if y.keep == x.keep)
        assert x.bytes < plain.bytes
        assert x.predicted > plain.predicted
    for name in {name[:1] for name in table if len(name) == 2}:
        for keep, plain in table[name].items():
            by_bits = [plain, *(table[*name, x][keep] for x in ("rtn-int8", "rtn-int4"))]
            assert by_bits[0].predicted < by_bits[1].predicted < by_bits[2].predicted
            assert by_bits[0].bytes > by_bits[1].bytes > by_bits[2].bytes


def test_rounding_is_what_it_does_to_the_weights(opened_tiny, monkeypatch):
    from moekit.planning import weights

    monkeypatch.setattr(weights, "SAMPLED", 8)
    layer = opened_tiny.layout.routed[1]
    both = [ops[1] for ops in all_ways(opened_tiny).values()]
    assert len(set(both)) >= 2
    found = look(opened_tiny, both)
    assert found.factors == 3
    assert set(found.likeness) == {x.index for x in opened_tiny.layout.routed}
    assert max(found.likeness.values()) < 0.2
    loader, error = opened_tiny.loader(), {}
    for op in both:
        plan = Plan(layout_hash=opened_tiny.layout.hash, ops=[op])
        loader.edit = None
        plain = loader.read(layer.index)
        editing(loader, opened_tiny.layout, plan)
        changed = loader.read(layer.index)
        keys = [key for key in plain if key.startswith(layer.experts_path + ".")]
        lost = sum(float((changed[key].float() - plain[key].float()).square().sum()) for key in keys)
        error[op] = lost / sum(float(plain[key].float().square().sum()) for key in keys)
    assert {op: found.rounding[op] for op in both} == pytest.approx(error, rel=1e-3)


def test_copies_of_one_expert_are_alike(tmp_path):
    model = zoo.build("qwen3_moe")
    for layer in model.model.layers:
        for x in layer.mlp.experts.parameters():
            x.data[:] = x.data[:1].clone()
    model.save_pretrained(tmp_path / "copies")
    found = look(moekit.open(tmp_path / "copies"), ())
    assert list(found.likeness.values()) == pytest.approx([1.0] * len(found.likeness))
    assert look(moekit.open(zoo.save("nemotron_h", tmp_path / "ungated")), ()).factors == 2


# ---- predictions against the truth, on the trained model


@pytest.fixture(scope="module")
def refmoe_case():
    model = moekit.open("refmoe")
    texts = {"python": refmoe.calibration()["python"]}
    data, held = hold_out(moekit.load_data(model, texts, tokens=2048, sequence_length=128))
    return model, measure(model, data, groups=groups(model.layout)), held


def logits(model: Model, plan: Plan | None, data: Dataset) -> torch.Tensor:
    """Of all real positions, as log-probabilities."""
    batches = zip(data.batches, logits_of(Subject(model, plan), data.batches), strict=True)
    return torch.cat([found[batch.mask].float().log_softmax(-1) for batch, found in batches])


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_predicted_errors_rank_as_measured_divergence_does(refmoe_case):
    model, stats, held = refmoe_case
    by_name = all_ways(model)
    outlook = Outlook(model.layout, stats, look(model, [op for ops in by_name.values() for op in ops]))
    plans = [Plan(layout_hash=model.layout.hash, ops=[*by_name["rtn-int4 0"]])]
    for name in ("easy-ep", "reap", "man", "m-smoe", "hc-smoe"):
        plans += [methods.make_plan(name, stats, model.layout, keep=keep) for keep in (28, 16)]
    plans.append(plans[1].model_copy(update={"ops": [*plans[1].ops, *plans[0].ops]}))
    source = logits(model, None, held)
    measured = [kl(source, logits(model, x, held)) for x in plans]
    predicted = [outlook.error(x) for x in plans]
    assert spearmanr(predicted, measured).statistic > 0.93
    ratios = np.array(measured) / predicted
    assert 0.4 < ratios.min() < ratios.max() < 3.5  # orders of magnitude too


def test_the_choice_is_measured_and_said(refmoe_case, tmp_path):
    model, stats, held = refmoe_case
    budget = int(0.45 * model.checkpoint.bytes)
    stages = set()
    choice = plan_for_budget(model, stats, held, budget, measure=2, progress=lambda stage, *_: stages.add(stage))
    assert [x.method for x in choice.steps] == ["rtn-int4"]
    assert {"weights", "candidates", "measured"} <= stages
    measured = choice.frontier.measured
    assert len(measured) == 2
    assert measured[0].chosen
    assert measured[0].measured < measured[1].measured
    again = evaluate(Subject(model, measured[0].candidate.plan), held, against=model).domains["python"].kl.value
    assert again == pytest.approx(measured[0].measured)
    first, second, *others = choice.words
    tokens = sum(held.tokens.values())
    assert first == (
        f"keeps all 32 experts at 4 bits: {format_bytes(measured[0].candidate.bytes)}, 41% of the bytes; predicted "
        f"error {measured[0].candidate.said}, measured KL {measured[0].measured:.4f} on {tokens:,} held-out tokens"
    )
    assert f"costs KL {measured[1].measured:.4f}" in second
    assert any(x.startswith("not measured: ") for x in others)
    assert any(f"{len(choice.frontier.points)} candidates considered, 2 measured" in x for x in others)
    assert str(choice) == "\n".join(choice.words)

    frontier = choice.frontier
    errors = [x.candidate.predicted for x in frontier.front]
    sizes = [x.candidate.bytes for x in frontier.front]
    assert errors == sorted(set(errors), reverse=True)
    assert sizes == sorted(set(sizes))
    assert frontier.points[-1].candidate.steps == ()  # the model as it is: no error, all bytes
    assert frontier.points[-1].candidate.predicted == 0
    folder = frontier.save(tmp_path / "frontier")
    drawn = ET.parse(folder / "frontier.svg").getroot()
    assert len(drawn.findall(".//{*}circle[@class='chosen']")) == 2  # and in the legend
    assert len(drawn.findall(".//{*}path[@class='kl']")) == 3
    rows = (folder / "frontier.md").read_text().splitlines()
    assert len(rows) == 2 + len([x for x in frontier.points if x.front or x.measured is not None])
    assert sum("| chosen |" in row for row in rows) == 1
    data = json.loads((folder / "frontier.json").read_text())
    assert [x["bytes"] for x in data["points"]] == [x.candidate.bytes for x in frontier.points]
    assert [x["steps"] for x in data["points"] if x["chosen"]] == [
        [x.model_dump(exclude_defaults=True) for x in choice.steps]
    ]
    assert "all 32 experts at 4 bits" in frontier._repr_html_()


# ---- budgets


def test_a_budget_that_the_model_keeps_changes_nothing(tiny_case):
    model, stats = tiny_case
    choice = plan_for_budget(model, stats, DATA, model.checkpoint.bytes)
    assert choice.steps == choice.frontier.points == ()
    assert "nothing to do" in str(choice)


def test_a_budget_that_nothing_fits_into_says_what_would(tiny_case):
    model, stats = tiny_case
    sizes = Sizes(model)
    least = min(sizes.of(2, ops) for ops in all_ways(model).values())
    with pytest.raises(PlanError) as caught:
        plan_for_budget(model, stats, DATA, least - 1)
    assert format_bytes(least) in str(caught.value)
    assert "2 of 8 experts at " in str(caught.value)
    smallest = plan_for_budget(model, stats, DATA, least, measure=1)
    assert methods.get(smallest.steps[1].method).kind == "quantize"
    assert smallest.steps[0].keep == 2


def test_predictions_alone_decide_where_nothing_is_measured(tiny_case):
    model, stats = tiny_case
    choice = plan_for_budget(model, stats, DATA, int(0.9 * model.checkpoint.bytes), measure=0)
    fits = [x.candidate for x in choice.frontier.points if x.candidate.bytes <= choice.frontier.budget_bytes]
    assert choice.steps == min(fits, key=lambda x: x.predicted).steps
    assert "not measured" in choice.words[0]


def test_quantised_models_are_pruned_only(opened_tiny, tmp_path):
    plan = Plan(layout_hash=opened_tiny.layout.hash, ops=all_ways(opened_tiny)["rtn-int8 0"])
    small = moekit.open(bake(opened_tiny.checkpoint, opened_tiny.understanding, plan, tmp_path / "int8").path)
    choice = plan_for_budget(small, measure(small, DATA), DATA, int(0.9 * small.checkpoint.bytes), measure=1)
    assert {x.candidate.kind for x in choice.frontier.points} == {("", 8), ("prune", 8)}
    assert any("quantised already" in x for x in choice.words)
    written = methods.make_plan(choice.steps[0].method, measure(small, DATA), small.layout, keep=choice.steps[0].keep)
    baked = bake(small.checkpoint, small.understanding, written, tmp_path / "less")
    assert baked.bytes_after == next(x.candidate.bytes for x in choice.frontier.points if x.chosen)


@pytest.mark.parametrize("formats", ["stock", "moekit"])
def test_fitted_bits_are_tried_on_the_choice(opened, tmp_path, formats):
    model = opened("qwen3_moe", moe_intermediate_size=32)  # rows that fill words in any width
    stats = measure(model, DATA)
    space = Space(model, formats)
    way = next(x for x in space.ways if x.step and x.step.method == "rtn-int4" and x.rest)
    budget = space.sizes.of(8, way.ops) + 1000
    asked: list[tuple[Step, ...]] = []

    def folder(steps):
        asked.append(tuple(steps))
        return tmp_path / steps[-1].method

    fitting = Fitting(DATA, folder)
    choice = plan_for_budget(model, stats, DATA, budget, formats=formats, measure=1, fitting=fitting, domain="code")
    tried = {x.candidate.steps[-1].method: x for x in choice.frontier.measured}
    tried = {name: x for name, x in tried.items() if name in FITTED}
    assert tried.keys() <= {steps[-1].method for steps in asked}
    assert tried.keys() >= ({"gptq-int4"} if formats == "stock" else {"gptq-int4", "mc-moe"})
    assert all(x.candidate.bytes <= budget and x.candidate.predicted > 0 for x in tried.values())
    assert choice.frontier.measured[0].chosen
    assert choice.steps == choice.frontier.measured[0].candidate.steps
    if formats == "moekit":
        mixed = tried["mc-moe"].candidate
        assert mixed.keep == 8
        assert 4 <= mixed.kind[1] < 5
        again = decide("mc-moe", Fit(model, model, None, DATA, tmp_path / "again"), domain=["code"],
                       options=mixed.steps[-1].options)  # fmt: skip
        baked = bake(model.checkpoint, model.understanding, again, tmp_path / "baked")
        assert baked.bytes_after == mixed.bytes


def test_what_cannot_be_done_is_left_out_and_said(opened):
    fused = opened("gpt_oss")
    stats = measure(fused, DATA, groups=("scores",))
    choice = plan_for_budget(fused, stats, DATA, int(0.9 * fused.checkpoint.bytes), measure=1, domain="code")
    assert all(methods.get(x.method).kind == "prune" and x.domain == ["code"] for x in choice.steps)
    assert any(x.startswith("not quantised: ") for x in choice.words)
    assert any(x.startswith("without m-smoe: the statistics lack ") for x in choice.words)
    with pytest.raises(DataError, match="no domain"):
        plan_for_budget(fused, stats, DATA, int(0.9 * fused.checkpoint.bytes), domain="verse")
    full = opened("qwen3_moe", num_experts=2, num_local_experts=2)
    choice = plan_for_budget(full, measure(full, DATA), DATA, int(0.9 * full.checkpoint.bytes), measure=0)
    assert [x.method for x in choice.steps] == ["rtn-int8"]
    assert any("all experts stay" in x for x in choice.words)


# ---- what is measured, and on what


def made(kind: str, bits: int, keep: int, predicted: float, *names: str) -> Candidate:
    steps = tuple(Step(method=name) for name in names)
    return Candidate(steps, Plan(layout_hash="x"), keep, 8, (kind, bits), 0, 100, predicted)


def test_the_shortlist_has_the_best_of_each_kind_that_is_near():
    found = [
        made("prune", 8, 7, 0.01, "reap", "rtn-int8"),
        made("prune", 8, 6, 0.02, "reap", "rtn-int8"),  # the same with fewer experts
        made("prune", 8, 7, 0.012, "ean", "rtn-int8"),
        made("", 4, 8, 0.03, "rtn-int4"),
        made("prune", 4, 7, 0.031, "reap", "rtn-int4"),  # all experts fit at 4 bits
        made("merge", 8, 7, 0.08, "m-smoe", "rtn-int8"),
        made("prune", 16, 4, 0.3, "reap"),  # far
    ]
    best, other, int4, merged, far = found[0], found[2], found[3], found[5], found[6]
    assert shortlist(found, 9) == [best, int4, merged, other, far]
    assert shortlist(found, 2) == [best, int4]


def test_held_out_text_is_text_that_nothing_is_decided_from():
    data = tiny.dataset(*(tiny.batch(d, 12, 9, 5, 12, seed=seed) for d in (0, 1) for seed in range(4)))
    rest, held = hold_out(data)
    assert rest.domains == held.domains == data.domains

    def rows(x):
        return sorted((b.domain, *row[m].tolist()) for b in x.batches for row, m in zip(b.ids, b.mask, strict=True))

    assert sorted(rows(rest) + rows(held)) == rows(data)
    for name in data.domains:
        assert 0 < held.tokens[name] <= 0.4 * data.tokens[name]
    assert hold_out(data)[1].hash == held.hash != rest.hash
    alone = tiny.dataset(tiny.batch(0, 12), tiny.batch(1, 12, 12))
    rest, held = hold_out(alone)
    assert rest.tokens == {"code": 12, "prose": 12} == held.tokens
    assert torch.equal(rest.batches[0].ids, held.batches[0].ids)
