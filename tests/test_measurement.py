"""Statistics are what a plain loop over tokens and experts gives, however the model was run and the text was cut."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import silu, softplus

from moekit.data import Batch, Dataset
from moekit.errors import DataError, ModelError, OutputError, PlanError
from moekit.families.model import Model
from moekit.families.probe import SCORES, log_scores
from moekit.measurement import Gatherer, measure
from moekit.stats import FIELDS, GROUPS, POSITION_BUCKETS, RATIO_BINS, Stats, position_bucket
from moekit.view import MoEView, Observer
from tiny import batch, dataset

DOMAINS = ("code", "prose")
EXACT = {"count", "coactivation", "transition", "position_tokens", "weight_ratio"}


DATA = dataset(batch(0, 12, 9, 1), batch(0, 7, 7, seed=1), batch(1, 10, 2))


def stats_of(model: Model, data: Dataset = DATA, **settings: object) -> Stats:
    return measure(model, data, dtype=torch.float32, **settings)


def assert_same(a: Stats, b: Stats, rtol: float = 0.0) -> None:
    """Counts to the unit, sums to `rtol`."""
    assert (a.layout_hash, a.domains, a.layers.keys()) == (b.layout_hash, b.domains, b.layers.keys())
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.sequences.tolist() == b.sequences.tolist()
    for index, layer in a.layers.items():
        other = b.layers[index]
        assert layer.arrays.keys() == other.arrays.keys()
        for name, array in layer.arrays.items():
            tolerance = 0.0 if name in EXACT else rtol
            scale = np.abs(array).max(initial=0.0)
            np.testing.assert_allclose(other.arrays[name], array, tolerance, tolerance * scale, err_msg=name)
        np.testing.assert_array_equal(other.vocabulary, layer.vocabulary)
        np.testing.assert_array_equal(other.following, layer.following)


# ---- against a loop


class Loop:
    """Every field by its definition, token by token and expert by expert, from hooks on the stock model.

    For families whose router returns (logits, weights, ids) and whose experts are down(silu(gate x) * up x).
    """

    def __init__(self, model: Model, data: Dataset):
        self.layers = [layer.index for layer in model.layout.routed]
        self.layout, self.loaded, self.data = model.layout, model.load(torch.float32), data
        self.loaded.set_experts_implementation("eager")
        self.sums = {i: {} for i in self.layers}
        self.words = {i: (Counter(), Counter()) for i in self.layers}
        for part in data.batches:
            self.run(part)

    def run(self, part: Batch) -> None:
        seen: dict[tuple[str, int], torch.Tensor | tuple] = {}
        handles = []
        for i in self.layers:
            layer = self.loaded.model.layers[i]
            for name, module in (("router", layer.mlp.gate), ("experts", layer.mlp.experts)):

                def note(_module: object, args: tuple, out: object, key: tuple = (name, i)) -> None:
                    seen[key] = (args, out)

                handles.append(module.register_forward_hook(note))
            handles.append(
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _module, args, key=("residual", i): seen.update({key: args[0]})
                )
            )
        with torch.inference_mode():
            self.loaded(input_ids=part.ids)
        for handle in handles:
            handle.remove()
        for row, length in enumerate(part.mask.sum(1).tolist()):
            previous: list[int] | None = None
            shares = {i: np.zeros((2, self.layout.by_index[i].num_experts)) for i in self.layers}
            for position in range(length):
                flat = row * part.ids.shape[1] + position
                previous = None
                for i in self.layers:
                    logits, weights, chosen = (x[flat].double() for x in seen["router", i][1])
                    hidden = seen["experts", i][0][0][flat].double()
                    residual = seen["residual", i][row, position].double()
                    ids = chosen.long().tolist()
                    following = int(part.ids[row, position + 1]) if position + 1 < length else -1
                    self.token(i, part.domain, position, logits, weights, ids, hidden, residual, previous)
                    for counts, word in zip(self.words[i], (int(part.ids[row, position]), following), strict=True):
                        if word >= 0:
                            counts.update((part.domain, word, e) for e in ids)
                    for weight, e in zip(weights.tolist(), ids, strict=True):
                        shares[i][:, e] += np.array([1.0, weight]) / length
                    previous = ids
            for i in self.layers:
                for name, values in zip(("sequence_share", "sequence_mass"), shares[i], strict=True):
                    self.add(i, name, part.domain, values)
                    self.add(i, f"{name}_sq", part.domain, values**2)

    def token(
        self,
        index: int,
        domain: int,
        position: int,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: list[int],
        hidden: torch.Tensor,
        residual: torch.Tensor,
        previous: list[int] | None,
    ) -> None:
        layer = self.layout.by_index[index]
        experts = self.loaded.model.layers[index].mlp.experts
        E = layer.num_experts
        outputs = {}
        for e in ids:
            gate, up = (experts.gate_up_proj[e].detach().double() @ hidden).chunk(2)
            outputs[e] = experts.down_proj[e].detach().double() @ (silu(gate) * up)
        routed = sum(w * outputs[e] for w, e in zip(weights, ids, strict=True))
        shift = max(0.0, 1 - float(torch.cosine_similarity(residual, residual + routed, dim=0)))
        for weight, e in zip(weights.tolist(), ids, strict=True):
            norm = float(outputs[e].norm())
            one = np.eye(E)[e]
            self.add(index, "count", domain, one)
            self.add(index, "gate_mass", domain, weight * one)
            self.add(index, "norm", domain, norm * one)
            self.add(index, "norm_sq", domain, norm**2 * one)
            self.add(index, "gated_norm", domain, weight * norm * one)
            self.add(index, "gated_norm_sq", domain, (weight * norm) ** 2 * one)
            self.add(index, "easy_ep", domain, shift * weight * norm * one)
            self.add(index, "output", domain, np.outer(one, outputs[e]))
            self.add(index, "gated_output", domain, weight * np.outer(one, outputs[e]))
            peaks = self.sums[index].setdefault("peak", np.zeros((len(DOMAINS), E)))
            peaks[domain, e] = max(peaks[domain, e], float(outputs[e].abs().max()))
            for other in ids:
                self.add(index, "coactivation", domain, np.outer(one, np.eye(E)[other]))
            for before in previous or ():
                first = self.layout.by_index[self.layers[self.layers.index(index) - 1]].num_experts
                self.add(index, "transition", domain, np.outer(np.eye(first)[before], one))
        self.add(index, "routed_norm_sq", domain, np.array(float(routed.norm()) ** 2))
        self.add(index, "logit", domain, logits.numpy())
        self.add(index, "logit_gram", domain, np.outer(logits, logits))
        scores = logits.sigmoid() if layer.router.score == "sigmoid" else logits.softmax(0)
        scores = (scores / scores.sum()).tolist()
        margin = min(scores[e] for e in ids) - max(scores[e] for e in range(E) if e not in ids)
        bucket = np.eye(POSITION_BUCKETS)[0 if position == 0 else int(math.log2(position)) + 1]
        self.add(index, "position_tokens", domain, bucket)
        self.add(index, "entropy", domain, bucket * -sum(p * math.log(p) for p in scores))
        self.add(index, "margin", domain, bucket * margin)
        first, *others = sorted(weights.tolist(), reverse=True)
        ratios = np.zeros((len(others), RATIO_BINS))
        for rank, weight in enumerate(others):
            ratios[rank, min(int(weight / first * RATIO_BINS), RATIO_BINS - 1)] = 1
        self.add(index, "weight_ratio", domain, ratios)

    def add(self, index: int, name: str, domain: int, values: np.ndarray) -> None:
        sums = self.sums[index].setdefault(name, np.zeros((len(DOMAINS), *values.shape)))
        sums[domain] += values


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_every_field_is_what_a_loop_over_tokens_gives(opened, family):
    stats, loop = stats_of(opened(family)), Loop(opened(family), DATA)
    for number, (index, layer) in enumerate(stats.layers.items()):
        expected = loop.sums[index]
        assert layer.arrays.keys() == expected.keys()
        taken = {name for name, (group, *_) in FIELDS.items() if group in GROUPS}
        assert layer.arrays.keys() == taken - ({"transition"} if number == 0 else set())
        for name, array in layer.arrays.items():
            tolerance = 0.0 if name in EXACT else 1e-4 if name == "easy_ep" else 1e-5
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(array, expected[name], tolerance, tolerance * scale, err_msg=name)
        for rows, counts in zip((layer.vocabulary, layer.following), loop.words[index], strict=True):
            assert [tuple(row) for row in rows.tolist()] == sorted((*key, n) for key, n in counts.items())


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softplus-sqrt", "relu"])
def test_entropy_and_margin_are_of_the_routers_own_scores(score):
    """For every score function, with banned experts (the lowest number there is) counting for nothing."""
    logits = torch.tensor([[3.0, 1.0, -2.0, 0.5, -30.0], [-1.0, 2.0, 4.0, -torch.finfo(torch.float32).max, 0.1]])
    scores = SCORES[score](logits.double())
    p = (scores / scores.sum(-1, keepdim=True)).clamp_min(1e-300)
    logs = log_scores(score, logits).log_softmax(-1)
    assert torch.allclose(logs.exp().double(), p, atol=1e-6)
    entropy = -(logs.exp() * logs).sum(-1)
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_deepseek_v4_is_measured_by_softplus_sqrt(opened):
    """The one family whose scores are neither softmax nor sigmoid; softmax of its logits would say otherwise."""
    model = opened("deepseek_v4")
    layer = model.layout.routed[-1]
    assert layer.router.score == "softplus-sqrt"
    view = MoEView(model.load(torch.float32), model.layout)
    seen = []
    gatherer = Gatherer(model.layout.routed, len(DOMAINS), ["routing"])

    class See(Observer):
        def routed(self, call):
            if call.layer.index == layer.index:
                seen.append((call.logits.double(), call.ids))

    part = batch(0, 12)
    gatherer.batch = (0, part)
    with view.watch(See()), view.watch(gatherer), torch.inference_mode():
        view.model(input_ids=part.ids)
    ((logits, ids),) = seen
    p = softplus(logits).sqrt()
    p = p / p.sum(-1, keepdim=True)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, ids, True)
    margin = p.masked_fill(~chosen, 2.0).amin(-1) - p.masked_fill(chosen, -1.0).amax(-1)
    sums = gatherer.sums[layer.index]
    assert float(sums["entropy"].sum()) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert float(sums["margin"].sum()) == pytest.approx(float(margin.sum()), rel=1e-4, abs=1e-6)
    softmax = logits.softmax(-1)
    assert float(sums["entropy"].sum()) != pytest.approx(float(-(softmax * softmax.log()).sum()), rel=1e-3)


def test_a_tie_of_scores_may_be_chosen_either_way_and_no_more(opened):
    """Softmax gives logits that differ in the last bit one score; top-k then takes either."""
    layer = opened("qwen3_moe").layout.routed[0]
    gatherer = Gatherer([layer], 1, ["routing"])
    logits = torch.tensor([[3.0, 2.0, 2.0 + 2**-22, -1.0, -2.0, -2.0, -2.0, -2.0]])
    _, margin = gatherer._confidence(layer, logits, torch.tensor([[0, 1]]))
    assert abs(float(margin)) < 1e-6
    with pytest.raises(ModelError, match=r"do not favour|do not agree"):
        gatherer._confidence(layer, logits, torch.tensor([[0, 3]]))


def test_position_buckets_are_powers_of_two():
    found = position_bucket(np.arange(40)).tolist()
    assert found == [0] + [1] + [2] * 2 + [3] * 4 + [4] * 8 + [5] * 16 + [6] * 8
    assert position_bucket(np.array([1 << 40])).tolist() == [POSITION_BUCKETS - 1]


# ---- however it is run


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "llama4_text", "gemma4_text", "zaya", "deepseek_v4"]
)
def test_streamed_equals_in_memory(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    gatherer = Gatherer(model.layout.routed, len(DOMAINS))
    for number, part in enumerate(DATA.batches):
        gatherer.batch = (number, part)
        with view.watch(gatherer), torch.inference_mode():
            view.model(input_ids=part.ids)
    tokens = sum(DATA.tokens.values())
    streamed = stats_of(model)
    layers = {layer.index: gatherer.take(layer.index, tokens) for layer in model.layout.routed}
    assert_same(dataclasses.replace(streamed, layers=layers), streamed, rtol=1e-6)


def test_padding_counts_nowhere(opened):
    model = opened("qwen3_moe")
    plain = stats_of(model)
    padded = [Batch(x.domain, x.ids.masked_fill(~x.mask, 37), x.mask) for x in DATA.batches]
    wider = [
        Batch(
            x.domain,
            torch.nn.functional.pad(x.ids, (0, 5), value=9),
            torch.nn.functional.pad(x.mask, (0, 5), value=False),
        )
        for x in DATA.batches
    ]
    assert_same(stats_of(model, dataset(*padded)), plain, rtol=1e-5)
    assert_same(stats_of(model, dataset(*wider)), plain, rtol=1e-5)


def test_however_it_is_batched(opened):
    model = opened("qwen3_moe")
    rows = [
        Batch(x.domain, x.ids[i : i + 1, : int(x.mask[i].sum())], x.mask[i : i + 1, : int(x.mask[i].sum())])
        for x in DATA.batches
        for i in range(len(x.ids))
    ]
    assert_same(stats_of(model, dataset(*rows)), stats_of(model), rtol=1e-5)


def test_spilling_changes_nothing(opened):
    assert_same(stats_of(opened("qwen3_moe"), spill_bytes=0), stats_of(opened("qwen3_moe")))


@pytest.mark.parametrize("groups", [(), ("scores",), ("outputs",), ("routing",), ("vocabulary",)])
def test_groups_are_parts_of_the_whole(opened, groups):
    part, whole = (stats_of(opened("qwen3_moe"), **x) for x in ({"groups": groups}, {}))
    for index, layer in part.layers.items():
        assert {"count", "gate_mass"} <= layer.arrays.keys()
        assert {FIELDS[x][0] for x in layer.arrays} <= {"scores", *groups}
        for name, array in layer.arrays.items():
            np.testing.assert_array_equal(array, whole.layers[index].arrays[name])
        assert len(layer.vocabulary) == len(layer.following) == 0 or groups == ("vocabulary",)
    if groups == ("vocabulary",):
        np.testing.assert_array_equal(layer.vocabulary, whole.layers[index].vocabulary)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "minimax_m2", "gpt_oss", "granitemoe"])
def test_renormalised_weights_add_up_to_the_scaling(opened, family):
    model = opened(family)
    stats = stats_of(model, groups=())
    for layer in model.layout.routed:
        assert layer.router.renormalised
        total = stats.layers[layer.index].arrays["gate_mass"].sum(1)
        np.testing.assert_allclose(total, stats.tokens * layer.router.scaling, 1e-5)


def test_tokens_and_slots_add_up(opened):
    model = opened("qwen3_moe")
    stats = stats_of(model)
    assert stats.tokens.tolist() == [12 + 9 + 1 + 7 + 7, 10 + 2]
    assert stats.sequences.tolist() == [5, 2]
    for layer in model.layout.routed:
        arrays = stats.layers[layer.index].arrays
        assert arrays["count"].sum(1).tolist() == (stats.tokens * layer.top_k).tolist()
        assert arrays["position_tokens"].sum(1).tolist() == stats.tokens.tolist()
        assert arrays["position_tokens"][:, 0].tolist() == stats.sequences.tolist()


# ---- interrupted


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("family", ["qwen3_moe", "zaya"])
def test_interrupted_anywhere_and_resumed_gives_the_same(opened, family, tmp_path):
    model = opened(family)
    whole = stats_of(model)
    for moment in range(1, len(DATA.batches) * model.layout.num_layers + 1):
        work = tmp_path / f"{moment}"

        def stop(_stage: str, done: int, _total: int, at: int = moment) -> None:
            if done == at:
                raise StopError

        with pytest.raises(StopError):
            stats_of(model, workdir=work, checkpoint_s=0, progress=stop)
        ran = []
        found = stats_of(model, workdir=work, checkpoint_s=0, progress=lambda *x, ran=ran: ran.append(x))
        assert_same(found, whole)
        assert len(ran) == len(DATA.batches) * (model.layout.num_layers - (moment - 1) // len(DATA.batches))
        assert not work.exists()


def test_what_other_data_left_is_not_mixed_in(opened, tmp_path):
    """A is interrupted, B is interrupted in the same folder, A is run again: none of B's layers may be in it."""
    model, other = opened("qwen3_moe"), dataset(batch(0, 12, seed=5), batch(1, 12, seed=5), batch(1, 3, seed=6))

    def stop_at(at: int):
        def stop(_stage: str, done: int, _total: int) -> None:
            if done == at:
                raise StopError

        return stop

    for data, moment, seconds in ((DATA, 8, 0.0), (other, 5, 1e9)):
        with pytest.raises(StopError):
            stats_of(model, data, workdir=tmp_path / "work", checkpoint_s=seconds, progress=stop_at(moment))
    assert_same(stats_of(model, workdir=tmp_path / "work", checkpoint_s=0), stats_of(model))


