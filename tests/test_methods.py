"""Pruning methods, their registry and the driver, on synthetic statistics with known answers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moekit import methods
from moekit.errors import DataError, PlanError, RecipeError
from moekit.layout import ExpertId, Layout, MoELayer, Part, Router
from moekit.methods.budget import fewest
from moekit.methods.cold import cold_experts
from moekit.plans import Plan, check_feasible
from moekit.stats import FIELDS, LayerStats, Stats

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods"
DOMAINS = ("code", "prose")
SCORING = [name for name in methods.names("prune") if not methods.get(name).most_experts]
SCORED = [name for name in SCORING if name != "random"]


def make_layout(layers: int = 3, experts: int = 8, top_k: int = 2, mtp: int = 0, **router) -> Layout:
    routers = Router(**{"score": "softmax", "renormalised": True, **router})
    rows = tuple(
        MoELayer(i, f"layers.{i}", "", "", experts, (), experts, top_k, routers, 16, 0, (), 100, mtp=i >= layers)
        for i in range(layers + mtp)
    )
    return Layout("toy", "toy", "Toy", 32, layers, 64, "float32", None, rows, {"experts": Part(1, 1)}, 1, ())


def make_stats(layout: Layout, arrays: dict[int, dict[str, np.ndarray]], tokens=(1000, 1000), **manifest) -> Stats:
    """Statistics from arrays [N, E] by layer; quantities not given are positive and alike for all experts."""
    layers = {}
    for layer in layout.routed:
        shape = (len(DOMAINS), layer.num_experts)
        given = {name: np.asarray(x, float) for name, x in arrays.get(layer.index, {}).items()}
        scores = {name: np.ones(shape) for name, (group, _, _) in FIELDS.items() if group == "scores"}
        layers[layer.index] = LayerStats(scores | given)
    counts = np.array(tokens, np.int64)
    return Stats(layout.hash, DOMAINS, counts, counts // 100, layers, manifest)


@dataclass
class Tokens:
    """One domain's tokens in one layer: what each chose, with which router weights and output norms, its change s."""

    ids: np.ndarray  # [T, K], and so the next two
    gates: np.ndarray
    norms: np.ndarray
    change: np.ndarray  # [T]

    @classmethod
    def draw(cls, layer: MoELayer, rng: np.random.Generator, tokens: int = 60) -> Tokens:
        usable = layer.num_experts - 1  # the last expert stays cold
        ids = np.array([rng.choice(usable, layer.top_k, replace=False) for _ in range(tokens)])
        return cls(ids, rng.random(ids.shape), rng.gamma(2.0, size=ids.shape), rng.random(tokens))

    def sums(self, experts: int) -> dict[str, np.ndarray]:
        pairs = {
            "count": np.ones_like(self.gates),
            "gate_mass": self.gates,
            "norm": self.norms,
            "norm_sq": self.norms**2,
            "gated_norm": self.gates * self.norms,
            "easy_ep": self.change[:, None] * self.gates * self.norms,
        }
        out = {x: np.bincount(self.ids.ravel(), v.ravel(), experts) for x, v in pairs.items()}
        return out | {"peak": np.zeros(experts)}


def from_tokens(layout: Layout, seed: int = 0) -> tuple[Stats, dict[int, tuple[Tokens, ...]]]:
    rng = np.random.default_rng(seed)
    drawn = {x.index: tuple(Tokens.draw(x, rng) for _ in DOMAINS) for x in layout.routed}
    arrays = {}
    for layer in layout.routed:
        per_domain = [tokens.sums(layer.num_experts) for tokens in drawn[layer.index]]
        arrays[layer.index] = {name: np.stack([x[name] for x in per_domain]) for name in per_domain[0]}
    return make_stats(layout, arrays, (60, 60)), drawn


def brute_force(name: str, options: dict, events: list[tuple[float, float, float]]) -> float:
    """The score of one expert from its (s, g, norm) by routed token, straight from the definition."""
    n = len(events)
    match name:
        case "frequency":
            return n
        case "gate-mass":
            return sum(g for _, g, _ in events)
        case "ean":
            return sum(norm for _, _, norm in events)
        case "man":
            power = 2 if options.get("squared") else 1
            return sum(norm**power for _, _, norm in events) / n if n else 0
        case "reap":
            return sum(g * norm for _, g, norm in events) / n if n else 0
        case "easy-ep":
            return sum(s * g * norm for s, g, norm in events)
    raise AssertionError(f"write down the definition of {name}")


