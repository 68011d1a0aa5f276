"""Switching experts off is exact, live and in forks of a stream; effects and controls are what a plain loop gives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import zoo
from moekit import refmoe
from moekit.cli import _register, app
from moekit.data import Batch
from moekit.errors import DataError, OutputError, PlanError, RecipeError
from moekit.evaluation import removal
from moekit.evaluation.ablation import Ablation, _matched_controls, ablate, random_controls
from moekit.evaluation.intervals import ratio_interval
from moekit.evaluation.removal import nll_by_row
from moekit.families.model import Model
from moekit.layout import ExpertId
from moekit.progress import silent
from moekit.stream import Fork, Stream
from moekit.view import MoEView
from tiny import batch, dataset

DATA = dataset(batch(0, 12, 9, 1), batch(0, 7, 7, seed=1), batch(1, 10, 2))
# plain; biased and transposed; sigmoid in groups; table and hyper-connections; a pair from layer to layer; weighted
# input; a slot that stays empty
FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "hy_v4", "llama4_text", "zaya"]


@contextlib.contextmanager
def weakened(view: MoEView, experts: Sequence[ExpertId], factor: float = 0.0):
    """The brute force: the experts' last matrices (and biases) times a factor."""
    old = []
    for layer, expert in experts:
        module = view.experts(layer)
        for name in ("down_proj", "down_proj_bias"):
            if isinstance(tensor := getattr(module, name, None), torch.nn.Parameter):
                old.append((tensor.data[expert], tensor.data[expert].clone()))
                tensor.data[expert] *= factor
    yield
    for now, before in old:
        now.copy_(before)


def loaded(model: Model) -> tuple[torch.nn.Module, MoEView]:
    live = model.load(torch.float32)
    return live, MoEView(live, model.layout)


def logits(live: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return live(input_ids=ids, use_cache=False).logits


# ---- one live model


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_is_what_scaled_matrices_do(opened, family):
    model = opened(family)
    live, view = loaded(model)
    ids = zoo.inputs(family)["input_ids"]
    before, layer = logits(live, ids), model.layout.routed[-1].index
    moved = 0
    for expert in range(4):
        for factor in (0.0, 2.0) if family != "llama4_text" else (0.0,):  # its experts are not linear in the weight
            with view.scale({layer: {expert: factor}}):
                found = logits(live, ids)
            with weakened(view, [ExpertId(layer, expert)], factor):
                assert torch.equal(found, logits(live, ids))
            moved += not torch.equal(found, before)
    assert moved >= 2
    assert torch.equal(logits(live, ids), before)


def test_llama_4_multiplies_the_input(opened):
    model = opened("llama4_text")
    live, view = loaded(model)
    layer = model.layout.routed[0]
    seen = []

    def keep(_module, args):
        seen.append(args[0].reshape(layer.num_experts, -1, args[0].shape[-1]).clone())

    handle = view.experts(layer.index).register_forward_pre_hook(keep)
    ids = zoo.inputs("llama4_text")["input_ids"]
    logits(live, ids)
    with view.scale({layer.index: {2: 0.5, 5: 3.0}}):
        logits(live, ids)
    handle.remove()
    factors = torch.ones(layer.num_experts)
    factors[2], factors[5] = 0.5, 3.0
    assert torch.allclose(seen[1], seen[0] * factors[:, None, None], atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "llama4_text"])
def test_renormalised_weights_keep_their_sum(opened, family):
    model = opened(family)
    live, view = loaded(model)
    layer = model.layout.routed[0].index
    weights: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []

    class Keep(removal.Counter):
        def routed(self, call):
            weights.append(call.weights.clone())
            ids.append(call.ids.clone())

    off, outer, inner = (
        {layer: {0: 0.0, 3: 0.0}},
        view.watch(Keep(), layers=[layer]),
        view.watch(Keep(), layers=[layer]),
    )
    with outer, view.scale(off, renormalise=True), inner:
        logits(live, zoo.inputs(family)["input_ids"])
    own, scaled = weights  # an observer that came before sees the router's own
    off = (ids[0] == 0) | (ids[0] == 3)
    some = ~off.all(1)
    assert off.any(1).any()
    if family != "llama4_text":  # there, what is off is not chosen at all
        assert (scaled[off] == 0).all()
        assert (scaled[off.all(1)] == 0).all()
    assert torch.allclose(scaled[some].sum(1), own[some].sum(1), atol=1e-6)


