"""Texts written together are the texts written alone, whoever joins, leaves, fails or is put off beside them."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from moekit.apply.live import live
from moekit.errors import CheckpointError, DataError, PlanError, RecipeError
from moekit.families.caches import cache_bytes
from moekit.families.model import Model
from moekit.plans import Drop, Plan, Scope, Steer
from moekit.serve import batching
from moekit.serve.batching import Ask, Batcher
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.serve.sampling import Sampling, adjusted, likelihood
from moekit.serve.scheduler import ClosedError, QueueFullError, Scheduler
from moekit.serve.steering import Steering
from moekit.serve.telemetry import Times
from moekit.serve.text import TextStream
from moekit.serve.trial import why_not
from moekit.view import MoEView

# Attention over all and over a window, recurrent states, latent attention, convolutions; and two that keep what cannot
# be put side by side, so that their texts take turns.
FAMILIES = {"qwen3_moe": True, "gpt_oss": True, "qwen3_next": True, "deepseek_v3": True, "lfm2_moe": True}
FAMILIES |= {"deepseek_v4": False, "deepseek_v32": False}


class Numbers:
    """A tokenizer whose words are the tokens' numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {x}" for x in ids)


def engine_of(name, folder, **settings):
    zoo.build(name).save_pretrained(folder / "model")
    return Engine(pack(Model.open(folder / "model"), folder / "store"), context=64, **settings)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Of a tiny Qwen3-MoE in float32, for four texts."""
    made = engine_of("qwen3_moe", tmp_path_factory.mktemp("batching"), texts=4, kept_tokens=256)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_ends(monkeypatch):
    monkeypatch.setattr(Engine, "ends", frozenset())  # random models end at random


def prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def started(batcher, *asks):
    told = [[] for _ in asks]
    texts = [batcher.make(ask, news.append) for ask, news in zip(asks, told, strict=True)]
    batcher.waiting.extend(texts)
    return texts, told


def finished(batcher, *asks, steps=10_000):
    """Texts and all their news, in company."""
    out = started(batcher, *asks)
    while not batcher.idle and (steps := steps - 1):
        batcher.turn()
    assert batcher.idle
    assert not batcher._groups
    return out


def alone(batcher, *asks):
    return [finished(batcher, ask)[0][0].ids for ask in asks]


@pytest.mark.parametrize(("name", "together"), FAMILIES.items())
def test_a_text_in_company_is_the_text_alone(name, together, tmp_path):
    engine = engine_of(name, tmp_path, texts=3, kept_tokens=192)
    assert (why_not(engine) is None) == together
    batcher = Batcher(engine, Numbers(), batched=together)
    asks = [Ask(ids, n) for ids, n in zip(prompts(3, 30, 12, 7, 1), (20, 4, 9, 12, 15), strict=True)]
    expected = alone(batcher, *asks)
    forwards = engine.telemetry.forwards["decode"]
    texts, told = finished(batcher, *asks)
    assert [x.ids for x in texts] == expected
    assert [news[-1].finish for news in told] == ["length"] * 5
    assert ["".join(x.text for x in news) for news in told] == [
        Numbers().decode(x.ids[len(x.ask.ids) :]) for x in texts
    ]
    shared = engine.telemetry.forwards["decode"] - forwards < forwards
    assert shared == together
    engine.close()


def test_a_wrong_mask_is_noticed(engine, monkeypatch):
    stock = Engine.forward
    monkeypatch.setattr(Engine, "forward", lambda self, ids, past, kind, lengths=None: stock(self, ids, past, kind))
    assert "logits of a batch differ" in why_not(engine)


def test_one_that_writes_alone_is_the_stream(engine):
    ids = prompts(9)[0]
    text = finished(Batcher(engine, Numbers()), Ask(ids, 12))[0][0]
    assert text.ids[9:] == list(engine.stream(ids, 12))


def test_keys_and_values_stay_within_their_budget(engine, monkeypatch):
    """Four texts of up to 40 tokens in room for 100: some wait, some are put off, none changes."""
    batcher = Batcher(engine, Numbers())
    asks = [Ask(ids, 30) for ids in prompts(10, 4, 6, 8)]
    expected = alone(batcher, *asks)
    monkeypatch.setattr(engine, "kept_tokens", 100)
    sizes, stock = [], engine.forward

    def forward(ids, past, kind, lengths=None):
        out = stock(ids, past, kind, lengths)
        sizes.append((len(ids), cache_bytes(past)))
        return out

    monkeypatch.setattr(engine, "forward", forward)
    assert [x.ids for x in finished(batcher, *asks)[0]] == expected
    per_token = cache_bytes_of_a_token(engine)
    assert max(size for _, size in sizes) <= 100 * per_token
    assert max(rows for rows, _ in sizes) >= 2


def cache_bytes_of_a_token(engine):
    from moekit.families.resident import empty_cache

    past = empty_cache(engine.model)
    engine.model(input_ids=torch.tensor([[1, 2]]), past_key_values=past)
    return cache_bytes(past) // 2


@pytest.mark.parametrize("together", [True, False])
def test_a_text_that_fails_fails_alone(engine, monkeypatch, together):
    batcher = Batcher(engine, Numbers(), batched=together)
    asks = [Ask(ids, 12) for ids in prompts(5, 9, 3, 4)]
    expected = alone(batcher, *asks)
    others = Counter(x for ids in (*expected[:2], expected[3]) for x in ids)
    place = next(i for i in range(3, len(expected[2])) if expected[2][i] not in others)
    stock = engine.forward

    def forward(ids, past, kind, lengths=None):
        if (ids == expected[2][place]).any():
            raise CheckpointError("an expert's record is damaged")
        return stock(ids, past, kind, lengths)

    monkeypatch.setattr(engine, "forward", forward)
    texts, told = finished(batcher, *asks)
    assert [x.ids for i, x in enumerate(texts) if i != 2] == [x for i, x in enumerate(expected) if i != 2]
    assert texts[2].ids == expected[2][: place + 1]
    assert [news[-1].finish for news in told] == ["length", "length", "error", "length"]
    assert isinstance(told[2][-1].error, CheckpointError)


def test_who_goes_makes_room(engine):
    batcher = Batcher(engine, Numbers())
    asks = [Ask(ids, 20) for ids in prompts(5, 9, 3, 4, 6)]
    expected = alone(batcher, *asks)
    texts, told = started(batcher, *asks)
    for _ in range(4):
        batcher.turn()
    assert batcher.kept == texts[:4]
    texts[1].cancelled = True
    batcher.turn()
    assert batcher.kept == [texts[0], texts[2], texts[3], texts[4]]
    while not batcher.idle:
        batcher.turn()
    assert told[1][-1].finish == "cancelled"
    assert 0 < told[1][-1].count < 20
    assert [x.ids for i, x in enumerate(texts) if i != 1] == [x for i, x in enumerate(expected) if i != 1]


def test_a_long_prompt_lets_others_write(engine, monkeypatch):
    monkeypatch.setattr(batching, "CHUNK_TOKENS", 8)
    kinds, stock = [], engine.forward
    monkeypatch.setattr(engine, "forward", lambda *args: kinds.append(args[2]) or stock(*args))
    batcher = Batcher(engine, Numbers())
    started(batcher, Ask(prompts(4)[0], 20))
    batcher.turn()
    started(batcher, Ask(prompts(40)[0], 2))
    while not batcher.idle:
        batcher.turn()
    assert kinds[:11] == ["prefill", *["prefill", "decode"] * 5]


def test_a_seed_draws_the_same_in_company(engine):
    batcher = Batcher(engine, Numbers())
    asks = [Ask(ids, 10, Sampling(1.0, seed=seed)) for seed, ids in enumerate(prompts(5, 9, 3, 4))]
    expected = alone(batcher, *asks)
    assert [x.ids for x in finished(batcher, *asks)[0]] == expected
    other = Ask(asks[0].ids, 10, Sampling(1.0, seed=9))
    assert alone(batcher, other)[0] != expected[0]


def test_a_plan_is_for_the_texts_that_choose_it(engine):
    layers = [x.index for x in engine.layout.routed]
    bans = [Steer(layer=x, expert=e, action="ban") for x in layers for e in range(5)]
    late = Scope(part="generated")
    forces = [Steer(layer=x, expert=6, action="force", scope=late) for x in layers]
    forces += [Steer(layer=x, expert=6, action="scale", strength=3.0, scope=late) for x in layers]
    plans = {name: Plan(layout_hash=engine.layout.hash, ops=ops) for name, ops in (("off", bans), ("on", forces))}
    view = MoEView(engine.model, engine.layout)
    ids = prompts(5, 9, 3, 4)
    plain = Batcher(engine, Numbers())
    expected = alone(plain, *(Ask(x, 12) for x in ids))
    for number, name in ((1, "off"), (2, "on")):
        with live(view, plans[name]):
            steered = list(engine.stream(ids[number], 12))
        assert steered != expected[number][len(ids[number]) :]
        expected[number] = ids[number] + steered
    steering = Steering(view, plans)
    batcher = Batcher(engine, Numbers(), steering)
    asks = [Ask(x, 12, steer=name) for x, name in zip(ids, (None, "off", "on", None), strict=True)]
    assert [x.ids for x in finished(batcher, *asks)[0]] == expected
    batcher.turn()
    assert all("forward" not in vars(view.router(x)) for x in layers)  # nothing stays when nobody steers


def test_mistakes_are_told_before_anything_runs(engine):
    hash_ = engine.layout.hash
    plan = Plan(layout_hash=hash_, ops=[Steer(layer=0, expert=1, action="ban")])
    view = MoEView(engine.model, engine.layout)
    batcher = Batcher(engine, Numbers(), Steering(view, {"calm": plan}))
    for ask, error, message in (
        (Ask([]), DataError, "of this length"),
        (Ask([1] * 64), DataError, "of this length"),
        (Ask([1, zoo.VOCAB]), DataError, "no such token"),
        (Ask([1], sampling=Sampling(logit_bias={-1: 1.0})), DataError, "no such token"),
        (Ask([1], steer="clam"), RecipeError, "did you mean 'calm'"),
    ):
        with pytest.raises(error, match=message):
            batcher.check(ask)
    with pytest.raises(PlanError, match="another model"):
        Steering(view, {"x": Plan(layout_hash="0", ops=plan.ops)})
    with pytest.raises(PlanError, match="only choose a plan that steers"):
        Steering(view, {"x": Plan(layout_hash=hash_, ops=[*plan.ops, Drop(layer=0, experts=(1,))])})


def test_the_queue_has_an_end_and_closing_lets_texts_end(engine):
    scheduler = Scheduler(Batcher(engine, Numbers()), queue=1)
    told = []
    asks = [Ask(ids, 40) for ids in prompts(5, 9, 3, 4, 6)]
    scheduler.submit(asks, lambda number, news: told.append((number, news.finish)))
    with pytest.raises(QueueFullError, match="try again in 1 s"):
        scheduler.submit(asks[:2], lambda *_: None)
    scheduler.close()
    assert sorted(number for number, finish in told if finish == "length") == [0, 1, 2, 3, 4]
    with pytest.raises(ClosedError):
        scheduler.submit(asks[:1], lambda *_: None)


def test_closing_at_once_ends_texts_with_an_error(engine):
    scheduler = Scheduler(Batcher(engine, Numbers()))
    told = []
    scheduler.submit([Ask(prompts(5)[0], 55)], lambda _, news: told.append(news.finish))
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.001)
    scheduler.close(grace_s=0)
    assert told[-1] in ("error", "length")
    assert scheduler.running == scheduler.waiting == 0


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


@given(text=st.text("aäb€", max_size=12), stop=st.lists(st.text("aäb€", min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_string_is_given_out(text, stop):
    stream, given, seen = TextStream(Bytes(), stop), "", []
    for token in text.encode():
        given += stream.push(token)
        seen.append(token)
        if stream.stopped:
            break
    given += stream.finish()
    places = [text.find(x) for x in stop if x in text]
    assert stream.stopped == bool(places)
    # What stands first wins, among those that were whole when the text stopped.
    read = bytes(seen).decode("utf-8", errors="ignore")
    expected = read[: min(read.find(x) for x in stop if x in read)] if places else text
    assert given == expected


def test_penalties_and_biases_move_logits():
    logits = torch.tensor([1.0, 2.0, 3.0])
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 4.0, 2: -1.0})
    assert adjusted(logits, sampling, Counter({2: 3})).tolist() == [5.0, 2.0, 3.0 - 1.0 - 0.5 - 0.75]
    assert adjusted(logits, Sampling(), Counter({2: 3})) is logits


def test_likelihoods_are_logarithms_of_probabilities():
    found = likelihood(torch.tensor([0.0, 1.0, 2.0]).log(), 1, 2)
    assert found.logprob == pytest.approx(torch.tensor(1 / 3).log().item())
    assert [token for token, _ in found.top] == [2, 1]


def test_quantiles():
    times = Times()
    for x in range(1, 101):
        times.add(float(x))
    assert times.quantiles() == {0.5: 51.0, 0.95: 96.0, 0.99: 100.0}
    assert (times.count, times.sum_s) == (100, 5050.0)
