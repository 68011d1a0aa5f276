"""Online dynamic pruning: thresholds from sums, what is not run, which tokens are protected, what is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import moekit
import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.apply.dynamic import received
from moekit.apply.live import live
from moekit.cli import main
from moekit.data import Batch
from moekit.errors import PlanError, RecipeError
from moekit.evaluation.compare import Subject, evaluate, logits_of
from moekit.families.model import Model
from moekit.families.seam import Call, Observer
from moekit.families.tokens import Tokens
from moekit.measurement import measure
from moekit.methods.live.odp import quantile_of
from moekit.plans import Odp, Plan
from moekit.stats import RATIO_BINS
from moekit.view import MoEView
from tiny import batch, dataset

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"]


class Calls(Observer):
    """The last call of every layer."""

    def __init__(self) -> None:
        self.last: dict[int, Call] = {}

    def routed(self, call: Call) -> None:
        self.last[call.layer.index] = call


def plan_of(model: Model, **settings) -> Plan:
    ops = [Odp(layer=x.index, renormalise=x.router.renormalised, **settings) for x in model.layout.routed]
    return Plan(layout_hash=model.layout.hash, ops=ops)


def routed(view: MoEView, plan: Plan | None = None) -> tuple[torch.Tensor, dict[int, Call]]:
    """Logits, and the calls as experts see them."""
    calls = Calls()
    with torch.inference_mode():
        if plan is None:
            with view.watch(calls):
                return view.model(**zoo.inputs(view.layout.family), use_cache=False).logits, calls.last
        with live(view, plan), view.watch(calls):
            return view.model(**zoo.inputs(view.layout.family), use_cache=False).logits, calls.last


# ---- thresholds


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_of_the_histogram_are_those_of_the_numbers(share):
    values = np.random.default_rng(0).beta(2, 3, size=5000)
    counts = np.bincount((values * RATIO_BINS).astype(int), minlength=RATIO_BINS).astype(float)
    assert quantile_of(counts, share) == pytest.approx(np.quantile(values, share), abs=1.5 / RATIO_BINS)
    assert quantile_of(np.zeros(RATIO_BINS), share) == 0.0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "deepseek_v4"])
def test_half_of_the_experts_behind_the_first_weigh_less_than_beta(opened, family):
    model = opened(family)
    data = dataset(batch(0, 40, 40), batch(1, 40))
    stats = measure(model, data, groups=["scores", "routing"], dtype=torch.float32)
    plan = methods.make_plan("odp", stats, model.layout, domain="code")
    view = MoEView(model.load(torch.float32), model.layout)
    calls = Calls()
    with view.watch(calls), torch.inference_mode():
        view.model(input_ids=data.batches[0].ids, use_cache=False)
    for index, op in plan.dynamic().items():
        weights = calls.last[index].weights.double().sort(-1, descending=True).values
        ratios = (weights[:, 1:] / weights[:, :1]).flatten()
        assert op.beta == pytest.approx(float(np.median(ratios.numpy())), abs=0.02)
        assert op.renormalise == model.layout.by_index[index].router.renormalised


def test_options(opened):
    model = opened("mixtral", num_experts_per_tok=3)
    stats = measure(model, dataset(batch(0, 30), batch(1, 4)), groups=["routing", "scores"], dtype=torch.float32)
    plans = {ranks: methods.make_plan("odp", stats, model.layout, ranks=ranks) for ranks in ("all", "second")}
    for all_ranks, second in zip(*(plan.ops for plan in plans.values()), strict=True):
        assert all_ranks.beta < second.beta
    lowest = methods.make_plan("odp", stats, model.layout, quantile=0)
    assert all(a.beta < b.beta for a, b in zip(lowest.ops, plans["all"].ops, strict=True))
    for wrong in ({"importance": "size"}, {"ranks": "third"}, {"quantile": 2.0}, {"protect": -1.0}, {"rank": "all"}):
        with pytest.raises(RecipeError):
            methods.make_plan("odp", stats, model.layout, **wrong)
    with pytest.raises(RecipeError, match="drops none"):
        methods.make_plan("odp", stats, model.layout, keep=0.5)


def test_one_expert_a_token_leaves_nothing_to_do(opened):
    model = opened("zaya")
    stats = measure(model, dataset(batch(0, 20), batch(1, 4)), groups=["routing", "scores"], dtype=torch.float32)
    with pytest.raises(PlanError, match="nothing to do"):
        methods.make_plan("odp", stats, model.layout)


# ---- live


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_below_beta_are_gone_and_the_rest_keeps_their_sum(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, plain = routed(view)
    first = model.layout.routed[0]
    old = plain[first.index]
    beta = float((old.weights.amin(-1) / old.weights.amax(-1)).median())
    after, calls = routed(view, plan_of(model, beta=beta, importance="none"))
    new = calls[first.index]
    old_ids, new_ids = (x.ids.sort(-1).values for x in (old, new))
    order = old.ids.argsort(-1)
    weights = old.weights.gather(-1, order)
    runs = weights >= beta * weights.amax(-1, keepdim=True)
    assert 0 < int((~runs).sum()) < runs.numel() / 2
    scale = weights.sum(-1, keepdim=True) / (weights * runs).sum(-1, keepdim=True)
    expected = weights * runs * (scale if first.router.renormalised else 1.0)
    found = torch.zeros_like(expected)
    for token in range(len(new.ids)):
        for place in range(new.ids.shape[1]):
            hit = (old_ids[token] == new.ids[token, place]).nonzero()
            if len(hit):
                found[token, hit[0, 0]] = new.weights[token, place]
    assert torch.allclose(found, expected, atol=1e-5)
    if first.router.weighs_input:
        assert float((new.weights > 0).sum()) == float(runs.sum())
    else:
        assert torch.equal(new_ids == first.num_experts, (~runs).sort(-1).values)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(routed(view)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 1.0, "protect": 1.0, "importance": "norm"}])
def test_no_threshold_or_all_protected_changes_nothing(opened, family, settings):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, _ = routed(view)
    assert torch.allclose(routed(view, plan_of(model, **settings))[0], before, atol=1e-5)


def test_what_is_not_run_is_not_computed(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)

    class Rows(Observer):
        wants_outputs = True
        rows = 0

        def expert(self, _call, rows):
            self.rows += len(rows.output)

    seen = Rows()
    with live(view, plan_of(model, beta=1.0, importance="none")), view.watch(seen), torch.inference_mode():
        view.model(**zoo.inputs("mixtral"), use_cache=False)
    assert seen.rows == 2 * 12 * len(model.layout.routed)  # one expert a token


def by_hand(attention: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    out = torch.zeros(attention.shape[0], attention.shape[-1])
    for row, length in enumerate(lengths):
        for token in range(length):
            queries = range(token, length)
            out[row, token] = sum(float(attention[row, :, q, token].mean()) for q in queries) / len(queries)
    return out


def test_attention_received_is_the_mean_over_later_queries():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 7, 7, generator=generator).tril()
    lengths = [7, 4]
    real = torch.arange(7) < torch.tensor(lengths)[:, None]
    found = received(attention, real)
    assert torch.allclose(found.where(real, 0), by_hand(attention, lengths), atol=1e-6)


@pytest.mark.parametrize("importance", ["norm", "attention"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_the_most_important_tokens_run_all_their_experts(opened, family, importance):
    """Against importance taken by hand from the stock model's own attention."""
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    view.model.set_attn_implementation("eager")
    layer = model.layout.routed[0]
    with torch.inference_mode():
        out = view.model(**zoo.inputs(family), use_cache=False, output_attentions=True)
    hidden = routed(view)[1][layer.index].hidden.float().abs().sum(-1).view(2, 12)
    if importance == "attention" and family != "qwen3_next":  # its first layers have linear attention
        hidden = hidden * by_hand(out.attentions[layer.index], [12, 12])
    kept = set()
    for row in range(2):
        kept |= {12 * row + int(token) for token in hidden[row].topk(3).indices}
    plan = plan_of(model, beta=1.0, protect=0.25, importance=importance)
    call = routed(view, plan)[1][layer.index]
    runs = (call.ids < layer.num_experts).sum(-1)
    assert {int(x) for x in (runs == layer.top_k).nonzero()} == kept
    assert set(runs.tolist()) == {1, layer.top_k}
    assert view.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("importance", ["norm", "attention"])