def test_contexts_nest_and_leave_nothing(opened):
    model = opened("olmoe")
    live, view = loaded(model)
    ids = zoo.inputs("olmoe")["input_ids"]
    before, hooks = logits(live, ids), [len(m._forward_pre_hooks) for m in live.modules()]
    with view.scale({0: {1: 0.5}, 2: {}}), view.scale({0: {1: 0.5}}):
        twice = logits(live, ids)
    with view.scale({0: {1: 0.25}}):
        assert torch.allclose(twice, logits(live, ids), atol=1e-6)
    with pytest.raises(RuntimeError), view.scale({0: {1: 0.0}}):
        raise RuntimeError
    assert torch.equal(logits(live, ids), before)
    assert [len(m._forward_pre_hooks) for m in live.modules()] == hooks


@pytest.mark.parametrize(("layer", "expert"), [(7, 0), (0, 8), (0, -1)])
def test_scaling_nobody_is_refused(opened, layer, expert):
    _, view = loaded(opened("olmoe"))
    with pytest.raises(PlanError), view.scale({layer: {expert: 0.0}}):
        pass


# ---- forks of a stream


@pytest.mark.parametrize("spill_bytes", [0, 1 << 30])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "hy_v4", "zaya", "glm5_next"])
def test_forks_are_what_runs_of_their_own_give(opened, family, spill_bytes):
    model = opened(family)
    first, last = model.layout.routed[0].index, model.layout.routed[-1].index
    loader = model.loader(torch.float32)
    view = MoEView(loader.model, model.layout)
    batches = [x.ids for x in DATA.batches]
    sets = [{first: {1: 0.0}}, {last: {2: 0.0}}, {first: {3: 0.0}, last: {4: 0.0}}]
    runs = [(number, off) for number in range(len(batches)) for off in sets]
    forks = [Fork(number, off.__contains__) for number, off in runs] + [Fork(0, lambda _layer: False)]

    def around(layer: int, run: int):
        off = runs[run - len(batches)][1] if len(batches) <= run < len(batches) + len(runs) else {}
        return view.scale({layer: off.get(layer, {})})

    found = list(Stream(loader, spill_bytes=spill_bytes).run(batches, forks=forks, around=around))
    assert [fork.left for fork in forks] == [True] * len(runs) + [False]
    assert len(found) == len(batches) + len(runs)
    plain = list(Stream(loader).run(batches))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=False))
    for (number, off), got in zip(runs, found[len(batches) :], strict=True):
        with view.scale(off):
            (want,) = Stream(loader).run([batches[number]])
        assert torch.equal(got, want)
    assert sum(not torch.equal(got, plain[number]) for (number, _), got in zip(runs, found[3:], strict=True)) > 5


def test_a_fork_runs_only_the_layers_behind_its_own(opened):
    model = opened("qwen3_moe")
    loader, ran, told = model.loader(), [], []
    forks = [Fork(1, (2).__eq__), Fork(0, (1).__le__)]
    batches = [x.ids for x in DATA.batches]

    def around(layer: int, run: int):
        ran.append((layer, run))
        return contextlib.nullcontext()

    stream = Stream(loader, progress=lambda stage, done, total: told.append((stage, done, total)))
    found = stream.run(batches, forks=forks, around=around, passed=lambda *x: ran.append(x[:2]), last_layer=2)
    assert list(found) == []
    assert sorted(ran) == sorted(2 * [*((i, n) for i in range(3) for n in range(3)), (2, 3), (1, 4), (2, 4)])
    assert told[-1] == ("layers", 15, 15)