def test_only_its_own_files_are_removed_from_the_workdir(opened, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "layer-cake").mkdir()
    stats_of(opened("qwen3_moe"), workdir=tmp_path, checkpoint_s=0)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["layer-cake", "thesis.tex"]


# ---- as data


def test_statistics_add_up(opened):
    model = opened("qwen3_moe")
    whole = stats_of(model)
    first, second, third = (stats_of(model, dataset(x)) for x in DATA.batches)
    assert_same(first + second + third, whole, rtol=1e-6)
    assert_same(third + (second + first), whole, rtol=1e-6)


def test_statistics_of_unlike_domains_add_up(opened):
    model = opened("qwen3_moe")
    a = stats_of(model, dataset(batch(0, 12), batch(1, 9), domains=("code", "prose")))
    b = stats_of(model, dataset(batch(0, 7, seed=3), batch(1, 5, seed=3), domains=("verse", "code")))
    both = a + b
    assert both.domains == ("code", "prose", "verse")
    assert both.tokens.tolist() == [12 + 5, 9, 7]
    for name in ("count", "norm", "peak"):
        for domain in both.domains:
            parts = [x.get(name, 1, domain) for x in (a, b) if domain in x.domains]
            expected = np.max(parts, 0) if name == "peak" else np.sum(parts, 0)
            np.testing.assert_allclose(both.get(name, 1, domain), expected)
    for domain in both.domains:
        rows = both.select(domain).layers[1].vocabulary
        assert rows[:, 3].sum() == 2 * both.token_count(domain)
    assert set(both.layers[1].vocabulary[:, 0]) == {0, 1, 2}


