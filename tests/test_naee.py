"""Errors of sets of experts are what a live ban gives, for every kind of router; naee keeps the best set."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

import moekit
from moekit import methods, subsets
from moekit.errors import DataError, PlanError, RecipeError
from moekit.families.seam import Call, Observer
from moekit.measurement import measure
from moekit.plans.counts import subset_members, workable_subsets
from moekit.stats import ALL_GROUPS, GROUPS, LayerStats, Stats
from moekit.view import MoEView
from tiny import batch, dataset

DATA = dataset(batch(0, 12, 9, 1), batch(0, 7, seed=1), batch(1, 10, 2))
GROUPS_HERE = ("scores", "subsets")
# softmax renormalised; not; correction bias and groups; weights into the input; sparsemixer; biases and clamped units;
# tables from token ids; a null expert; shared experts in the normalisation
ROUTERS = [
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "llama4_text",
    "phimoe",
    "gpt_oss",
    "deepseek_v4",
    "zaya",
    "inkling_text",
]


@pytest.fixture
def every_token(monkeypatch):
    monkeypatch.setattr(subsets, "EVERY", 1)


class Output(Observer):
    """The routed sum of a layer."""

    def finished(self, call: Call, output: torch.Tensor) -> None:
        self.output = output.double()


def banned_output(view, layer, part, gone):
    seen = Output()
    with torch.inference_mode(), view.ban({layer.index: gone}), view.watch(seen, layers=[layer.index]):
        view.model(input_ids=part.ids, use_cache=False)
    return seen.output[part.mask.reshape(-1)]


@pytest.mark.parametrize("family", ROUTERS)
def test_errors_are_those_of_a_live_ban(opened, every_token, family):
    model = opened(family)
    layer = model.layout.routed[0]  # what it is given does not depend on the bans
    found = measure(model, DATA, dtype=torch.float32, groups=GROUPS_HERE).get("subset_error", layer.index)
    view = MoEView(model.load(torch.float32), model.layout)
    full = [banned_output(view, layer, part, ()) for part in DATA.batches]
    sets = workable_subsets(layer)
    assert found[0] == pytest.approx(sum(float(y.square().sum()) for y in full), rel=1e-5)
    assert found[sets[-1]] == 0
    assert sets[-1] == 2**layer.num_experts - 1
    assert not found[sorted(set(range(1, len(found))) - set(sets))].any()
    for subset in np.random.default_rng(0).choice(sets, 15, replace=False).tolist():
        gone = subset_members(~subset, layer)
        pairs = zip(full, DATA.batches, strict=True)
        expected = sum(float((y - banned_output(view, layer, part, gone)).square().sum()) for y, part in pairs)
        assert found[subset] == pytest.approx(expected, rel=1e-4, abs=1e-6 * found[0])


def test_the_set_kept_is_the_best_of_all(opened, every_token):
    model = opened("mixtral")
    stats = measure(model, DATA, dtype=torch.float32, groups=GROUPS_HERE)
    plan = moekit.plan("naee", stats, keep=5, protect="none")
    view = MoEView(model.load(torch.float32), model.layout)
    layer = model.layout.routed[0]
    full = [banned_output(view, layer, part, ()) for part in DATA.batches]

    def error(gone):
        pairs = zip(full, DATA.batches, strict=True)
        return sum(float((y - banned_output(view, layer, part, gone)).square().sum()) for y, part in pairs)

    errors = {gone: error(gone) for gone in combinations(range(8), 3)}
    best = min(errors, key=errors.__getitem__)
    assert plan.ops[0].experts == best
    whole = sum(float(y.square().sum()) for y in full)
    assert plan.measured["lost_output"][str(layer.index)] == pytest.approx((errors[best] / whole) ** 0.5, rel=1e-4)
    assert any(note.startswith("lost output by layer") for note in plan.notes)
    assert {len(plan.kept(x)) for x in model.layout.routed} == {5}


def test_errors_add_up_and_do_not_depend_on_batches(opened, monkeypatch):
    monkeypatch.setattr(subsets, "EVERY", 2)
    model = opened("mixtral")

    def taken(*parts):
        return measure(model, dataset(*parts), dtype=torch.float32, groups=GROUPS_HERE)

    a, b, c = batch(0, 12, 9), batch(0, 8, 8, seed=1), batch(1, 10, 2)
    both, together = taken(a, c) + taken(b), taken(a, b, c)
    alone = [batch(0, 12, 9), batch(0, 8, 8, seed=1)]
    rows = [type(a)(0, x.ids[i : i + 1], x.mask[i : i + 1]) for x in alone for i in range(2)]
    for index, layer in together.layers.items():
        scale = layer.arrays["subset_error"].max()
        assert scale > 0
        for other in (both, taken(*rows, c)):
            found = other.layers[index].arrays["subset_error"]
            np.testing.assert_allclose(found, layer.arrays["subset_error"], 1e-5, 1e-5 * scale)


def test_about_one_token_in_eight_is_looked_at():
    part = batch(0, *[60] * 100)
    chosen = subsets.sampled(part)
    assert 0.1 < len(chosen) / part.mask.sum() < 0.15
    assert part.positions.reshape(-1)[chosen].float().mean() == pytest.approx(29.5, abs=3)
    hidden = batch(0, 3, 60)
    assert part.mask.shape == (100, 60)
    assert (hidden.mask.reshape(-1)[subsets.sampled(hidden)]).all()


def test_only_who_asks_pays(opened):
    assert "subsets" not in GROUPS
    assert "subsets" in ALL_GROUPS
    assert methods.get("naee").groups == ("scores", "subsets")
    stats = measure(opened("mixtral"), DATA, dtype=torch.float32)
    assert all("subset_error" not in layer.arrays for layer in stats.layers.values())
    with pytest.raises(DataError, match="subset_error"):
        moekit.plan("naee", stats, keep=0.5)


def given(model, errors, peaks=None):
    """Statistics that say nothing but errors of sets, and the first layer's peaks."""
    layers = {}
    for layer in model.layout.routed:
        ones = np.ones((2, layer.num_experts))
        arrays = {name: ones for name in ("count", "gate_mass", "peak")} | {"subset_error": errors}
        first = layer is model.layout.routed[0]
        layers[layer.index] = LayerStats(arrays | ({"peak": peaks} if first and peaks is not None else {}))
    counts = np.array([1000, 1000])
    return Stats(model.layout.hash, ("code", "prose"), counts, counts // 10, layers, {"layout": model.layout.to_dict()})


def test_domains_and_protection(opened):
    model = opened("mixtral")
    errors = np.full((2, 256), 10.0)
    errors[0, 0b00001111], errors[1, 0b11110000] = 1.0, 2.0
    errors[:, 0] = 100.0
    stats = given(model, errors)

    def kept(**settings):
        plan = moekit.plan("naee", stats, keep=4, **settings)
        return {plan.kept(layer) for layer in model.layout.routed}, plan

    assert kept(protect="none", domain="code")[0] == {(0, 1, 2, 3)}
    assert kept(protect="none", domain="prose")[0] == {(4, 5, 6, 7)}
    together, plan = kept(protect="none")
    assert together == {(0, 1, 2, 3)}  # 1 + 10 against 10 + 2
    assert plan.measured["lost_output"]["0"] == pytest.approx((11 / 200) ** 0.5)
    peaks = np.ones((2, 8))
    peaks[:, 6] = 1000.0
    stats = given(model, errors, peaks)
    plan = moekit.plan("naee", stats, keep=4)
    assert plan.kept(model.layout.routed[0]) == (4, 5, 6, 7)


def test_groups_stay_even(opened):
    model = opened("deepseek_v3")
    errors = np.full((2, 256), 10.0)
    errors[:, 0b00001111] = 1.0  # all of one group
    plan = moekit.plan("naee", given(model, errors), keep=4, protect="none")
    for layer in model.layout.routed:
        assert sum(e < 4 for e in plan.kept(layer)) == 2


def test_large_layers_and_global_spreads_are_refused(opened):
    model = moekit.open("refmoe")
    with pytest.raises(PlanError, match=r"2\^32") as refused:
        methods.check_layout(methods.get("naee"), model.layout)
    assert "easy-ep" in refused.value.fix
    assert "and 5 more" in refused.value.where
    with pytest.raises(RecipeError, match="one layer"):
        moekit.plan("naee", given(opened("mixtral"), np.ones((2, 256))), keep=4, spread="global")
    stats = measure(model, dataset(batch(0, 5), batch(1, 5)), groups=GROUPS_HERE)
    assert all("subset_error" not in layer.arrays for layer in stats.layers.values())