# ---- ablate


EXPERTS = [ExpertId(0, 1), ExpertId(2, 5), (ExpertId(0, 3), ExpertId(2, 0), ExpertId(2, 5))]


@pytest.fixture(scope="module")
def ablation(opened) -> Ablation:
    return ablate(opened("qwen3_moe"), DATA, EXPERTS, controls=2, dtype=torch.float32)


def brute_force(model: Model, experts: Sequence[ExpertId], domain: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed -log p and predicted tokens of each sequence, one at a time, without padding."""
    live, view = loaded(model)
    losses, tokens = [], []
    with weakened(view, experts):
        for part in DATA.batches:
            for ids, mask in zip(part.ids, part.mask, strict=True):
                if part.domain == domain and mask.sum() > 1:
                    logp = logits(live, ids[mask][None])[0].double().log_softmax(-1)
                    losses.append(-float(logp[:-1].gather(1, ids[mask][1:, None]).sum()))
                    tokens.append(int(mask.sum()) - 1)
    return np.array(losses), np.array(tokens)


def test_effects_are_those_of_brute_force(ablation, opened):
    model = opened("qwen3_moe")
    assert [(x.experts, x.domain) for x in ablation.tested] == [
        ((y,) if isinstance(y, ExpertId) else y, domain) for y in EXPERTS for domain in DATA.domains
    ]
    for x in ablation.tested:
        domain = DATA.domains.index(x.domain)
        before, tokens = brute_force(model, (), domain)
        assert ablation.loss[x.domain].value == pytest.approx(before.sum() / tokens.sum(), rel=1e-5)
        assert (ablation.sequences[x.domain], ablation.tokens[x.domain]) == (len(tokens), tokens.sum())
        changes = {}
        for experts, effect in [(x.experts, x.effect), *x.random.items(), *x.matched.items()]:
            changes[experts] = brute_force(model, experts, domain)[0] - before
            assert effect.change == pytest.approx(ratio_interval(changes[experts], tokens), abs=2e-6)
        controls = np.mean([changes[y] for y in x.matched], axis=0)
        assert x.mean_matched == pytest.approx(ratio_interval(controls, tokens), abs=2e-6)
        assert x.excess == pytest.approx(ratio_interval(changes[x.experts] - controls, tokens), abs=2e-6)
        controls = np.mean([changes[y] for y in x.random], axis=0)
        assert x.mean_random == pytest.approx(ratio_interval(controls, tokens), abs=2e-6)
    assert max(abs(x.effect.change.value) for x in ablation.tested) > 0.01


def test_shares_and_untouched_sequences_are_counted(ablation, opened):
    live, view = loaded(opened("qwen3_moe"))
    chosen: dict[tuple[int, int, int], list[np.ndarray]] = {}

    class Keep(removal.Counter):
        def routed(self, call):
            rows = call.ids.reshape(*self.part.ids.shape, -1)
            for e in range(8):
                hits = (rows == e).any(-1) & self.part.mask
                chosen.setdefault((self.part.domain, call.layer.index, e), []).append(hits.sum(1).numpy())

    keep = Keep()
    for keep.part in DATA.batches:
        with view.watch(keep):
            logits(live, keep.part.ids)
    scored = [np.concatenate([x.mask.sum(1) > 1 for x in DATA.batches if x.domain == i]) for i in (0, 1)]
    untouched = 0
    for x in ablation.tested:
        domain = DATA.domains.index(x.domain)
        tokens = sum(y.tokens for y in DATA.batches if y.domain == domain)
        for experts, effect in [(x.experts, x.effect), *x.random.items(), *x.matched.items()]:
            counts = [np.concatenate(chosen[domain, layer, e]) for layer, e in experts]
            assert effect.share == pytest.approx(np.mean([y.sum() for y in counts]) / tokens)
            assert effect.touched == (np.sum(counts, axis=0)[scored[domain]] > 0).sum()
            untouched += effect.touched < scored[domain].sum()
    assert untouched  # else nothing is left out


def test_sequences_that_do_not_choose_an_expert_are_exactly_unchanged(opened, monkeypatch):
    noise = np.random.default_rng(0)  # as rounding is: other for every run

    def rounded(scores, part):
        return nll_by_row(scores, part) + noise.normal(size=len(part.ids))

    monkeypatch.setattr(removal, "nll_by_row", rounded)
    run = removal.Removal(opened("qwen3_moe"), DATA.batches, False, None, "cpu", silent)
    run.clean()
    sets = [(ExpertId(0, e),) for e in range(8)]
    run.without([sets, sets], removal.FORK_BYTES)
    for experts in sets:
        for domain in (0, 1):
            assert ((run.change(experts, domain) != 0) == run.touched(experts, domain)).all()
    assert 0 < sum(run.touched(x, 0).sum() for x in sets) < 8 * len(run.tokens(0))


@pytest.mark.parametrize(("fork_bytes", "forks", "most"), [(1, 256, 1), (1 << 30, 4, 4)])
def test_little_memory_means_more_passes_and_the_same_numbers(ablation, opened, monkeypatch, fork_bytes, forks, most):
    passes = []
    run = Stream.run

    def counted(self, batches, *, forks=(), **rest):
        passes.append((len(batches), len(forks)))
        return run(self, batches, forks=forks, **rest)

    monkeypatch.setattr(Stream, "run", counted)
    monkeypatch.setattr(removal, "FORKS", forks)
    again = ablate(opened("qwen3_moe"), DATA, EXPERTS, controls=2, dtype=torch.float32, fork_bytes=fork_bytes)
    assert again == ablation
    assert passes[0] == (3, 0)
    assert max(x for _, x in passes) == most
    assert sum(x for _, x in passes) > 20


def test_renormalising_is_passed_on(opened):
    model = opened("qwen3_moe")
    twice = [EXPERTS[0], (EXPERTS[0], EXPERTS[0])]  # the same thing, tested once
    found = ablate(model, DATA, twice, controls=0, renormalise=True, dtype=torch.float32)
    assert len(found.tested) == 2
    live, view = loaded(model)
    with view.scale({0: {1: 0.0}}, renormalise=True):
        losses = [nll_by_row(logits(live, x.ids), x) for x in DATA.batches if x.domain == 0]
    assert found.tested[0].excess is found.tested[0].mean_random is None
    total = found.loss["code"].value + found.tested[0].effect.change.value
    assert total == pytest.approx(np.concatenate(losses).sum() / found.tokens["code"], rel=1e-6)


def test_a_loss_is_summed_over_predicted_tokens():
    part = batch(0, 5, 1, 3)
    scores = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    found = nll_by_row(scores, part)
    logp = scores.double().log_softmax(-1)
    for row, length in enumerate((5, 1, 3)):
        want = -sum(float(logp[row, t, part.ids[row, t + 1]]) for t in range(length - 1))
        assert found[row] == pytest.approx(want, rel=1e-6)


def test_controls_are_others_of_the_same_layers(opened):
    layout = opened("qwen3_moe").layout
    pair = (ExpertId(1, 2), ExpertId(1, 3), ExpertId(2, 0))
    sets = random_controls(layout, pair, 3, seed=0)
    assert len(sets) == 3
    assert [[x.layer for x in y] for y in sets] == [[1, 1, 2]] * 3
    assert len({x for y in sets for x in y} | set(pair)) == 12
    assert sets == random_controls(layout, pair, 3, seed=0) != random_controls(layout, pair, 3, seed=1)
    assert len(random_controls(layout, pair, 99, seed=0)) == 3  # six others in layer 1, two at a time
    share = {1: np.array([0.9, 0.5, 0.4, 0.1, 0.12, 0.41, 0.38, 0.0])}
    matched = _matched_controls((ExpertId(1, 2),), share, 3)
    assert matched == [(ExpertId(1, 5),), (ExpertId(1, 6),), (ExpertId(1, 1),)]
    assert _matched_controls((ExpertId(1, 2), ExpertId(1, 3)), share, 1) == [(ExpertId(1, 4), ExpertId(1, 5))]


def test_rows_and_file_say_the_same(ablation, tmp_path):
    saved = json.loads(ablation.save(tmp_path / "ablation.json").read_text())
    assert saved["rows"] == ablation.rows()
    assert saved["domains"]["code"]["loss"][0] == ablation.loss["code"].value
    assert saved["fingerprint"]
    assert saved["data"]["hash"] == DATA.hash
    first = saved["rows"][0]
    assert (first["experts"], first["domain"], first["control"], first["of"]) == ("0.1", "code", None, "0.1")
    assert first["excess"] == list(ablation.tested[0].excess)
    assert first["matched_share"] == np.mean([x.share for x in ablation.tested[0].matched.values()])
    assert [x["control"] for x in saved["rows"][:5]] == [None, "random", "random", "matched", "matched"]
    assert {x["of"] for x in saved["rows"]} == {"0.1", "2.5", "0.3+2.0+2.5"}
    table = ablation.table()
    assert table["change"].tolist() == [x["change"] for x in saved["rows"]]
    assert np.isnan(table["excess"][1])


@pytest.mark.parametrize(
    ("experts", "kind"),
    [([], PlanError), ([()], PlanError), ([ExpertId(3, 0)], PlanError), ([ExpertId(0, 8)], PlanError)],
)
def test_experts_that_are_not_there_are_refused(opened, experts, kind):
    with pytest.raises(kind):
        ablate(opened("qwen3_moe"), DATA, experts)


def test_a_domain_without_a_token_to_predict_is_refused(opened):
    with pytest.raises(DataError, match="prose"):
        ablate(opened("qwen3_moe"), dataset(batch(0, 5), batch(1, 1)), EXPERTS)
    with pytest.raises(DataError, match="prose"):
        ablate(opened("qwen3_moe"), dataset(Batch(0, DATA.batches[0].ids, DATA.batches[0].mask)), EXPERTS)


# ---- the verb


@pytest.fixture(scope="module")
def run():
    """Runs a command line; the errors that it raises are the caller's."""
    _register()

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return call


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [x for name in ("kjv", "python") for x in ("--data", f"{name}={refmoe.texts()[name]}")]


def test_the_verb_takes_experts_by_name_and_by_rule(run, texts, talker, tmp_path):
    small = ["--tokens", "128", "--sequence-length", "32"]
    run("measure", talker, *texts, "--out", tmp_path / "stats", *small)
    picked = json.loads(run("ftri", tmp_path / "stats", "--top", "2", "--json"))
    out = run(
        "ablate", talker, *texts, *small, "--expert", "1.2", "--expert", "0.3+2.1", "--controls", "1",
        "--from-trace", tmp_path / "stats", "top:2", "--out", tmp_path / "ablation.json",
    )  # fmt: skip
    saved = json.loads((tmp_path / "ablation.json").read_text())
    tested = list(dict.fromkeys(x["experts"] for x in saved["rows"] if x["control"] is None))
    assert tested == ["1.2", "0.3+2.1", *(x["expert"] for x in picked)]
    assert all(name in out for name in (*tested, "kjv", "beyond matched", "by chance"))


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ([], RecipeError, "--expert"),
        (["--expert", "3"], RecipeError, "LAYER.EXPERT"),
        (["--expert", "1.2+x"], RecipeError, "LAYER.EXPERT"),
        (["--expert", "9.0"], PlanError, "0, 1, 2"),
        (["--from-trace", "nowhere", "top:3"], DataError, "nowhere"),
        (["--expert", "1.2", "--out", "nowhere/ablation.json"], OutputError, "nowhere"),
    ],
)
def test_the_verb_says_what_is_wrong(run, texts, talker, arguments, kind, said):
    with pytest.raises(kind, match=said):
        run("ablate", talker, *texts, "--tokens", "64", "--sequence-length", "32", *arguments)
