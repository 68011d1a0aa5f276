"""Relevance of experts between kinds of prompts: on constructed routing, and against a loop over prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moekit
from moekit.cli import _register, app
from moekit.data import Batch, Dataset
from moekit.errors import DataError
from moekit.families.seam import Observer
from moekit.layout import ExpertId
from moekit.methods.ftri import ftri, relevance
from moekit.stats import PER_SEQUENCE, LayerStats, Stats
from moekit.view import MoEView
from synthetic import layout as make_layout
from tiny import batch, dataset

EXPERTS = 6
KINDS = ("refused", "answered", "chat")


def from_prompts(prompts: dict[str, list[list[list[int]]]], weights: float = 0.5) -> Stats:
    """Statistics of one layer from prompts: kind -> prompts -> tokens -> chosen experts."""
    shape = make_layout(1, EXPERTS, 2)
    arrays = {name: np.zeros((len(prompts), EXPERTS)) for name in ("count", "gate_mass", *PER_SEQUENCE)}
    for kind, several in enumerate(prompts.values()):
        for tokens in several:
            share = np.bincount(np.concatenate(tokens), minlength=EXPERTS) / len(tokens)
            for name, mean in (("share", share), ("mass", weights * share)):
                arrays[f"sequence_{name}"][kind] += mean
                arrays[f"sequence_{name}_sq"][kind] += mean**2
    tokens = np.array([sum(map(len, x)) for x in prompts.values()])
    sequences = np.array([len(x) for x in prompts.values()])
    return Stats(shape.hash, tuple(prompts), tokens, sequences, {1: LayerStats(arrays)}, {"layout": shape.to_dict()})


# Expert 4 answers to refusals in short and long prompts alike; expert 1 only where prompts are long, which refused ones
# are not; expert 0 is in every token.
CONSTRUCTED = {
    "refused": [[[0, 4]] * 2, [[0, 4]] * 4, [[0, 4], [0, 5]]],
    "answered": [[[0, 1]] * 40, [[0, 1]] * 30 + [[0, 4]] * 10],
    "chat": [[[0, 2]] * 5] * 3,
}


def test_constructed_routing_is_seen():
    stats = from_prompts(CONSTRUCTED)
    first, second, *rest = ftri(stats, stats.layout, "refused", "answered")
    assert first[:2] == (ExpertId(1, 4), "refused")
    assert (first.rate, first.others) == pytest.approx(((1 + 1 + 0.5) / 3, 0.125))
    assert first.difference == pytest.approx(2.5 / 3 - 0.125)
    half = 1.96 * np.sqrt(np.var([1, 1, 0.5], ddof=1) / 3 + np.var([0, 0.25], ddof=1) / 2)
    assert (first.low, first.high) == pytest.approx((first.difference - half, first.difference + half))
    assert (second.expert, second.difference) == (ExpertId(1, 5), pytest.approx(0.5 / 3))
    assert [x.expert.expert for x in rest] == [0, 2, 3, 1]  # ties by number, those of the other kind last
    assert rest[-1].difference == pytest.approx(-0.875)


def test_other_kinds_are_pooled_prompt_by_prompt():
    stats = from_prompts(CONSTRUCTED)
    first = ftri(stats, stats.layout, "refused", top=1)[0]
    assert first.others == pytest.approx(0.25 / 5)  # two answered, three chats
    assert ftri(stats, stats.layout, "refused", ["answered", "chat"], top=1) == [first]
    rate, others, _ = relevance(stats, 1, "chat", "refused")
    assert (rate - others)[[0, 2, 4]] == pytest.approx([0, 1, -2.5 / 3])


def test_without_a_kind_every_expert_has_its_best():
    stats = from_prompts(CONSTRUCTED)
    best = {x.expert.expert: x for x in ftri(stats, stats.layout)}
    assert {e: x.domain for e, x in best.items() if e} == {
        4: "refused", 2: "chat", 1: "answered", 5: "refused", 3: best[3].domain,
    }  # fmt: skip
    for e, x in best.items():
        assert x.difference == max(
            y.difference for k in KINDS for y in ftri(stats, stats.layout, k) if y.expert[1] == e
        )


def test_mass_weighs_the_choices():
    stats = from_prompts(CONSTRUCTED, weights=0.25)
    share, mass = (ftri(stats, stats.layout, "refused", by=x, top=1)[0] for x in ("share", "mass"))
    assert mass.expert == share.expert
    assert mass[2:] == pytest.approx(np.multiply(share[2:], 0.25))


def test_one_prompt_has_no_interval():
    stats = from_prompts({"refused": [[[0, 4]]], "answered": [[[0, 1]], [[0, 1]]]})
    first = ftri(stats, stats.layout, "refused", top=1)[0]
    assert first.difference == 1
    assert np.isnan([first.low, first.high]).all()


@pytest.mark.parametrize(
    ("domain", "against", "said"),
    [
        ("refused", "refused", "two kinds"),
        ("refuse", None, "refused"),
        ("refused", "chatt", "chat"),
        ("refused", [], "nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused(domain, against, said):
    stats = from_prompts(CONSTRUCTED)
    with pytest.raises(DataError, match=said):
        ftri(stats, stats.layout, domain, against)


def test_one_kind_is_not_enough_and_options_are_checked():
    stats = from_prompts({"refused": CONSTRUCTED["refused"]})
    with pytest.raises(DataError, match="second domain"):
        ftri(stats, stats.layout)
    with pytest.raises(DataError, match="share"):
        ftri(stats, stats.layout, by="shar")
    empty = from_prompts({"refused": CONSTRUCTED["refused"], "answered": []})
    with pytest.raises(DataError, match="answered"):
        ftri(empty, empty.layout, "refused")


@pytest.mark.parametrize("family", ["qwen3_moe", "zaya"])
def test_sums_over_sequences_are_those_of_a_loop(opened, family):
    model = opened(family)
    data = dataset(batch(0, 12, 9, 1), batch(0, 7, 7, seed=1), batch(1, 10, 2))
    stats = moekit.measure(model, data, groups=())
    live = model.load()
    view = MoEView(live, model.layout)
    rows: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    class Keep(Observer):
        domain = 0

        def routed(self, call):
            share, mass = np.zeros((2, call.layer.num_experts + 1))
            for ids, weights in zip(call.ids, call.weights.float(), strict=True):
                for e, w in zip(ids.tolist(), weights.tolist(), strict=True):
                    share[e] += 1 / len(call.ids)
                    mass[e] += w / len(call.ids)
            rows.setdefault((call.layer.index, self.domain), []).append((share[:-1], mass[:-1]))

    keep = Keep()
    with view.watch(keep), torch.inference_mode():
        for part in data.batches:
            keep.domain = part.domain
            for ids, mask in zip(part.ids, part.mask, strict=True):
                live(input_ids=ids[mask][None], use_cache=False)
    for (layer, domain), found in rows.items():
        arrays = stats.layers[layer].arrays
        for number, name in enumerate(("share", "mass")):
            values = np.stack([x[number] for x in found])
            assert arrays[f"sequence_{name}"][domain] == pytest.approx(values.sum(0), rel=1e-4, abs=1e-6)
            assert arrays[f"sequence_{name}_sq"][domain] == pytest.approx((values**2).sum(0), rel=1e-4, abs=1e-6)
        assert (arrays["count"][domain] == np.rint(arrays["count"][domain])).all()
    both = stats.select("code") + stats.select("prose")
    assert ftri(both, model.layout, "code") == ftri(stats, model.layout, "code")


def test_padding_is_no_activity(opened):
    model = opened("qwen3_moe")
    part = batch(0, 12, 5)
    other = Batch(0, part.ids.masked_fill(~part.mask, 37), part.mask)
    one, two = (moekit.measure(model, Dataset(("code",), [x], 12), groups=()) for x in (part, other))
    for name in PER_SEQUENCE:
        assert one.get(name, 1) == pytest.approx(two.get(name, 1))


def test_the_verb(tmp_path):
    _register()
    from_prompts(CONSTRUCTED).save(tmp_path / "stats")
    out = CliRunner().invoke(app, ["ftri", str(tmp_path / "stats"), "--of", "refused", "--against", "answered"]).output
    assert out.splitlines()[1].split()[:4] == ["1.4", "refused", "0.833", "0.125"]
    assert "refused 3, answered 2, chat 3" in out
    found = CliRunner().invoke(app, ["ftri", str(tmp_path / "stats"), "--top", "2", "--by", "mass", "--json"])
    assert [x["expert"] for x in json.loads(found.output)] == ["1.2", "1.1"]
    with pytest.raises(DataError, match="nowhere"):
        raise CliRunner().invoke(app, ["ftri", "nowhere"]).exception