def test_statistics_of_different_models_refuse_to_add(opened):
    with pytest.raises(PlanError, match="different models"):
        stats_of(opened("qwen3_moe")) + stats_of(opened("mixtral"))
    with pytest.raises(PlanError, match="different models"):  # other weights in the same layout
        stats_of(opened("qwen3_moe")) + stats_of(opened("qwen3_moe", seed=1))


def test_sum_of_unlike_groups_keeps_what_both_have(opened):
    """Half of the counts would be a wrong number."""
    model = opened("qwen3_moe")
    both = stats_of(model) + stats_of(model, groups=("scores",))
    assert {FIELDS[x][0] for x in both.layers[1].arrays} == {"scores"}
    assert len(both.layers[1].vocabulary) == len(both.layers[1].following) == 0


def test_saved_and_loaded(opened, tmp_path):
    stats = stats_of(opened("qwen3_moe"))
    stats.save(tmp_path / "a" / "stats")
    found = Stats.load(tmp_path / "a" / "stats")
    assert_same(found, stats)
    assert found.manifest == json.loads(json.dumps(stats.manifest))
    assert found.layout.hash == opened("qwen3_moe").layout.hash
    assert_same(found + found, stats + stats)
    assert (found + found).layout.hash == stats.layout.hash
    stats.save(tmp_path / "a" / "stats")  # over the old
    assert [x.name for x in (tmp_path / "a").iterdir()] == ["stats"]


