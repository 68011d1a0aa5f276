"""A plan in the budgeted engine is the plan in stock transformers: generation, cache, scopes, few experts in memory."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import moekit
from moekit.apply.live import live
from moekit.apply.steer import steering
from moekit.families.tokens import Tokens
from moekit.plans import Plan, Scope, Steer
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.view import MoEView
from test_steering import Chosen


@pytest.fixture(scope="module")
def model():
    return moekit.open("refmoe")


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    store = tmp_path_factory.mktemp("steer") / "store"
    pack(model, store)
    engine = Engine(store, context=128)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def stock(model):
    loaded = model.load(torch.bfloat16)
    loaded.set_experts_implementation("eager")
    return loaded


PLANS = {
    "all tokens": [
        {"layer": 1, "expert": 3, "action": "ban"},
        {"layer": 2, "expert": 5, "action": "bias", "strength": 3.0},
        {"layer": 3, "expert": 7, "action": "scale", "strength": 0.0, "renormalise": True},
        {"layer": 4, "expert": 9, "action": "swap", "partner": 10},
    ],
    "a part": [
        {"layer": 1, "expert": 3, "action": "force", "scope": Scope(part="generated")},
        {"layer": 2, "expert": 5, "action": "ban", "scope": Scope(part="prompt")},
        {"layer": 3, "expert": 7, "action": "scale", "strength": 4.0, "scope": Scope(part="span", start=8)},
    ],
}


@pytest.mark.parametrize("name", PLANS)
def test_the_engine_writes_what_stock_writes_under_the_same_plan(model, engine, stock, name):
    plan = Plan(layout_hash=model.layout.hash, ops=[Steer(**op) for op in PLANS[name]])
    ids = torch.randint(model.layout.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
    with live(MoEView(stock, model.layout), plan):
        wanted = stock.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[0, 12:].tolist()
    with live(MoEView(engine.model, engine.layout), plan):
        steered = list(engine.stream(ids[0].tolist(), 10))
    plain = list(engine.stream(ids[0].tolist(), 10))
    assert steered == wanted[: len(steered)]
    assert len(steered) > 3
    untouched = stock.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[0, 12:].tolist()
    assert plain == untouched[: len(plain)], "the plan has left a trace"
    assert steered != plain


def test_a_batch_with_padding_is_each_row_alone(model):
    plan = Plan(layout_hash=model.layout.hash, ops=[Steer(**op) for op in PLANS["a part"]])
    stock = model.load(torch.float32)
    rows = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [21, 22, 23, 24]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with live(MoEView(stock, model.layout), plan):
        together = stock.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        alone = [stock.generate(torch.tensor([x]), max_new_tokens=6, min_new_tokens=6, do_sample=False) for x in rows]
    for row, one in zip(together, alone, strict=True):
        assert row[width:].tolist() == one[0, -6:].tolist()


def test_a_hundred_plans_for_parts_of_a_batch(model):
    """Each of many texts has its own plan, as requests to a server have."""
    stock, layer = model.load(torch.float32), model.layout.routed[0].index
    view = MoEView(stock, model.layout)
    ids = torch.randint(model.layout.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    tokens = Tokens.of(2, 6, tags=torch.tensor([99, 7]))
    with ExitStack() as stack, torch.no_grad():
        for tag in range(100):
            op = Steer(layer=layer, expert=tag % 32, action="force" if tag == 99 else "ban")
            stack.enter_context(steering(view, [op], tag=tag))
        stack.enter_context(view.watch(seen := Chosen()))
        stack.enter_context(view.at(tokens))
        stock(input_ids=ids, use_cache=False)
    chosen = seen.ids[layer][0].view(2, 6, -1)
    assert (chosen[0] == 99 % 32).any(-1).all()
    assert not (chosen[1] == 7).any()
