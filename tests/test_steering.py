"""Steering plans: refused where routers cannot follow, the same in memory, streamed and generating, gone afterwards."""

from __future__ import annotations

import pytest
import torch

import moekit
from moekit.apply.bake import bake
from moekit.apply.live import live
from moekit.apply.steer import steering
from moekit.data import Batch
from moekit.errors import ModelError, PlanError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.seam import Observer
from moekit.families.tokens import Tokens
from moekit.plans import Plan, Scope, Steer
from moekit.view import MoEView

GENERATED, PROMPT = Scope(part="generated"), Scope(part="prompt")


@pytest.fixture(scope="module")
def model():
    return moekit.open("refmoe")


@pytest.fixture(scope="module")
def stock(model):
    return model.load(torch.float32)


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(model.layout.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))


def plan_of(model, *ops):
    return Plan(layout_hash=model.layout.hash, ops=list(ops))


class Chosen(Observer):
    """The experts that each forward chose, by layer, in order."""

    def __init__(self):
        self.ids = {}

    def routed(self, call):
        self.ids.setdefault(call.layer.index, []).append(call.ids.clone())


def mixed(model):
    """One op of every kind, on different parts of the text."""
    first, second, third, last = (model.layout.routed[i].index for i in (0, 1, 2, -1))
    return plan_of(
        model,
        Steer(layer=first, expert=3, action="force", scope=GENERATED),
        Steer(layer=first, expert=4, action="ban", scope=PROMPT),
        Steer(layer=second, expert=5, action="bias", strength=2.5),
        Steer(layer=third, expert=6, action="scale", strength=0.0, renormalise=True, scope=Scope(part="span", start=9)),
        Steer(layer=third, expert=7, action="scale", strength=3.0),
        Steer(layer=last, expert=0, action="swap", partner=9, scope=GENERATED),
    )


def test_ops_survive_json(tmp_path, model):
    plan = mixed(model)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.kind == "steer"
    assert Plan.load(tmp_path / "plan.json").steers() == plan.ops


