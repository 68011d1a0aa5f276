"""Lossy knobs: off they change nothing; on they leave out what they say, never a token's first expert, and count it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moekit
import zoo
from moekit.apply.live import live
from moekit.errors import ModelError, PlanError, RecipeError
from moekit.families.model import Model
from moekit.families.resident import empty_cache
from moekit.families.rows import router_rows
from moekit.plans import Odp, Plan
from moekit.serve.cache import ExpertCache, slot_bytes
from moekit.serve.engine import Engine
from moekit.serve.lossy import Losses, Lossy
from moekit.serve.packing import pack
from moekit.serve.policies import policy_named
from moekit.view import MoEView

IDS = torch.randint(3, 4096, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = Engine(pack(moekit.open("refmoe"), tmp_path_factory.mktemp("lossy") / "store"), context=64)
    yield engine
    engine.close()


class Held:
    """A cache that holds some experts, whatever the layer."""

    def __init__(self, *experts):
        self.experts = experts

    def holds(self, _layer, expert):
        return expert in self.experts


def losses_of(engine, **settings):
    return Losses(Lossy(**settings), MoEView(engine.model, engine.layout))


def changed(losses, held, ids, weights):
    """(ids, weights) by a layer with 32 experts whose router normalises; 32: an empty place."""
    return losses.change(0, Held(*held), torch.zeros(len(ids), 8), torch.tensor(ids), torch.tensor(weights))


def test_only_what_is_missing_and_small_is_dropped(engine):
    losses = losses_of(engine, drop=0.8)  # under 0.8 / 4 = 0.2
    ids, weights = changed(losses, [7], [[3, 5, 7, 9]], [[0.5, 0.25, 0.15, 0.1]])
    assert ids.tolist() == [[3, 5, 7, 32]]  # 5 is missing and large, 7 small and there
    assert torch.allclose(weights, torch.tensor([[0.5, 0.25, 0.15, 0.0]]) / 0.9)
    assert (losses.lost.tokens, losses.lost.avoided) == (1, 1)
    assert losses.lost.dropped == pytest.approx(0.1)


def test_an_expert_that_one_token_needs_is_dropped_for_none(engine):
    rows = [[0.5, 0.3, 0.15, 0.05], [0.05, 0.3, 0.15, 0.5]]
    ids, weights = changed(losses_of(engine, drop=1.0), [], [[3, 5, 7, 9], [3, 5, 7, 9]], rows)
    assert ids.tolist() == [[3, 5, 32, 9], [3, 5, 32, 9]]  # 3 and 9 are first experts of one, 5 is above 1/4
    assert torch.allclose(weights.sum(-1), torch.ones(2))


def test_a_first_expert_always_runs(engine):
    for settings in ({"drop": 16.0}, {"adaptive_k": 0.0}):
        ids, weights = changed(losses_of(engine, **settings), [], [[3, 5, 7, 9]], [[0.4, 0.3, 0.2, 0.1]])
        assert ids.tolist() == [[3, 32, 32, 32]]
        assert weights[0, 0] == pytest.approx(1.0)


def test_adaptive_k_keeps_the_fewest_with_the_share(engine):
    losses = losses_of(engine, adaptive_k=0.75)
    ids, _ = changed(losses, range(32), [[3, 5, 7, 9], [9, 5, 7, 3]], [[0.1, 0.5, 0.3, 0.1], [0.8, 0.1, 0.05, 0.05]])
    assert ids.tolist() == [[32, 5, 7, 32], [9, 32, 32, 32]]
    assert losses.lost.dropped == pytest.approx(0.4)
    assert losses.lost.avoided == 0


def test_a_substitute_is_the_most_similar_that_is_there_and_free(engine):
    view = MoEView(engine.model, engine.layout)
    rows = router_rows(view.router(0), engine.layout.by_index[0])
    assert torch.equal(rows, view.router(0).weight.float())
    rows = (rows - rows.mean(0)).numpy()
    near = (rows @ rows[9]) / np.linalg.norm(rows, axis=1)
    held = [3, 5, 11, 20, 30]
    best = max([11, 20, 30], key=lambda e: near[e])  # the token runs 3 and 5 itself
    losses = losses_of(engine, substitute=1.0)
    ids, weights = changed(losses, held, [[3, 5, 7, 9]], [[0.5, 0.1, 0.3, 0.1]])
    assert ids.tolist() == [[3, 5, 7, best]]
    assert weights.tolist() == [pytest.approx([0.5, 0.1, 0.3, 0.1])]
    assert losses.lost.substituted == pytest.approx(0.1)
    ids, _ = changed(losses_of(engine, substitute=1.0), [3, 5], [[3, 5, 7, 9]], [[0.5, 0.1, 0.3, 0.1]])
    assert ids.tolist() == [[3, 5, 7, 32]]  # nobody is free: dropped


def decoded(engine, losses, slots=20):
    """(logits, reads) of tokens one by one, with few experts in memory."""
    cache = ExpertCache(engine.store, slots * slot_bytes(engine.store), policy_named("lru", engine.sizes(slots)))
    for experts in engine._experts.values():
        experts._moekit_cache, experts._moekit_losses = cache, losses
    past = empty_cache(engine.model)
    with torch.inference_mode():
        parts = [engine.model(input_ids=x[None], past_key_values=past, use_cache=True) for x in IDS.split(1)]
    for experts in engine._experts.values():
        experts._moekit_cache, experts._moekit_losses = engine.cache, None
    cache.close()
    return torch.cat([x.logits[0] for x in parts]), sum(cache.counts.misses)


def test_reads_are_avoided_and_counted(engine):
    exact, reads = decoded(engine, None)
    same, all_reads = decoded(engine, losses_of(engine))
    assert torch.equal(same, exact)
    assert all_reads == reads
    for settings in ({"drop": 1.0}, {"substitute": 1.0}, {"adaptive_k": 0.7}):
        losses = losses_of(engine, **settings)
        rough, fewer = decoded(engine, losses)
        assert fewer < 0.8 * reads
        assert not torch.equal(rough, exact)
        assert losses.lost.avoided > 0
        assert losses.lost.tokens == len(IDS) * len(engine.layout.routed)
        assert "router weight left out" in losses.lost.describe()


def test_odp_is_what_the_live_plan_does(engine, tmp_path):
    model = moekit.open("refmoe")
    ops = [Odp(layer=x.index, beta=0.6, importance="norm", protect=0.1) for x in model.layout.routed]
    plan = Plan(layout_hash=model.layout.hash, ops=ops).save(tmp_path / "odp.json")
    losses = losses_of(engine, odp=plan)
    for experts in engine._experts.values():
        experts._moekit_losses = losses
    found = engine.logits(IDS)
    for experts in engine._experts.values():
        experts._moekit_losses = None
    losses.close()
    stock = model.load(torch.bfloat16)
    with live(MoEView(stock, model.layout), Plan.load(plan)), torch.no_grad():
        expected = stock(input_ids=IDS[None]).logits[0]
    assert losses.lost.dropped > 0
    assert (found.float() - expected.float()).abs().max() < 0.02 * expected.float().abs().max()
    with pytest.raises(PlanError, match="prunes nothing"):
        losses_of(engine, odp=Plan(layout_hash=model.layout.hash))


def test_settings_are_read_and_mistakes_named():
    assert Lossy.parse("drop=1.0,adaptive-k=0.9") == Lossy(drop=1.0, adaptive_k=0.9)
    assert Lossy.parse("odp=plan.json, substitute=0.5") == Lossy(odp="plan.json", substitute=0.5)
    with pytest.raises(RecipeError, match="no lossy setting 'dorp'"):
        Lossy.parse("dorp=1")
    with pytest.raises(RecipeError, match="not a number"):
        Lossy.parse("drop=much")
    with pytest.raises(RecipeError, match="impossible setting"):
        Lossy(adaptive_k=1.5)


def test_a_family_without_the_contract_is_refused(tmp_path):
    zoo.build("llama4_text", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    store = pack(Model.open(tmp_path / "model"), tmp_path / "store")
    with pytest.raises(ModelError, match="not made for this family"):
        Engine(store, lossy=Lossy(drop=1.0))