def test_streamed_or_in_memory_padded_or_not(opened, importance):
    model = opened("mixtral")
    plan = plan_of(model, beta=0.9, protect=0.2, importance=importance)
    part = batch(0, 20, 11)
    wide = Batch(
        0, torch.nn.functional.pad(part.ids, (0, 6), value=9), torch.nn.functional.pad(part.mask, (0, 6), value=False)
    )
    (streamed,) = logits_of(Subject(model, plan), [part], torch.float32)
    (padded,) = logits_of(Subject(model, plan), [wide], torch.float32)
    assert torch.allclose(padded[:, :20][part.mask], streamed[part.mask], atol=1e-4)
    view = MoEView(model.load(torch.float32), model.layout)
    with live(view, plan), view.at(Tokens.of(2, 20, mask=part.mask)), torch.inference_mode():
        whole = view.model(input_ids=part.ids, use_cache=False).logits
    assert torch.allclose(whole[part.mask], streamed[part.mask], atol=1e-4)


def test_a_token_that_runs_alone_is_not_protected(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)
    plan = plan_of(model, beta=1.0, protect=0.5)
    calls = Calls()
    with live(view, plan), torch.inference_mode():
        out = view.model(**zoo.inputs("mixtral"), use_cache=True)
        with view.watch(calls):
            view.model(input_ids=torch.tensor([[5], [7]]), past_key_values=out.past_key_values, use_cache=True)
    assert all((call.ids < 8).sum(-1).tolist() == [1, 1] for call in calls.last.values())