def test_streamed_is_in_memory(model, stock, ids):
    plan, prompt = mixed(model), 12
    batch = Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))
    (streamed,) = logits_of(Subject(model, plan, prompt), [batch], torch.float32)
    view = MoEView(stock, model.layout)
    with live(view, plan), view.at(Tokens.of(*ids.shape, prompt=prompt)), torch.no_grad():
        inside = stock(input_ids=ids, use_cache=False).logits
    assert torch.allclose(streamed, inside, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(stock(input_ids=ids, use_cache=False).logits, inside, atol=1e-2)


def test_generating_with_a_cache_is_reading_what_was_written(model, stock, ids):
    plan = mixed(model)
    view = MoEView(stock, model.layout)
    with live(view, plan):
        out = stock.generate(
            ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    written = Batch(0, out.sequences, torch.ones_like(out.sequences, dtype=torch.bool))
    (read,) = logits_of(Subject(model, plan, ids.shape[1]), [written], torch.float32)
    told = torch.stack(out.scores, 1)
    read = read[:, ids.shape[1] - 1 : -1]
    finite = told.isfinite()  # generate suppresses the end of the text until it is long enough
    assert torch.allclose(told[finite], read[finite], atol=1e-3)


@pytest.mark.parametrize("renormalise", [False, True])
def test_weights_of_few_tokens_are_those_of_many(model, stock, renormalise):
    """Tokens that are written one by one take a quicker way than those of a prompt; an emptied token among them."""
    layer = model.layout.routed[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(layer.num_experts, generator=generator)[: layer.top_k] for _ in range(40)])
    weights, hidden = torch.rand(ids.shape, generator=generator), torch.randn(40, layer.width, generator=generator)
    factors = {expert: 0.25 * number for number, expert in enumerate([*ids[0].tolist(), 1, 2])} | dict.fromkeys(
        ids[3].tolist(), 0.0
    )
    view = MoEView(stock, model.layout)
    experts = view.experts(layer.index)
    with view.scale({layer.index: factors}, renormalise=renormalise), torch.inference_mode():
        together = experts(hidden, ids, weights)
        alone = torch.cat([experts(hidden[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(40)])
    assert torch.allclose(together, alone, atol=1e-5)
    with torch.inference_mode():
        assert not torch.allclose(together, experts(hidden, ids, weights), atol=1e-2)


def test_padding_on_the_left_has_no_place(model, stock, ids):
    layer = model.layout.routed[0].index
    plan = plan_of(model, Steer(layer=layer, expert=3, action="force", scope=Scope(part="span", end=4)))
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(3, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    view, seen = MoEView(stock, model.layout), Chosen()
    with live(view, plan), view.watch(seen), torch.no_grad():
        stock(input_ids=padded, attention_mask=mask, use_cache=False)
    (chosen,) = seen.ids[layer]
    forced = (chosen == 3).any(-1).view(3, -1)
    assert forced[:, 5:9].all()
    with view.watch(plain := Chosen()), torch.no_grad():
        stock(input_ids=padded, attention_mask=mask, use_cache=False)
    assert torch.equal(forced[:, 9:], (plain.ids[layer][0] == 3).any(-1).view(3, -1)[:, 9:])


def test_each_text_of_a_batch_may_have_a_plan_of_its_own(model, stock, ids):
    layer = model.layout.routed[0].index
    view = MoEView(stock, model.layout)
    force = [Steer(layer=layer, expert=3, action="force")]
    ban = [Steer(layer=layer, expert=3, action="ban")]
    seen = Chosen()
    tokens = Tokens.of(*ids.shape, tags=torch.tensor([1, 0, 2]))
    with steering(view, force, tag=1), steering(view, ban, tag=2), view.watch(seen), view.at(tokens), torch.no_grad():
        stock(input_ids=ids, use_cache=False)
    with view.watch(plain := Chosen()), torch.no_grad():
        stock(input_ids=ids, use_cache=False)
    used = (seen.ids[layer][0] == 3).any(-1).view(ids.shape)
    assert used[0].all()
    assert torch.equal(used[1], (plain.ids[layer][0] == 3).any(-1).view(ids.shape)[1])
    assert not used[2].any()


def test_a_part_of_the_text_needs_to_be_known(model, stock, ids):
    plan = plan_of(model, Steer(layer=model.layout.routed[0].index, expert=3, action="ban", scope=GENERATED))
    embedded = stock.get_input_embeddings()(ids)
    view = MoEView(stock, model.layout)
    with live(view, plan), view.at(Tokens.of(1, 2)), pytest.raises(ModelError, match="not known which tokens"):
        stock(inputs_embeds=embedded, use_cache=False)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([{"expert": 99, "action": "ban"}], "no such expert"),
        ([{"expert": -1, "action": "ban"}], "no such expert"),
        ([{"layer": 99, "expert": 0, "action": "ban"}], "no MoE layer"),
        ([{"expert": e, "action": "force"} for e in range(5)], "more than that cannot be forced"),
        ([{"expert": e, "action": "ban"} for e in range(29)], "needs 4 experts"),
        ([{"expert": 1, "action": "ban"}, {"expert": 1, "action": "force"}], "banned and forced"),
        ([{"expert": 1, "action": "swap"}], "needs another expert"),
        ([{"expert": 1, "action": "swap", "partner": 1}], "needs another expert"),
        ([{"expert": 1, "action": "ban", "partner": 2}], "only a swap"),
        ([{"expert": 1, "action": "ban", "scope": {"part": "span", "start": 4, "end": 4}}], "end behind its start"),
    ],
)
def test_what_routers_cannot_follow_is_refused(model, ops, message):
    made = [Steer(**({"layer": model.layout.routed[0].index} | op)) for op in ops]
    with pytest.raises(PlanError, match=message):
        plan_of(model, *made).check(model.layout)


def test_parts_that_never_meet_do_not_contradict(model):
    layer = model.layout.routed[0].index
    half = [Steer(layer=layer, expert=e, action="force", scope=PROMPT) for e in range(4)]
    rest = [Steer(layer=layer, expert=e, action="force", scope=GENERATED) for e in range(4, 8)]
    bans = [Steer(layer=layer, expert=e, action="ban", scope=GENERATED) for e in range(4)]
    plan_of(model, *half, *rest, *bans).check(model.layout)


def test_no_checkpoint_holds_steering(tmp_path, model):
    with pytest.raises(PlanError, match="steer bake"):
        bake(model.checkpoint, model.understanding, mixed(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