@pytest.mark.parametrize("domain", [None, "prose", ["code"]])
@pytest.mark.parametrize(("name", "options"), [*((x, {}) for x in SCORED), ("man", {"squared": True})])
def test_scores_are_the_definitions(name, options, domain):
    layout = make_layout()
    stats, drawn = from_tokens(layout)
    wanted = {None: DOMAINS, "prose": ["prose"]}.get(domain) if not isinstance(domain, list) else domain
    for layer in layout.routed:
        events = [[] for _ in range(layer.num_experts)]
        for tokens in (x for x, d in zip(drawn[layer.index], DOMAINS, strict=True) if d in wanted):
            for (t, k), j in np.ndenumerate(tokens.ids):
                events[j].append((tokens.change[t], tokens.gates[t, k], tokens.norms[t, k]))
        expected = [brute_force(name, options, x) for x in events]
        assert expected[-1] == 0  # never routed to
        np.testing.assert_allclose(methods.get(name)(stats, layer, domain, **options), expected, rtol=1e-12)


def test_random_depends_on_seed_and_layer_alone():
    layout = make_layout(layers=2, experts=64)
    stats, _ = from_tokens(layout)
    other = make_stats(layout, {})
    plan = methods.make_plan("random", stats, layout, keep=0.5, protect="none", seed=3)
    assert plan.ops == methods.make_plan("random", other, layout, keep=0.5, protect="none", seed=3).ops
    assert plan.ops != methods.make_plan("random", stats, layout, keep=0.5, protect="none", seed=4).ops
    assert plan.dropped()[0] != plan.dropped()[1]
    assert plan.settings["seed"] == 3


def test_the_lowest_scored_go_and_the_plan_says_where_it_comes_from():
    layout = make_layout(layers=2, experts=4)
    counts = {0: {"count": [[9, 1, 8, 2], [0, 0, 0, 90]]}, 1: {"count": [[1, 2, 3, 4], [9, 9, 9, 9]]}}
    stats = make_stats(layout, counts, model="abc")
    plan = methods.make_plan("frequency", stats, layout, keep=2, domain="code", protect="none")
    assert plan.dropped() == {0: (1, 3), 1: (0, 1)}
    assert (plan.method, plan.layout_hash, plan.made_from) == ("frequency", layout.hash, {"model": "abc"})
    assert plan.settings == {"keep": 2, "spread": "uniform", "domain": ["code"], "protect": "none"}
    assert methods.make_plan("frequency", stats, layout, keep=2, protect="none").dropped()[0] == (1, 2)


def test_a_plan_survives_its_file(tmp_path):
    layout = make_layout()
    plan = methods.make_plan("man", from_tokens(layout)[0], layout, keep=0.5, squared=True)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.settings["squared"] is True


@pytest.mark.parametrize("spread", ["uniform", "global"])
@pytest.mark.parametrize("name", SCORED)
def test_permuting_experts_permutes_the_plan(name, spread):
    layout = make_layout(layers=4, experts=12)
    rng = np.random.default_rng(1)
    names = [x for x, (group, _, _) in FIELDS.items() if group == "scores"]
    arrays = {x.index: {n: rng.gamma(2.0, size=(2, 12)) for n in names} for x in layout.routed}
    order = {x.index: rng.permutation(12) for x in layout.routed}
    moved = {i: {n: x[:, order[i]] for n, x in arrays[i].items()} for i in arrays}
    plan = methods.make_plan(name, make_stats(layout, arrays), layout, keep=0.5, spread=spread)
    other = methods.make_plan(name, make_stats(layout, moved), layout, keep=0.5, spread=spread)
    for index, dropped in plan.dropped().items():
        assert set(dropped) == {int(order[index][e]) for e in other.dropped()[index]}


@pytest.mark.parametrize("keep", [0.5, 0.6, 9, 0.8])
@pytest.mark.parametrize("router", [{}, {"groups": 4, "groups_kept": 2}])
@pytest.mark.parametrize("seed", range(3))
def test_the_global_spread_is_exact_and_every_router_can_work(keep, router, seed):
    layout = make_layout(layers=5, experts=16, **router)
    rng = np.random.default_rng(seed)
    arrays = {x.index: {"norm": rng.pareto(1.0, (2, 16)), "peak": rng.pareto(1.0, (2, 16))} for x in layout.routed}
    stats = make_stats(layout, arrays)
    plan = methods.make_plan("ean", stats, layout, keep=keep, spread="global")
    uniform = methods.make_plan("ean", stats, layout, keep=keep)
    kept = {x.index: plan.kept(x) for x in layout.routed}
    assert sum(map(len, kept.values())) == sum(len(uniform.kept(x)) for x in layout.routed)
    for layer in layout.routed:
        check_feasible(layer, kept[layer.index])
    assert all(x in kept[i] for i, x in methods.super_experts(stats, layout))