def damage(folder: Path, kind: str) -> None:
    head, layer = folder / "stats.json", folder / "layer-0001.safetensors"
    if kind == "layer gone":
        layer.unlink()
    elif kind == "layer short":
        layer.write_bytes(layer.read_bytes()[:-1])
    elif kind == "layer header":
        layer.write_bytes(b"\xff" * 64 + layer.read_bytes()[64:])
    elif kind == "head gone":
        head.unlink()
    elif kind == "schema":
        head.write_text(json.dumps(json.loads(head.read_text()) | {"schema": 0}))
    elif kind == "key gone":
        head.write_text(json.dumps({"schema": json.loads(head.read_text())["schema"]}))
    elif kind == "tokens":
        head.write_text(json.dumps(json.loads(head.read_text()) | {"tokens": ["many"]}))
    else:
        head.write_text(kind)


@pytest.mark.parametrize(
    "kind",
    ["layer gone", "layer short", "layer header", "head gone", "schema", "key gone", "tokens", "{", "[]", "3", ""],
)
def test_damaged_statistics(opened, tmp_path, kind):
    stats_of(opened("qwen3_moe"), groups=()).save(tmp_path / "stats")
    damage(tmp_path / "stats", kind)
    with pytest.raises(DataError, match=r"(?s)where: .*stats"):
        Stats.load(tmp_path / "stats").get("count", 1)


@pytest.mark.parametrize("name", ["thesis.tex", "stats"])
def test_statistics_replace_nothing_but_statistics(opened, tmp_path, name):
    (tmp_path / "stats").mkdir() if name == "thesis.tex" else None
    file = tmp_path / "stats" / name if name == "thesis.tex" else tmp_path / "stats"
    file.write_text("dear")
    with pytest.raises(OutputError, match="holds something else"):
        stats_of(opened("qwen3_moe"), groups=()).save(tmp_path / "stats")
    assert file.read_text() == "dear"


def test_names_are_suggested(opened):
    stats = stats_of(opened("qwen3_moe"), groups=("scores",))
    for call, message in [
        (lambda: stats.get("cuont", 1), "did you mean 'count'"),
        (lambda: stats.get("entropy", 1), "measure with the group 'routing'"),
        (lambda: stats.get("count", 1, "cod"), "did you mean 'code'"),
        (lambda: stats.select("pros"), "did you mean 'prose'"),
        (lambda: stats.token_count(["code", "vers"]), "no domain 'vers'"),
    ]:
        with pytest.raises(DataError, match=message):
            call()