# ---- as a plan


def test_no_file_holds_it(opened, tmp_path):
    model = opened("mixtral")
    plan = plan_of(model, beta=0.5)
    assert plan.kind == "live"
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    with pytest.raises(PlanError, match="decided for each token"):
        bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    for ops, message in (([plan.ops[0]] * 2, "twice"), ([Odp(layer=9, beta=0.5)], "no MoE layer")):
        with pytest.raises(PlanError, match=message):
            plan.model_copy(update={"ops": ops}).check(model.layout)


def test_evaluation_counts_the_experts_that_run(opened):
    model = opened("mixtral")
    data = dataset(batch(0, 30, 12), batch(1, 25))
    every = evaluate(Subject(model, plan_of(model, beta=0.0)), data, against=model, dtype=torch.float32)
    one = evaluate(Subject(model, plan_of(model, beta=1.0, importance="none")), data, against=model)
    assert [x.active_experts for x in every.domains.values()] == [2.0, 2.0]
    assert [x.active_experts for x in one.domains.values()] == [1.0, 1.0]
    assert all(abs(x.kl.value) < 1e-6 for x in every.domains.values())
    assert all(x.kl.value > 1e-3 for x in one.domains.values())
    assert evaluate(model, data).domains["code"].active_experts is None


def test_eval_applies_a_plan(tmp_path, capfd):
    model = moekit.open("refmoe")
    plan_of(model, beta=0.3, importance="norm").save(tmp_path / "odp.json")
    text = moekit.refmoe.texts()["json"]
    command = ["eval", "refmoe", "--data", f"json={text}", "--tokens", "512", "--plan", str(tmp_path / "odp.json")]
    assert main([*command, "--json"]) == 0
    (score,) = json.loads(capfd.readouterr().out)["domains"].values()
    assert 1 < score["active_experts"] < 4
    assert score["kl"][0] > 0
    assert main(command) == 0
    assert "experts a token" in " ".join(capfd.readouterr().out.split())


def test_the_command_line_writes_a_plan_that_eval_applies(talker, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    job = ["compress", str(talker), "--method", "odp", "--data", "code=code.txt", "--tokens", "512"]
    assert main([*job, "--plan", "odp.json", "--option", "quantile=0.9"]) == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == ["code.txt", "odp.json"]
    plan = Plan.load(tmp_path / "odp.json")
    assert (plan.kind, plan.settings["quantile"]) == ("live", 0.9)
    evaluated = ["eval", str(talker), "--plan", "odp.json", "--data", "code=code.txt", "--tokens", "512", "--json"]
    capsys.readouterr()
    assert main(evaluated) == 0
    assert json.loads(capsys.readouterr().out)["domains"]["code"]["active_experts"] < 2
    assert main([*job, "--out", "out"]) == 2  # no file holds it
    assert "--plan FILE" in capsys.readouterr().err
    for method in ("mone", "gptq-int4"):
        keep = ["--keep", "0.5"] if method == "mone" else []
        assert main([*job[:3], method, *job[4:], *keep, "--plan", "other.json"]) == 2
        assert "cannot be one file" in capsys.readouterr().err
    assert not (tmp_path / "other.json").exists()
