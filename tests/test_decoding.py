"""Decoding by several passes: the arithmetic by hand, every row of a batch as if alone, every family's router."""

from __future__ import annotations

import json
import math

import pytest
import torch

import moekit
from family_proofs import Specimen, run
from moekit.apply.live import live
from moekit.data import load_tokenizer
from moekit.decoding.formulas import emulated, guided, plausible, self_contrast
from moekit.decoding.loop import Branch, Runner, decode
from moekit.decoding.methods import Voice, emulation, greedy, guidance, scmoe
from moekit.decoding.vocabulary import check_same_vocabulary
from moekit.decoding.weak import Weak, weakened
from moekit.errors import DataError, ModelError, PlanError, RecipeError
from moekit.families.seam import Observer
from moekit.families.tokens import Tokens
from moekit.plans import Plan, Steer
from moekit.serve.sampling import Sampling
from moekit.view import MoEView
from tiny import save_talker

FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "zaya", "phimoe", "inkling_text")


@pytest.fixture(scope="module")
def model():
    return moekit.open("refmoe")


@pytest.fixture(scope="module")
def stock(model):
    return model.load(torch.float32)


@pytest.fixture(scope="module")
def prompts(model):
    tokenizer = load_tokenizer(model.path)
    return [tokenizer(x).input_ids for x in ("In the beginning", "def main(self):\n    return", "12 + 30 =")]


# ---- the arithmetic


def test_self_contrast_by_hand():
    strong = torch.log(torch.tensor([[0.5, 0.4, 0.06, 0.04]]))
    weak = torch.log(torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    scores = self_contrast(strong, weak, alpha=0.1, beta=0.5)
    expected = [1.5 * math.log(p) - 0.5 * math.log(q) for p, q in ((0.5, 0.7), (0.4, 0.1), (0.06, 0.1))]
    assert torch.allclose(scores[0, :3], torch.tensor(expected))
    assert scores[0, 3] == -math.inf  # 0.04 < 0.1 * 0.5
    assert int(scores.argmax()) == 1
    assert torch.equal(self_contrast(strong, weak, 0.0, 0.0), strong)


def test_every_token_is_plausible_at_zero_and_the_best_at_one():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert plausible(logits, 0).all()
    assert plausible(logits, 1).tolist() == [[False, True, False]]


def test_guidance_and_emulation_by_hand():
    base, plus, minus = (torch.tensor([x]) for x in ([1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 0.0]))
    assert guided(base, plus, minus, 2.0).tolist() == [[-1.0, 4.0, 6.0]]
    assert guided(base, plus, minus, 2.0, alpha=0.5).tolist() == [[-math.inf, 4.0, -math.inf]]
    together = emulated(base, plus, minus).softmax(-1)
    by_hand = base.softmax(-1) * plus.softmax(-1) / minus.softmax(-1)
    assert torch.allclose(together, by_hand / by_hand.sum())


# ---- the loop


def generated(stock, prompt, count):
    ids = torch.tensor([prompt])
    out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return [x for x in out[0, len(prompt) :].tolist() if x not in (0,)]


def test_greedy_is_generate_in_any_batch(model, stock, prompts):
    wanted = [generated(stock, prompt, 12) for prompt in prompts]
    for size in (1, 2, 3):
        made = greedy((stock, model.layout))
        assert decode(made.runners, prompts, made.combine, max_new_tokens=12, batch_size=size) == wanted


def test_a_text_ends_at_its_end_and_where_it_is_told(model, stock, prompts):
    runner = Runner(stock, model.layout)
    (end,) = runner.ends
    scores = torch.zeros(1, model.layout.vocab_size)
    scores[0, end] = 1
    assert decode([runner], prompts[:1], lambda _: scores, max_new_tokens=5) == [[]]
    assert len(decode([runner], prompts[:1], max_new_tokens=5, finished=lambda ids: len(ids) == 2)[0]) == 2


def test_draws_do_not_depend_on_the_batch(model, stock, prompts):
    settings = Sampling(temperature=1.0, seed=3)
    one, three = (
        decode([Runner(stock, model.layout)], prompts, max_new_tokens=6, sampling=settings, batch_size=size)
        for size in (1, 3)
    )
    assert one == three
    assert one != decode([Runner(stock, model.layout)], prompts, max_new_tokens=6)


@pytest.mark.parametrize(("given", "settings"), [([], {}), ([[]], {}), ([[5]], {"max_new_tokens": 0})])
def test_nothing_to_continue(model, stock, given, settings):
    with pytest.raises(DataError):
        decode([Runner(stock, model.layout)], given, **settings)


# ---- SCMoE


class Seen(Observer):
    def __init__(self):
        self.calls = {}

    def routed(self, call):
        self.calls[call.layer.index] = call.ids.clone(), call.weights.clone(), call.logits.clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_strong_rows_stay_and_weak_rows_run_the_expert_of_a_rank(family, tmp_path):
    specimen = Specimen(family, tmp_path)
    layout, stock = specimen.layout, specimen.stock
    ids = specimen.batch["input_ids"]
    view, rows = MoEView(stock, layout), len(ids)
    tokens = Tokens.of(2 * rows, ids.shape[1], tags=torch.arange(2).repeat_interleave(rows))
    seen = Seen()
    with torch.no_grad(), weakened(view, Weak("rank", 3), 1), view.watch(seen), view.at(tokens):
        logits = stock(input_ids=ids.repeat(2, 1), use_cache=False).logits
    assert torch.allclose(logits[:rows], specimen.logits, atol=1e-5)
    assert (logits[rows:] - specimen.logits).abs().max() > 1e-3
    half = ids.numel()
    for index, (chosen, weights, raw) in seen.calls.items():
        layer = layout.by_index[index]
        third = raw[half:].float().topk(3).indices[:, 2]
        running = weights[half:] != 0
        if layer.router.weighs_input:  # of Llama 4, only what is not zero is listed
            assert torch.equal(chosen[half:, 0], third)
        else:
            assert (running.sum(-1) == 1).all()
            assert torch.equal(chosen[half:][running], third)
            assert (chosen[half:][~running] == layer.num_experts).all()
        if layer.router.renormalised and not layer.router.expert_scale:
            assert torch.allclose(weights[half:].sum(-1), torch.full((half,), layer.router.scaling), atol=1e-4)
    assert torch.equal(run(stock, specimen.batch), specimen.logits)


@pytest.mark.parametrize("rule", ["rank:3", "random", "top-1", "fewer:2"])
def test_the_weak_pass_in_the_batch_is_the_weak_pass_alone(model, stock, prompts, rule):
    weak = Weak.parse(rule, seed=1)
    if rule != "random":  # whose draws are in the order of rows
        alone = Runner(stock, model.layout, [Branch(lambda view, tag: weakened(view, weak, tag))])
        (both,) = scmoe((stock, model.layout), weak).runners
        with torch.no_grad(), alone.changed():
            wanted = [alone.start(prompts)[0], alone.step(torch.tensor([5, 6, 7]))[0]]
        with torch.no_grad(), both.changed():
            found = [both.start(prompts)[1], both.step(torch.tensor([5, 6, 7]))[1]]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, found, strict=True))
    made = scmoe((stock, model.layout), weak, beta=0.0)
    plain = decode([Runner(stock, model.layout)], prompts, max_new_tokens=6)
    assert decode(made.runners, prompts, made.combine, max_new_tokens=6) == plain
    made = scmoe((stock, model.layout), weak, beta=4.0)
    assert decode(made.runners, prompts, made.combine, max_new_tokens=6) != plain