def test_the_global_spread_keeps_what_is_worth_most():
    layout = make_layout(layers=2, experts=6, top_k=1)
    rng = np.random.default_rng(0)
    scores = {0: np.array([100.0, 90, 1, 1, 1, 1]) + rng.random(6), 1: np.arange(1.0, 7) / 1000}
    stats = make_stats(layout, {i: {"norm": np.stack([x, x])} for i, x in scores.items()})
    plan = methods.make_plan("ean", stats, layout, keep=3, spread="global", protect="none")
    ranked = sorted(((x / s.sum(), i, e) for i, s in scores.items() for e, x in enumerate(s)), reverse=True)
    assert {(x.index, e) for x in layout.routed for e in plan.kept(x)} == {(i, e) for _, i, e in ranked[:6]}
    assert len(plan.kept(layout.layers[0])) == 2  # scale does not matter, shares of a layer do
    assert any("apply the plan live" in note for note in plan.notes)


def test_the_global_spread_leaves_every_layer_its_top_k():
    layout = make_layout(layers=2, experts=8, top_k=3)
    flat, steep = np.full((2, 8), 1.0), np.array([[1.0] + [1e-9] * 7] * 2)
    stats = make_stats(layout, {0: {"norm": flat}, 1: {"norm": steep}})
    plan = methods.make_plan("ean", stats, layout, keep=0.5, spread="global", protect="none")
    assert [len(plan.kept(x)) for x in layout.routed] == [5, 3]
    zero = make_stats(layout, {0: {"norm": 0 * flat}, 1: {"norm": 0 * flat}})
    plan = methods.make_plan("ean", zero, layout, keep=0.5, spread="global", protect="none")
    assert [len(plan.kept(x)) for x in layout.routed] == [4, 4]


def test_the_global_spread_grows_layers_by_one_expert_a_group():
    layout = make_layout(layers=2, experts=12, groups=2, groups_kept=1)
    lopsided, even = [10, 9, 8, 7, 0, 0, 10, 9, 0, 0, 0, 0], [10, 9, 5, 4.5, 0, 0] * 2
    stats = make_stats(layout, {0: {"norm": [lopsided] * 2}, 1: {"norm": [even] * 2}})
    plan = methods.make_plan("ean", stats, layout, keep=0.5, spread="global", protect="none")
    assert [len(plan.kept(x)) for x in layout.routed] == [4, 8]  # a third in each group is worth 8 + 0 < 5 + 5


