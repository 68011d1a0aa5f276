"""Cache policies and predictors: what must hold of every one of them, and each beside its own rule on small cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moekit
from moekit import refmoe
from moekit.errors import DataError, RecipeError
from moekit.recording import trace
from moekit.serve.cache import READERS, ExpertCache, residents_in, slot_bytes
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.serve.policies import POLICIES, Residency, Sizes, policy_named
from moekit.serve.policies.fate import quotas
from moekit.serve.predictors import PREDICTORS, Seen, flow, predictor_named, pregate
from moekit.serve.predictors.flow import context
from moekit.serve.routes import Routes
from moekit.serve.simulate import Machine, best_policy, simulate

ONLINE = sorted(POLICIES.keys() - {"belady"})
MACHINE = Machine(1_000_000)


def routes_of(ids_TLK, experts, lengths=None) -> Routes:
    ids = np.asarray(ids_TLK, np.int16)
    lengths = lengths or [len(ids)]
    starts = np.cumsum([0, *lengths[:-1]])
    return Routes(ids, experts, np.arange(len(ids)) % 7, starts, np.zeros(len(starts), int))


def sticky(seed: int, tokens=240, layers=4, experts=12, top_k=3) -> Routes:
    """Texts with favourites, some of them kept from token to token."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, layers, top_k), np.int64)
    for token in range(tokens):
        if token % 60 == 0:
            liked = rng.gamma(0.5, size=(layers, experts))
        for layer in range(layers):
            weight = liked[layer] + 0.05
            if token:
                weight[ids[token - 1, layer]] *= 3
            ids[token, layer] = rng.choice(experts, top_k, replace=False, p=weight / weight.sum())
    return routes_of(ids, experts, [60] * (tokens // 60))


def cyclic(tokens=50, layers=5, experts=6, top_k=2) -> Routes:
    """The same experts for every token."""
    return routes_of(np.tile(np.arange(top_k), (tokens, layers, 1)), experts)


def hits(routes, policy, slots, known=None) -> int:
    return int(simulate(routes, policy, slots, MACHINE, trace=known).hits.sum())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("slots", [3, 11, 12, 24, 47])
def test_nobody_does_better_than_belady(seed, slots):
    routes, known = sticky(seed), sticky(seed + 100)
    bound = hits(routes, "belady", slots)
    for name in ONLINE:
        assert hits(routes, name, slots, known) <= bound, name
    assert bound > hits(routes, "lru", slots)


@pytest.mark.parametrize("seed", range(3))
def test_belady_is_the_best_there_is(seed):
    """Against every sequence of decisions, on a case small enough to try them all."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, size=(9, 1, 1))
    routes = routes_of(ids, 3)
    states = {frozenset(): 0}
    for expert in ids[:, 0, 0].tolist():
        after: dict[frozenset, int] = {}
        for held, count in states.items():
            count += expert in held
            options = [held] if expert in held else [held] + [held - {x} | {expert} for x in held]
            if expert not in held and len(held) < 2:
                options.append(held | {expert})
            for option in options:
                after[option] = max(after.get(option, 0), count)
        states = after
    assert hits(routes, "belady", 2) == max(states.values())


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("slots", [1, 2, 5, 13, 48])
def test_residents_are_never_more_than_places(name, slots):
    routes, known = sticky(0), sticky(1)
    residency = Residency(policy_named(name, Sizes(slots, 4, 12, 3), known), slots)
    held: set[tuple[int, int]] = set()
    for token, layers in enumerate(routes.ids.tolist()):
        if token in routes.starts:
            residency.begin()
        for layer, chosen in enumerate(layers):
            decision = residency.layer(layer, chosen)
            assert sorted(decision.hits + decision.misses) == sorted(chosen)
            assert {(layer, x) for x in decision.hits} <= held
            assert not {(layer, x) for x in decision.misses} & held
            assert set(decision.evicted) <= held
            held = (held - set(decision.evicted)) | {(layer, x) for x in decision.kept}
            assert len(held) == residency.count == residency.resident.sum() <= slots
            assert {(int(x), int(y)) for x, y in np.argwhere(residency.resident)} == held


def test_below_a_token_cycle_lru_finds_nothing_and_reuse_what_fits():
    routes = cyclic()
    for slots in range(1, 9):  # with 9 of 10, one of a layer's two is there yet, and is used before the other comes
        assert hits(routes, "lru", slots) == 0
        assert hits(routes, "arc", slots) == 0
        assert hits(routes, "reuse", slots) == slots * (len(routes.ids) - 1)
        assert hits(routes, "reuse", slots) == hits(routes, "belady", slots)
    assert hits(routes, "lru", 10) == hits(routes, "reuse", 10) == 10 * 49


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("slots", [4, 8, 12, 24, 36])
def test_reuse_is_not_below_the_static_set(seed, slots):
    routes, known = sticky(seed), sticky(seed + 100)
    assert hits(routes, "reuse", slots, known) >= hits(routes, "static", slots, known)
    assert hits(routes, "reuse", slots) >= hits(routes, "static", slots, known)


def test_lru_is_lru():
    routes = sticky(3)
    order: list[tuple[int, int]] = []
    found = 0
    for layers in routes.ids.tolist():
        for layer, chosen in enumerate(layers):
            found += sum((layer, x) in order for x in chosen)
            for x in chosen:
                if (layer, x) in order:
                    order.remove((layer, x))
            order = (order + [(layer, x) for x in chosen])[-30:]
    assert hits(routes, "lru", 30) == found


def arc_of_the_paper(requests, c) -> int:
    """Figure 4 of the paper, line by line; lists have their oldest first."""
    p, found, t1, t2, b1, b2 = 0.0, 0, [], [], [], []

    def replace(x):
        if t1 and (len(t1) > p or (x in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in requests:
        if x in t1 or x in t2:
            found += 1
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:
            p = min(c, p + max(len(b2) / len(b1), 1))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [2, 5, 9])
def test_arc_is_that_of_the_paper(seed, slots):
    rng = np.random.default_rng(seed)
    often, loop = rng.integers(4, size=400), 4 + np.arange(400) % 11
    ids = np.where(rng.random(400) < 0.4, often, loop)
    assert hits(routes_of(ids[:, None, None], 16), "arc", slots) == arc_of_the_paper(ids.tolist(), slots) > 0


@pytest.mark.parametrize(
    ("slots", "expected"), [(40, [12, 12, 12, 4, 0, 0]), (48, [12] * 4 + [0, 0]), (57, [12] * 4 + [5, 4])]
)
def test_fate_favours_shallow_layers(slots, expected):
    assert quotas(Sizes(slots, 6, 12, 3)) == expected
    routes = routes_of(np.random.default_rng(0).integers(12, size=(300, 6, 1)), 12)
    residency = Residency(policy_named("fate", Sizes(slots, 6, 12, 3)), slots)
    for layers in routes.ids.tolist():
        for layer, chosen in enumerate(layers):
            residency.layer(layer, chosen)
    assert residency.resident.sum(1).tolist() == expected


def test_static_keeps_the_hot_set_alone():
    known = routes_of([[[0, 1]], [[0, 2]], [[0, 1]]], 4)
    residency = Residency(policy_named("static", Sizes(2, 1, 4, 2), known), 2)
    for chosen in ([3, 2], [0, 1], [3, 2], [2, 3]):
        residency.layer(0, chosen)
    assert np.flatnonzero(residency.resident[0]).tolist() == [0, 1]


def test_distance_of_layers_decides_between_equals():
    for name in ("edgemoe", "moe-infinity", "reuse"):
        policy = policy_named(name, Sizes(4, 3, 2, 1))
        for _ in range(4):
            for layer in range(3):
                policy.used(layer, np.array([0]), np.array([1.0]))
        resident = np.array([[True, False], [True, False], [True, False]])
        assert policy.victim((0, 0), resident) in [None, (0, 0)], name
        assert policy.scores(0)[:, 0].argsort().tolist() == [0, 2, 1], name


def test_what_a_policy_needs_is_said():
    with pytest.raises(RecipeError, match="--trace"):
        policy_named("static", Sizes(4, 2, 8, 2))
    with pytest.raises(RecipeError, match="moekit simulate"):
        policy_named("belady", Sizes(4, 2, 8, 2))
    with pytest.raises(RecipeError, match="no predictor 'gat'"):
        predictor_named("gat")
    with pytest.raises(RecipeError, match="a trace of the model"):
        predictor_named("paths")
    with pytest.raises(RecipeError, match="the model"):
        predictor_named("gate")
    with pytest.raises(DataError, match="different models"):
        simulate(sticky(0), "lru", 4, MACHINE, trace=cyclic())


def test_the_best_policy_is_found_by_replaying():
    routes = sticky(0, tokens=480)
    choice = best_policy(routes, 12)
    texts = range(len(routes.starts))
    known, replayed = routes.texts(texts[::2]), routes.texts(texts[1::2])
    assert choice in ONLINE
    assert hits(replayed, choice, 12, known) == max(hits(replayed, name, 12, known) for name in ONLINE)


# ---- predictors


def test_paths_are_counted():
    """Layer 2 is decided by layers 0 and 1 together, and by neither alone."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(4, size=(2, 400))
    routes = routes_of(np.stack([a, b, (a + b) % 4], 1)[:, :, None], 4)
    made = predictor_named("paths", routes)
    seen = Seen(np.zeros((400, 3)), np.zeros((1, 3, 4)), {0: routes.ids[:, 0], 1: routes.ids[:, 1]}, {})
    assert (made.scores(2, seen).argmax(1) == routes.ids[:, 2, 0]).all()
    assert (made.scores(1, seen.before(1)).argmax(1) == routes.ids[:, 1, 0]).mean() < 0.5


def test_activations_find_the_text_that_is_alike():
    ids = [[[0], [1]]] * 20 + [[[2], [3]]] * 20
    made = predictor_named("activations", routes_of(ids, 4, [20, 20]))
    counts = np.zeros((1, 2, 4))
    counts[0, 0, 2] = 1
    assert made.scores(1, Seen(np.zeros((1, 3)), counts, {}, {})).argmax() == 3


def test_flow_learns_what_tokens_choose():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, size=600)
    ids = np.stack([tokens % 5, (tokens + np.roll(tokens, 1)) % 5], 1)[:, :, None]
    routes = Routes(ids.astype(np.int16), 5, tokens + 1000, np.zeros(1, int), np.zeros(1, int))
    made = predictor_named("flow", routes)
    seen = Seen(context(routes.tokens, routes.starts), np.zeros((1, 2, 5)), {}, {})
    assert (made.scores(0, seen).argmax(1) == ids[:, 0, 0]).mean() > 0.99
    assert (made.scores(1, seen).argmax(1) == ids[:, 1, 0]).mean() > 0.9
    assert (
        context(np.array([5, 6, 7, 8]), np.array([0, 2])) == [[5, -1, -1], [6, 5, -1], [7, -1, -1], [8, 7, -1]]
    ).all()


def test_pregate_learns_from_hidden_states():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(800, 16, generator=generator)
    truth = (x_TD @ torch.randn(16, 6, generator=generator)).topk(2).indices.numpy()
    ids = np.stack([truth * 0, truth], 1).astype(np.int16)
    routes = Routes(ids, 6, np.zeros(800, int), np.zeros(1, int), np.zeros(1, int), {0: x_TD, 1: x_TD})
    made = predictor_named("pregate", routes)
    guess = made.scores(1, Seen(np.zeros((800, 3)), np.zeros((1, 2, 6)), {}, {0: x_TD})).argsort(1)[:, -2:]
    assert (guess[:, :, None] == truth[:, None, :]).any(1).mean() > 0.9


# ---- in the engine


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(store, trace) of refmoe."""
    root, model = tmp_path_factory.mktemp("reuse"), moekit.open("refmoe")
    texts = {name: refmoe.calibration()[name] for name in ("python", "kjv")}
    data = moekit.load_data(model, texts, tokens=512, sequence_length=64)
    trace(model, data, out=root / "trace", tokens=True)
    return pack(model, root / "store"), root / "trace"


class AtOnce:
    """Reads that are over when they begin, so that no test depends on time."""

    def __init__(self, cache):
        cache.reads.close()
        self.store, self.slots, self.reading = cache.store, cache._slots, set()

    def start(self, reads, urgent=True):
        for layer, expert, slot in reads:
            self.store.read(layer, expert, self.slots[slot])
            self.reading.add(slot)

    def has(self, slot):
        return slot in self.reading

    over = has

    def hurry(self, slot):
        return False

    cancel = hurry

    def take(self, slot):
        self.reading.remove(slot)
        return 1e-9

    def close(self):
        pass


@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_reading_ahead_changes_no_token_and_no_hit(packed, name, monkeypatch):
    store, known = packed
    monkeypatch.setattr(flow, "STEPS", 40)
    monkeypatch.setattr(pregate, "STEPS", 40)
    ids = [x % 160 for x in range(3, 120, 5)]

    def written(predictor, slots, paused):
        engine = Engine(store, predictor=predictor, trace=known)
        small = ExpertCache(engine.store, slots * slot_bytes(engine.store), policy_named("reuse", engine.sizes(slots)))
        for experts in engine._experts.values():
            experts._moekit_cache = small
        if engine.prefetcher is not None:
            small.predict, engine.prefetcher._cache = engine.prefetcher.predict, small
        small._one_read_s, small._pause_s = 1e-9, paused  # as if the disk had been seen to rest so long
        small.reads = AtOnce(small)
        engine.cache.close()
        engine.cache = small
        out = list(engine.stream(ids, 12))
        assert len(small._free) + len(small._resident) + len(small._early) + len(small._unwanted) == slots
        engine.close()
        return out, small.counts

    plain, counts = written("none", 40, 1.0)
    ahead, more = written(name, 40, 1.0)
    assert ahead == plain
    assert (more.hits, more.misses) == (counts.hits, counts.misses)
    assert counts.ahead == counts.wasted == 0 < more.ahead
    assert more.read_bytes >= counts.read_bytes


def test_a_busy_disk_is_not_read_ahead_of(packed):
    engine = Engine(packed[0])
    engine.cache.reads = AtOnce(engine.cache)
    engine.cache._one_read_s, engine.cache._pause_s = 1.0, 0.8 / READERS
    engine.cache.predict = lambda layer: [0, 1, 2]
    list(engine.cache.run(engine.cache.indices[0], [4, 5]))
    assert not engine.cache._early
    engine.cache._one_read_s, engine.cache._pause_s = 1.0, 2.5 / READERS
    list(engine.cache.run(engine.cache.indices[0], [4, 5]))
    assert [key for key in engine.cache._early] == [(1, 0), (1, 1)]
    list(engine.cache.run(engine.cache.indices[1], [1, 7]))
    assert (engine.cache.counts.ahead, engine.cache.counts.wasted) == (1, 1)
    engine.close()


def test_the_engine_chooses_by_a_trace(packed):
    store, known = packed
    engine = Engine(store, policy="auto", trace=known)
    sizes = engine.cache.policy.sizes
    choice = best_policy(Routes.of(known), sizes.slots)
    assert type(engine.cache.policy) is type(policy_named(choice, sizes, Routes.of(known)))
    engine.close()
    cache = Engine(store).cache
    assert type(cache.policy).__name__ == "Reuse"
    assert cache.policy.sizes.slots == residents_in(cache.store, len(cache._slots) * cache.slot_bytes)