def test_what_an_unnormalised_expert_weighs_is_its_score(tmp_path):
    specimen = Specimen("olmoe", tmp_path)
    view, seen = MoEView(specimen.stock, specimen.layout), Seen()
    tokens = Tokens.of(*specimen.batch["input_ids"].shape, tags=torch.zeros(len(specimen.batch["input_ids"])))
    with torch.no_grad(), weakened(view, Weak("rank", 2), 0), view.watch(seen), view.at(tokens):
        specimen.stock(**specimen.batch, use_cache=False)
    for _, weights, raw in seen.calls.values():
        assert torch.allclose(weights[:, 0], raw.softmax(-1).sort(-1, descending=True).values[:, 1], atol=1e-6)


@pytest.mark.parametrize("rule", ["rank:0", "rank", "fewer:x", "worst"])
def test_no_such_weak_pass(rule):
    with pytest.raises(RecipeError, match="weak pass"):
        Weak.parse(rule)


def test_more_than_there_is(model, stock):
    for rule in ("rank:33", "fewer:5"):
        with pytest.raises(RecipeError, match="more than there is"):
            scmoe((stock, model.layout), Weak.parse(rule))
    with pytest.raises(RecipeError, match="share"):
        scmoe((stock, model.layout), Weak("rank", 3), alpha=1.5)


# ---- guidance and emulation


def plan_of(model, expert, action):
    return Plan(layout_hash=model.layout.hash, ops=[Steer(layer=3, expert=expert, action=action)])


def test_voices_of_one_batch_are_plans_applied_alone(model, stock, prompts):
    plans = plan_of(model, 5, "force"), plan_of(model, 6, "ban")
    loaded = stock, model.layout
    made = guidance(loaded, Voice(plan=plans[0]), Voice(plan=plans[1], before=(9, 8)), strength=0.7)
    (runner,) = made.runners
    with torch.no_grad(), runner.changed():
        found = made.combine(runner.start(prompts[:1]))
    wanted = []
    for plan, ids in ((None, prompts[0]), (plans[0], prompts[0]), (plans[1], [9, 8, *prompts[0]])):
        view = MoEView(stock, model.layout)
        with torch.no_grad(), live(view, plan or Plan(layout_hash=model.layout.hash, ops=[])):
            wanted.append(stock(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1])
    assert torch.allclose(found, wanted[0] + 0.7 * (wanted[1] - wanted[2]), atol=1e-3)


def test_models_that_agree_change_nothing(model, stock, prompts):
    loaded = stock, model.layout
    plain = decode([Runner(*loaded)], prompts, max_new_tokens=5)
    for made in (emulation(loaded, loaded, loaded), guidance(loaded, Voice(model=loaded), Voice(), strength=3.0)):
        assert decode(made.runners, prompts, made.combine, max_new_tokens=5) == plain
    assert len(emulation(loaded, loaded, loaded).runners) == 3
    assert [len(x.branches) for x in guidance(loaded, Voice(), Voice(before=(5,))).runners] == [2]


def test_guidance_needs_plans_that_steer(model, stock):
    with pytest.raises(PlanError):
        guidance((stock, model.layout), Voice(plan=plan_of(model, 99, "ban")), Voice())


def test_vocabularies_are_compared_before_loading(model, tmp_path):
    folder = save_talker(tmp_path / "other")
    other = moekit.open(folder)
    check_same_vocabulary([model, other])
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match="same vocabulary"):
        check_same_vocabulary([model, moekit.open(folder)])