def test_the_global_spread_makes_room_for_super_experts():
    layout = make_layout(layers=4, experts=128, top_k=1)
    stats = peaks_of(layout, {(1, 5): 500.0, (1, 9): 500.0})
    stats.layers[1].arrays["norm"][:] = np.arange(128) == 0  # one expert has it all
    plan = methods.make_plan("ean", stats, layout, keep=0.5, spread="global")
    assert plan.kept(layout.layers[1])[:3] == (0, 5, 9)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize(("groups", "groups_kept"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_fewest_is_the_smallest_that_a_router_works_with(top_k, groups, groups_kept):
    layer = make_layout(1, 64, top_k, groups=groups, groups_kept=groups_kept).layers[0]

    def spread(count: int) -> tuple[int, ...]:
        return tuple(g * 64 // groups + i for g in range(groups) for i in range(count // groups))

    check_feasible(layer, spread(fewest(layer)))
    with pytest.raises(PlanError):
        check_feasible(layer, spread(fewest(layer) - groups))


def test_groups_lose_equally_many():
    layout = make_layout(1, 8, 2, groups=2, groups_kept=1)
    score = np.array([[1, 2, 3, 4, 50, 60, 70, 80]] * 2)
    plan = methods.make_plan("ean", make_stats(layout, {0: {"norm": score}}), layout, keep=0.5, protect="none")
    assert plan.dropped() == {0: (0, 1, 4, 5)}


def peaks_of(layout: Layout, special: dict[tuple[int, int], float]) -> Stats:
    arrays = {x.index: {"peak": np.ones((2, x.num_experts))} for x in layout.routed}
    for number, ((layer, expert), peak) in enumerate(special.items()):
        arrays[layer]["peak"][number % 2, expert] = peak  # either domain's
    return make_stats(layout, arrays)


def test_super_experts_meet_all_three_conditions():
    layout = make_layout(layers=4, experts=512)
    peaks = {(0, 3): 100.0, (2, 7): 11.0, (1, 4): 9.0, (1, 5): 9.5, (3, 1): 100.0, (3, 2): 50.0}
    found = methods.super_experts(peaks_of(layout, peaks), layout)
    assert found == {ExpertId(0, 3), ExpertId(2, 7)}  # 1.4, 1.5: under a tenth of the largest; 3.x: too deep


def test_super_experts_are_above_the_percentile():
    layout = make_layout(layers=4, experts=64)
    peaks = {(e % 4, e // 4): 50.0 + e for e in range(256)}
    assert methods.super_experts(peaks_of(layout, peaks), layout) == {
        ExpertId(2, 63)
    }  # of the top two, 3.63 is too deep


def test_super_experts_are_protected_by_default():
    layout = make_layout(layers=4, experts=64)
    stats = peaks_of(layout, {(1, 9): 500.0})
    stats.layers[1].arrays["norm"][:, 9] = 0.0
    plan = methods.make_plan("ean", stats, layout, keep=0.5)
    assert 9 not in plan.dropped()[1]
    assert "super experts protected: 1.9" in plan.notes
    bare = methods.make_plan("ean", stats, layout, keep=0.5, protect="none")
    assert 9 in bare.dropped()[1]
    assert not any("super" in note for note in bare.notes)
    found_none = methods.make_plan("ean", make_stats(layout, {}), layout, keep=0.5)
    assert "super experts protected: none found" in found_none.notes


def test_super_experts_beyond_the_budget_are_named():
    layout = make_layout(layers=4, experts=128, top_k=1)
    plan = methods.make_plan("ean", peaks_of(layout, {(1, 5): 500.0, (1, 9): 500.0}), layout, keep=1)
    assert plan.kept(layout.layers[1]) == (5,)
    assert "super experts protected: 1.5" in plan.notes
    assert "warning: super experts that the budget has no room for: 1.9" in plan.notes


def test_notes_say_what_was_cold_thin_and_removed():
    layout = make_layout(layers=1, experts=4, top_k=2, renormalised=False)
    arrays = {
        "count": [[5, 3, 2, 0], [5, 3, 2, 7]],
        "norm": [[4, 3, 2, 1]] * 2,
        "gate_mass": [[6, 2, 1, 1], [1, 1, 1, 97]],
    }
    stats = make_stats(layout, {0: arrays}, tokens=(150, 900))
    plan = methods.make_plan("ean", stats, layout, keep=0.5, domain="code", protect="none")
    assert plan.notes == [
        "scored on 150 tokens of code",
        "warning: few tokens; take at least 200, 100 for an average expert",
        "experts never routed to: 1 of 4",
        "removed gate mass by layer: 0: 20.0%",
        "the routers do not renormalise the chosen weights: as experts leave the softmax, those of the rest grow",
        "cold experts (chosen by fewer than 100 tokens): 4 of 4, 2 of them kept",
        "warning: cold experts that are kept (0.0, 0.1): take more text",
    ]
    assert methods.removed_gate_mass(plan, stats, layout, "code") == {0: pytest.approx(0.2)}
    assert methods.removed_gate_mass(plan, stats, layout) == {0: pytest.approx(100 / 110)}
    assert len(methods.make_plan("ean", stats, layout, keep=1.0, protect="none").notes) == 4


def test_cold_experts_are_those_below_the_line():
    layout = make_layout(layers=1, experts=8, top_k=2)
    count = [[0, 99, 100, 101, 60, 1000, 1000, 1000], [0, 0, 0, 0, 60, 0, 0, 0]]
    stats = make_stats(layout, {0: {"count": count, "norm": [[9, 8, 7, 6, 5, 4, 3, 2]] * 2}}, tokens=(2000, 30))
    assert cold_experts(stats, layout, "code") == {0: (0, 1, 4)}
    assert cold_experts(stats, layout) == {0: (0, 1)}
    plan = methods.make_plan("ean", stats, layout, keep=0.5, domain="code", protect="none")
    assert "cold experts (chosen by fewer than 100 tokens): 3 of 8, 2 of them kept" in plan.notes
    assert "warning: cold experts that are kept (0.0, 0.1): take more text" in plan.notes
    random = methods.make_plan("random", stats, layout, keep=0.5)  # which reads no statistics
    assert not any("cold" in note for note in random.notes)


def test_mtp_layers_are_left_out():
    layout = make_layout(layers=2, mtp=1)
    plan = methods.make_plan("easy-ep", make_stats(layout, {}), layout, keep=0.5)
    assert list(plan.dropped()) == [0, 1]


@pytest.mark.parametrize(
    ("router", "keep", "message"),
    [
        ({}, 1, r"chooses 2 experts for every token, but only 1 would be left"),
        ({}, 0.01, "chooses 2 experts"),
        ({}, 0, "impossible number"),
        ({}, 9, "impossible number"),
        ({}, 1.5, "impossible number"),
        ({}, -0.5, "impossible number"),
        ({}, math.nan, "impossible number"),
        ({"groups": 4, "groups_kept": 2}, 4, "would have 1 experts in a group"),
    ],
)
def test_the_budget_is_checked_before_anything(router, keep, message):
    layout = make_layout(**router)
    nothing = Stats(layout.hash, (), np.zeros(0, np.int64), np.zeros(0, np.int64), {})
    with pytest.raises(PlanError, match=message):
        methods.make_plan("frequency", nothing, layout, keep=keep)


def test_what_a_user_can_mistake():
    layout = make_layout()
    stats = make_stats(layout, {})

    def refused(kind: type, *, name: str = "ean", stats: Stats = stats, **settings) -> str:
        with pytest.raises(kind) as caught:
            methods.make_plan(name, stats, layout, **{"keep": 0.5, **settings})
        return str(caught.value)

    assert "did you mean 'easy-ep'?" in refused(RecipeError, name="easyep")
    assert "did you mean 'uniform'?" in refused(RecipeError, spread="uniforn")
    assert "did you mean 'super'?" in refused(RecipeError, protect="supr")
    assert "did you mean 'squared'?" in refused(RecipeError, name="man", sqared=True)
    assert "has no option 'squared'" in refused(RecipeError, squared=True)
    assert "expected: bool" in refused(RecipeError, name="man", squared=1)
    assert "did you mean 'code'?" in refused(DataError, domain="cod")
    assert "of another model" in refused(PlanError, stats=make_stats(make_layout(experts=4), {}))
    missing = make_stats(layout, {})
    del missing.layers[1]
    assert "of another model" in refused(PlanError, stats=missing)
    unmeasured = make_stats(layout, {})
    del unmeasured.layers[2].arrays["norm"]
    assert "measure with the group 'scores'" in refused(DataError, stats=unmeasured)
    overflown = make_stats(layout, {})
    overflown.layers[2].arrays["norm"][0, 5] = np.inf
    assert "where:    2.5" in refused(DataError, stats=overflown)


def test_options_may_not_hide_the_drivers_own_arguments():
    layout = make_layout()
    with pytest.raises(RecipeError, match="has no option 'stats'"):
        methods.make_plan("ean", make_stats(layout, {}), layout, keep=0.5, **{"stats": 1})


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_whole(name):
    method = methods.get(name)
    assert method.name == name
    assert methods.METHODS[name].split(".")[2] == method.kind
    assert name in methods.names(method.kind)
    assert set(method.needs) <= FIELDS.keys()
    assert "scores" in method.groups or not method.groups
    assert method.summary
    page = (DOCS / f"{name}.md").read_text("utf-8")
    assert page.count("<!-- measured:start -->") == page.count("<!-- measured:end -->") == 1
    assert f"[{name}]({name}.md)" in (DOCS / "README.md").read_text("utf-8")
    for arxiv in re.findall(r"arXiv \d{4}\.\d{5}", method.paper):
        assert arxiv in page


def test_a_method_reads_what_it_says_it_needs():
    layout = make_layout(1)
    for name in SCORING:
        method = methods.get(name)
        stats = make_stats(layout, {})
        stats.layers[0].arrays = {x: stats.layers[0].arrays[x] for x in method.needs}
        method(stats, layout.layers[0], None)
        if "squared" in method.options:
            method(stats, layout.layers[0], None, squared=True)


def test_listing_the_methods_loads_none():
    code = "import sys, moekit.methods as m; m.names(); sys.exit(any('prune.' in x for x in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
