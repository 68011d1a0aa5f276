"""A super expert that was planted is found, with the massive activation and the attention sink that hang on it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moekit
import zoo
from moekit import methods, refmoe
from moekit.cli import _register, app
from moekit.data import Batch, Dataset
from moekit.errors import PlanError
from moekit.evaluation.sinks import LayerState, Sinks, sinks
from moekit.families.model import Model
from moekit.layout import ExpertId
from moekit.view import MoEView
from tiny import batch

LAYERS, LENGTH, FIRST = 5, 24, 1  # every sequence begins with token FIRST
PLANTED = ExpertId(1, 6)
BEGIN, ALWAYS, MASSIVE = 0, 1, 2  # coordinates: 1 for the first token, 1 for all, where the super expert writes


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A Mixtral in which one expert of layer 1 writes 400 for the first token, at which later heads look."""
    stock = zoo.build(
        "mixtral",
        num_hidden_layers=LAYERS,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    embedding = stock.get_input_embeddings().weight.data
    embedding[:, [BEGIN, MASSIVE]] = 0.0
    embedding[FIRST, BEGIN] = 20.0
    embedding[:, ALWAYS] = 4.0
    for index, layer in enumerate(stock.model.layers):
        experts, router = layer.mlp.experts, layer.mlp.gate.weight.data
        router[:, BEGIN] = 0.0
        if index == PLANTED.layer:
            router[PLANTED.expert] = 0.0
            router[PLANTED.expert, BEGIN], router[PLANTED.expert, ALWAYS] = 4.0, -4.0
            gate, up = experts.gate_up_proj.data[PLANTED.expert].chunk(2)
            for part in (gate, up):
                part[0] = 0.0
                part[0, BEGIN] = 1.0
            experts.down_proj.data[PLANTED.expert, MASSIVE, 0] = 20.0
        if index > PLANTED.layer:  # the slowest rotary dimension of a head hardly turns
            width = layer.self_attn.head_dim
            for projection, coordinate, size in (("k_proj", MASSIVE, 1.5), ("q_proj", ALWAYS, 1.5)):
                weight = getattr(layer.self_attn, projection).weight.data
                weight[:, MASSIVE] = 0.0
                weight[width - 1 :: width, coordinate] = size
    folder = tmp_path_factory.mktemp("planted") / "model"
    stock.save_pretrained(folder)
    return Model.open(folder)


@pytest.fixture(scope="module")
def data() -> Dataset:
    parts = [batch(0, LENGTH, LENGTH, LENGTH - 6), batch(1, LENGTH, 9)]
    for part in parts:
        part.ids[:, 0] = FIRST
    return Dataset(("code", "prose"), parts, LENGTH)


@pytest.fixture(scope="module")
def seen(model, data) -> Sinks:
    return sinks(model, data, [PLANTED])


def test_the_planted_expert_is_the_only_one_found(model, data):
    stats = moekit.measure(model, data, groups=("scores",))
    assert methods.super_experts(stats, model.layout) == {PLANTED}
    first, second, *_ = methods.peaks(stats, model.layout)
    assert first.expert == PLANTED
    assert first.over_median > 100
    assert first.peak > 50 * second.peak
    sequences = sum(len(x.ids) for x in data.batches)
    assert first.share == pytest.approx(sequences / sum(data.tokens.values()))  # it fires on the first token only


def test_its_massive_activation_is_seen_and_goes_with_it(seen):
    for layer, runs in seen.layers.items():
        assert runs["as_is"].massive == runs["control"].massive == (layer >= PLANTED.layer)
        assert not runs["without"].massive
        if layer >= PLANTED.layer:
            assert (runs["as_is"].position, runs["as_is"].coordinate) == (0, MASSIVE)
            assert runs["as_is"].top_share > 0.99
            assert runs["as_is"].largest > 20 * runs["without"].largest
        else:
            assert runs["as_is"] == runs["without"] == runs["control"]


def test_the_attention_sink_goes_with_it(seen):
    for layer, runs in seen.layers.items():
        before, without, control = (runs[x].mean_sink for x in ("as_is", "without", "control"))
        assert len(runs["as_is"].sink) == 4
        if layer > PLANTED.layer:
            assert before > 0.9
            assert without < 0.4
            assert control == pytest.approx(before, abs=0.02)
    assert seen.decay() > 0.6
    assert abs(seen.decay("control")) < 0.02
    assert seen.control
    assert all(x.layer == PLANTED.layer and x != PLANTED for x in seen.control)


def by_hand(live: torch.nn.Module, path: str, part: Batch) -> dict[int, LayerState]:
    """The same from hidden states and attention weights as stock transformers gives them."""
    outputs, attentions, handles, states = {}, {}, [], {}
    for index, layer in enumerate(live.get_submodule(path)):

        def keep(_module, _args, out, index=index):
            outputs[index] = out[0] if isinstance(out, tuple) else out

        def look(_module, _args, out, index=index):
            attentions[index] = out[1]

        handles += [layer.register_forward_hook(keep), layer.self_attn.register_forward_hook(look)]
    with torch.inference_mode():
        live(input_ids=part.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    lengths = part.mask.sum(1).tolist()
    for index, output in outputs.items():
        rows = [output[row, :length].reshape(length, -1).abs() for row, length in enumerate(lengths)]
        every = torch.cat(rows)
        found = next((r, p) for r in rows for p in range(len(r)) if float(r[p].max()) == float(every.max()))
        squares = [np.sort(r[0].double().numpy() ** 2) for r in rows]
        weights, sink = attentions[index], ()
        if weights is not None and weights.shape[-2:] == part.ids.shape[1:] * 2:
            queries = [weights[row, :, t, 0].double().numpy() for row, n in enumerate(lengths) for t in range(1, n)]
            sink = tuple(np.mean(queries, 0).tolist())
        states[index] = LayerState(
            float(every.max()), found[1], int(found[0][found[1]].argmax()), float(every.median()),
            float(np.mean([x[-3:].sum() / x.sum() for x in squares])), sink,
        )  # fmt: skip
    return states


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm5_next"])
def test_numbers_are_those_of_a_plain_loop(opened, family):
    model = opened(family)
    part = batch(0, 12, 7)
    first, *_, last = [x.index for x in model.layout.routed]
    off = [ExpertId(last, 2), ExpertId(first, 0)]
    found = sinks(model, Dataset(("code",), [part], 12), off, dtype=torch.float32)
    live = model.load(torch.float32)
    live.set_attn_implementation("eager")
    view, path = MoEView(live, model.layout), model.understanding.experts[0].layers_path
    for run, removed in (("as_is", ()), ("without", found.experts), ("control", found.control)):
        scaled = [view.scale({x.layer: {x.expert: 0.0}}) for x in removed]
        with contextlib.ExitStack() as stack:
            for context in scaled:
                stack.enter_context(context)
            states = by_hand(live, path, part)
        for index, runs in found.layers.items():
            for name, value in asdict(states[index]).items():
                assert asdict(runs[run])[name] == pytest.approx(value, rel=1e-4), (run, index, name)
    assert found.layers[last]["as_is"] != found.layers[last]["without"] != found.layers[last]["control"]
    for run in ("without", "control"):
        behind = [x for index, x in found.layers.items() if index > first and x["as_is"].sink]
        sums = [sum(np.mean(x[name].sink) for x in behind) for name in ("as_is", run)]
        assert found.decay(run) == pytest.approx(1 - sums[1] / sums[0])


def test_padding_is_not_looked_at(model):
    """Massive where it is read, and it is read nowhere."""
    data = Dataset(("code",), [batch(0, LENGTH, 9, pad=FIRST)], LENGTH)
    assert not any(runs["as_is"].massive for runs in sinks(model, data, [PLANTED]).layers.values())


def test_massive_is_large_and_far_above_the_rest():
    values = [(99.0, 0.01, False), (101.0, 0.1, True), (101.0, 0.102, False)]
    assert [LayerState(x, 0, 0, median, 1.0, ()).massive for x, median, _ in values] == [x for *_, x in values]


def test_nobody_is_refused(model, data):
    with pytest.raises(PlanError):
        sinks(model, data, [])


@pytest.fixture(scope="module")
def run():
    """Runs a command line."""
    _register()

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        assert result.exception is None, result.output
        return result.output

    return call


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["--data", f"kjv={refmoe.texts()['kjv']}", "--tokens", "128", "--sequence-length", "32"]


def test_the_verb_says_that_there_is_none(run, texts):
    out = run("super", "refmoe", *texts)
    assert "no super expert" in out
    assert "5." in out


def test_the_verb_looks_at_experts_by_name(run, texts, talker, tmp_path):
    out = run("super", talker, *texts, "--expert", "0.1", "--expert", "1.3", "--out", tmp_path / "super.json")
    assert "no massive activations" in out
    assert "attention to the first position" in out
    assert "kjv: loss" in out
    saved = json.loads((tmp_path / "super.json").read_text())
    assert saved["sinks"]["experts"] == ["0.1", "1.3"]
    assert set(saved["sinks"]["layers"]) == {"0", "1", "2"}
    assert saved["ablation"]["rows"][0]["experts"] == "0.1+1.3"
    assert json.loads(run("super", talker, *texts, "--expert", "0.1", "--expert", "1.3", "--json")) == saved
