"""moekit simulate: what it prints is what was replayed; routes are those of the trace; the true gate tells all."""

from __future__ import annotations

import json

import numpy as np
import pytest

import moekit
from moekit import refmoe
from moekit.cli import main
from moekit.errors import DataError
from moekit.recording import trace
from moekit.serve.disk import read_speed
from moekit.serve.packing import pack
from moekit.serve.predictors import predictor_named
from moekit.serve.predictors.routers import recorded
from moekit.serve.routes import Routes
from moekit.serve.simulate import Machine, fresh_recall, recall, simulate
from moekit.serve.store import ExpertStore
from moekit.trace import Trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("simulate"), moekit.open("refmoe")
    texts = {name: refmoe.texts()[name] for name in ("python", "kjv", "math")}
    data = moekit.load_data(model, texts, tokens=512, sequence_length=128)
    trace(model, data, out=root / "trace", tokens=True)
    trace(model, data, out=root / "sums")
    return root


@pytest.fixture(scope="module")
def routes(traced):
    return Routes.of(traced / "trace")


def test_routes_are_those_of_the_trace(traced, routes):
    opened = Trace.open(traced / "trace")
    assert routes.ids.shape == (1536, 6, 4)
    for number, index in enumerate(opened.layers):
        assert np.array_equal(routes.ids[:, number], opened.layer(index).ids)
        counts = opened.layer(index).stats.arrays["count"].sum(0)
        assert np.allclose(routes.frequency[number], counts / 1536)
    assert (routes.starts == np.arange(0, 1536, 128)).all()
    assert routes.domains.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    mixed = routes.interleaved()
    assert mixed.domains.tolist() == [0, 1, 2] * 4
    assert np.array_equal(mixed.ids[128:256], routes.ids[512:640])
    assert routes.spread(500).domains.tolist() == [0, 1, 1, 2]
    with pytest.raises(DataError, match="statistics only"):
        Routes.of(traced / "sums")


def test_time_and_bytes_follow_from_what_is_read(routes):
    machine = Machine(1_000_000, 1e9, 0.012)
    found = simulate(routes, "reuse", 48, machine)
    assert found.hits.sum() + found.misses.sum() == 1536 * 24
    assert found.token_bytes == pytest.approx(found.misses.sum() / 1536 * 1e6)
    assert np.allclose(found.expected_s, 0.012 + found.read * 1e-3)
    assert np.allclose(found.best_s, np.maximum(0.012, found.read * 1e-3))
    everything = simulate(routes, "lru", 192, machine)
    assert everything.misses.sum() == (routes.frequency > 0).sum()
    none = simulate(routes, "reuse", 48, Machine(1_000_000, 1e9, 0.005), predictor=predictor_named("paths", routes))
    assert none.ahead.sum() == none.wasted == 0  # a pause is shorter than a read
    ahead = simulate(routes, "reuse", 48, machine, predictor=predictor_named("paths", routes))
    assert (ahead.hits == found.hits).all()
    assert 0 < ahead.ahead.sum() <= found.misses.sum()
    assert ahead.expected_s.sum() == pytest.approx(found.expected_s.sum() - ahead.ahead.sum() * 1e-3)
    assert ahead.read.sum() == found.read.sum() + ahead.wasted


def test_the_true_gate_tells_everything_and_others_less(routes):
    seen, routers = recorded(moekit.open("refmoe"), routes, texts=3)
    again = routes.texts([0, 6, 11])
    assert (seen.ids == again.ids).mean() > 0.97  # near ties fall otherwise where rows of other texts run along
    control = fresh_recall(seen, lambda layer, x: routers.scores(layer, x.hidden[layer]))
    assert (control.at_k == 1.0).all()
    assert (control.at_2k == 1.0).all()
    gate = recall(seen, predictor_named("gate", None, routers))
    assert np.isnan(gate.at_k[0])
    assert (gate.at_k[1:] > 0.4).all()
    assert (gate.at_k[1:] < 1.0).all()
    assert (gate.at_2k[1:] > gate.at_k[1:]).all()
    wrong = fresh_recall(seen, lambda layer, x: -routers.scores(layer, x.hidden[layer]))
    assert (wrong.at_k < 0.1).all()


def test_no_predictor_sees_the_layer_that_it_tells(routes):
    changed = Routes(routes.ids.copy(), 32, routes.tokens, routes.starts, routes.domains)
    changed.ids[:, 3:] = 31 - changed.ids[:, 3:]
    for name in ("paths", "activations", "flow"):
        made = predictor_named(name, routes)
        from moekit.serve.simulate import seen_in

        one, other = (made.scores(3, seen_in(x, 0).before(3)) for x in (routes, changed))
        rows = slice(0, 1) if name == "activations" else slice(None)  # the text's own tokens so far count there
        assert np.array_equal(one[rows], other[rows]), name


def test_the_verb_tells_what_was_replayed(traced, capsys):
    arguments = ["simulate", str(traced / "trace"), "--slots", "48", "--predictor", "paths", "--compute-ms", "6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["slots"], found["experts"]) == (768, 48, 192)
    rates = {(x["policy"], x["predictor"]): x["hit_rate"] for x in found["replays"]}
    assert len(rates) == 2 * 8 + 1
    assert max(rates, key=rates.get) == ("belady", "none")
    assert all(rates[name, "paths"] == rate for (name, other), rate in rates.items() if name != "belady")
    assert rates["reuse", "none"] > rates["static", "none"]
    assert found["recall_at_k"]["paths"][0] is None
    assert main([*arguments, "--policy", "reuse"]) == 0
    shown = capsys.readouterr().out
    assert "768 tokens of 6 texts replayed, 768 learned from" in shown
    assert f"{rates['reuse', 'none']:.1%}" in shown
    assert "lru" not in shown


def test_memory_and_store_give_the_sizes(traced, capsys):
    store = pack(moekit.open("refmoe"), traced / "store")
    opened = ExpertStore(store)
    size = opened.layers[0].forms[0].record_bytes
    assert read_speed(opened, 0.05) > 0
    opened.close()
    arguments = ["simulate", str(traced / "trace"), "--policy", "static", "--json", "--tokens", "200"]
    assert main([*arguments, "--store", str(store), "--memory", str(20 * size + 5)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["slots"], found["expert_bytes"], found["tokens"]) == (20, size, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "4", "--memory", "1GB"], "say the same thing"),
        (["--policy", "lur"], "no cache policy 'lur'"),
        (["--predictor", "gate"], "the model, whose routers it asks"),
        (["--predictor", "pregate"], "the model to record"),
        (["--memory", "1kB"], "no expert fits"),
    ],
)
def test_mistakes_are_told(traced, capsys, arguments, message):
    assert main(["simulate", str(traced / "trace"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
