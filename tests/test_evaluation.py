"""Scores are what transformers' own loss and a plain loop say; intervals cover; verification tells right from wrong."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import moekit
from moekit.apply.bake import bake
from moekit.data import Batch
from moekit.errors import DataError, PlanError
from moekit.evaluation import Evaluation, Subject, compare, evaluate, intervals
from moekit.evaluation.compare import split_rows
from moekit.evaluation.intervals import Interval, ratio_interval
from moekit.evaluation.verify import LENGTH, SEQUENCES, verify
from moekit.families.model import Model
from moekit.plans import Plan, drop_lowest
from tiny import batch, dataset

DATA = dataset(batch(0, 12, 9, 1), batch(0, 7, 7, seed=1), batch(1, 10, 2))
FAMILY = "qwen3_moe"


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    loaded = model.load(torch.float32)
    with torch.inference_mode():
        return loaded(input_ids=ids).logits


def rows(domain: int) -> list[torch.Tensor]:
    """The sequences of a domain, without padding."""
    return [x.ids[i][x.mask[i]] for x in DATA.batches if x.domain == domain for i in range(len(x.ids))]


@pytest.fixture(scope="module")
def pair(opened) -> tuple[Model, Model]:
    """A model, and one of the same family with other weights."""
    return opened(FAMILY), opened(FAMILY, seed=1)


@pytest.fixture(scope="module")
def cut(opened, tmp_path_factory) -> tuple[Model, Plan, Model]:
    """A model, a plan that drops half of its experts, the model that it makes."""
    model = opened("deepseek_v3")
    layout, rng = model.layout, np.random.default_rng(0)
    ops = [drop_lowest(x, rng.random(x.num_experts).tolist(), 4) for x in layout.routed]
    plan = Plan(layout_hash=layout.hash, ops=[x for x in ops if x], method="random")
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path_factory.mktemp("cut") / "out")
    return model, plan, Model.open(baked.path)


# ---- scores


def test_perplexity_is_that_of_transformers(pair):
    found = evaluate(pair[0], DATA, dtype=torch.float32)
    loaded = pair[0].load(torch.float32)
    for domain, name in enumerate(DATA.domains):
        total = count = 0
        for ids in rows(domain):
            if len(ids) > 1:
                with torch.inference_mode():
                    total += (len(ids) - 1) * float(loaded(input_ids=ids[None], labels=ids[None]).loss)
                count += len(ids) - 1
        score = found.domains[name]
        assert score.tokens == count
        assert score.sequences == sum(len(ids) > 1 for ids in rows(domain))
        assert score.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-5)
        assert score.kl is score.agreement is score.ratio is score.source_perplexity is None
    assert found.max_logit_difference is None


def test_comparison_is_what_a_loop_gives(pair):
    model, source = pair
    found = evaluate(model, DATA, against=source, dtype=torch.float32)
    largest = 0.0
    for domain, name in enumerate(DATA.domains):
        kl, nll, source_nll, agree, count = 0.0, 0.0, 0.0, 0, 0
        for ids in rows(domain):
            mine, theirs = (logits(x, ids[None])[0].double() for x in pair)
            for t in range(len(ids) - 1):
                q, p = mine[t].softmax(0), theirs[t].softmax(0)
                kl += sum(float(p[v]) * math.log(p[v] / q[v]) for v in range(len(p)))
                nll, source_nll = nll - math.log(q[ids[t + 1]]), source_nll - math.log(p[ids[t + 1]])
                agree += int(p.argmax()) == int(q.argmax())
                largest = max(largest, float((mine[t] - theirs[t]).abs().max()))
                count += 1
        score = found.domains[name]
        assert score.kl.value == pytest.approx(kl / count, rel=1e-4)
        assert score.agreement.value == pytest.approx(agree / count)
        assert score.perplexity.value == pytest.approx(math.exp(nll / count), rel=1e-5)
        assert score.source_perplexity.value == pytest.approx(math.exp(source_nll / count), rel=1e-5)
        assert score.ratio.value == pytest.approx(math.exp((nll - source_nll) / count), rel=1e-5)
    assert found.max_logit_difference == pytest.approx(largest, rel=1e-4)


def test_a_model_is_itself(pair):
    for score in evaluate(pair[0], DATA, against=pair[0], dtype=torch.float32).domains.values():
        assert score.kl == (0, 0, 0)
        assert score.agreement == score.ratio == (1, 1, 1)
        assert score.perplexity == score.source_perplexity


def test_padding_is_not_scored(pair):
    padded = [Batch(x.domain, x.ids.masked_fill(~x.mask, 37), x.mask) for x in DATA.batches]
    a, b = (evaluate(pair[0], x, against=pair[1], dtype=torch.float32) for x in (DATA, dataset(*padded)))
    for name, score in a.domains.items():
        assert b.domains[name].perplexity.value == pytest.approx(score.perplexity.value, rel=1e-5)
        assert b.domains[name].kl.value == pytest.approx(score.kl.value, rel=1e-4)


def test_baked_plan_scores_as_the_plan_applied_live(cut):
    model, plan, baked = cut
    live = evaluate(Subject(model, plan), DATA, against=model, dtype=torch.float32)
    written = evaluate(baked, DATA, against=model, dtype=torch.float32)
    for name, score in live.domains.items():
        other = written.domains[name]
        assert other.perplexity == pytest.approx(score.perplexity, rel=1e-5)
        assert other.kl == pytest.approx(score.kl, rel=1e-4)
        assert score.kl.value > 0.01
    direct = evaluate(baked, DATA, against=Subject(model, plan), dtype=torch.float32)
    assert direct.max_logit_difference < 1e-4
    assert all(x.agreement.value == 1 for x in direct.domains.values())


def test_plan_of_another_model_is_refused(cut, pair):
    with pytest.raises(PlanError, match="made for another model"):
        evaluate(Subject(pair[0], cut[1]), DATA)


def test_other_vocabulary_is_refused(opened, pair):
    with pytest.raises(DataError, match=r"(?s)different vocabularies.*expected: +160.*got: +161"):
        evaluate(opened(FAMILY, vocab_size=161), DATA, against=pair[0])


def test_domain_without_a_prediction_is_refused(pair):
    with pytest.raises(DataError, match="no token to predict"):
        evaluate(pair[0], dataset(batch(0, 5), batch(1, 1, 1)))


def test_rows_are_split_where_logits_would_be_large(monkeypatch):
    data = dataset(batch(0, 12, 9, 8, 8, 3), batch(1, 5, 4))
    monkeypatch.setattr(compare, "LOGIT_BYTES", 2 * 12 * 160 * 4)
    parts = split_rows(data, 160)
    assert [tuple(x.ids.shape) for x in parts] == [(2, 12), (2, 12), (1, 12), (2, 5)]
    assert all(x.ids.numel() * 160 * 4 <= compare.LOGIT_BYTES for x in parts)
    for domain in (0, 1):
        for name in ("ids", "mask"):
            before, after = (
                torch.cat([getattr(x, name) for x in y if x.domain == domain]) for y in (data.batches, parts)
            )
            assert torch.equal(before, after)
    assert [tuple(x.ids.shape) for x in split_rows(data, 10**9)] == [(1, 12)] * 5 + [(1, 5)] * 2


def test_splitting_changes_no_score(pair, monkeypatch):
    whole = evaluate(pair[0], DATA, against=pair[1], dtype=torch.float32)
    monkeypatch.setattr(compare, "LOGIT_BYTES", 1)
    monkeypatch.setattr(compare, "ROW_CHUNK", 4)
    parts = evaluate(pair[0], DATA, against=pair[1], dtype=torch.float32)
    for name, score in whole.domains.items():
        for field in ("perplexity", "kl", "agreement", "ratio"):
            assert getattr(parts.domains[name], field) == pytest.approx(getattr(score, field), rel=1e-4)


def test_saved_as_json(pair, tmp_path):
    found = evaluate(pair[0], DATA, against=pair[1])
    data = json.loads(found.save(tmp_path / "scores.json").read_text())
    assert data["domains"]["code"]["kl"] == list(found.domains["code"].kl)
    assert [x["domain"] for x in found.rows()] == list(DATA.domains)
    assert "prose" in str(found)
    assert isinstance(found, Evaluation)


# ---- intervals


def test_intervals_cover_the_truth():
    """Sequences of unlike length, each with a mean of its own: 95% intervals hold the true ratio 95% of the time."""
    rng, covered, trials = np.random.default_rng(0), 0, 400
    for trial in range(trials):
        tokens = rng.integers(20, 200, 60)
        totals = tokens * rng.gamma(9.0, 2.0 / 9.0, 60)
        found = ratio_interval(totals, tokens, seed=trial)
        assert found.low <= found.value <= found.high
        covered += found.low <= 2.0 <= found.high
    assert 0.91 <= covered / trials <= 0.975


def test_interval_of_a_perplexity_is_the_exponential():
    totals, tokens = np.array([30.0, 22.0, 41.0]), np.array([10.0, 11.0, 12.0])
    plain, exponential = (ratio_interval(totals, tokens, exponential=x) for x in (False, True))
    assert exponential == pytest.approx(tuple(map(math.exp, plain)))
    assert plain.value == pytest.approx(93 / 33)


def test_paired_differences_have_narrow_intervals():
    """What two models share, hard and easy texts, does not widen the interval of their ratio."""
    rng = np.random.default_rng(0)
    tokens = np.full(50, 100.0)
    source = 100 * rng.gamma(4.0, 0.75, 50)
    model = source + 100 * rng.normal(0.1, 0.01, 50)
    paired = ratio_interval(model - source, tokens, exponential=True)
    alone = ratio_interval(model, tokens, exponential=True)
    assert paired.value == pytest.approx(math.exp(0.1), rel=0.01)
    assert math.log(paired.high / paired.low) < 0.05 * math.log(alone.high / alone.low)


def test_one_sequence_has_no_interval():
    assert ratio_interval(np.array([3.0]), np.array([2.0])) == Interval(1.5, 1.5, 1.5)


def test_intervals_of_many_sequences_take_little_memory(monkeypatch):
    monkeypatch.setattr(intervals, "BLOCK", 100)
    totals = np.arange(1.0, 31.0)
    blocks = ratio_interval(totals, np.ones(30))
    monkeypatch.setattr(intervals, "BLOCK", 10**9)
    assert blocks == ratio_interval(totals, np.ones(30))


# ---- verification


def tampered(model: Model, folder: Path, name: str, change) -> Model:
    """A copy of the model with one tensor changed."""
    shutil.copytree(model.path, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file)
    return Model.open(folder)


def swap_rows(x: torch.Tensor) -> torch.Tensor:
    return x[[1, 0, *range(2, len(x))]]


def test_right_bake_is_verified(cut):
    model, plan, baked = cut
    found = verify(model, plan, baked, DATA)
    assert found.ok
    assert found.within == 1
    assert found.max_difference < 1e-4
    assert found.loaded_by == "stock transformers"
    assert found.dtype == "float32"
    assert found.generated is None
    assert found.positions == 12 + 7 + 10  # the first row of a domain's first batches


def test_verification_is_short(cut):
    long = dataset(*(batch(i % 2, 2 * LENGTH, LENGTH, seed=i) for i in range(2 * SEQUENCES)))
    assert verify(*cut, long).positions == SEQUENCES * LENGTH


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.experts.2.down_proj.weight", lambda x: x * 1.1),
        ("model.layers.2.mlp.experts.0.gate_proj.weight", torch.zeros_like),
        ("model.layers.1.mlp.gate.weight", swap_rows),
        ("model.layers.2.mlp.gate.e_score_correction_bias", lambda x: x + torch.arange(len(x))),
        ("model.norm.weight", lambda x: x + 0.01),
    ],
)
def test_wrong_bake_is_not_verified(cut, tmp_path, name, change):
    model, plan, baked = cut
    assert not verify(model, plan, tampered(baked, tmp_path / "bad", name, change), DATA).ok


def test_other_experts_than_planned_are_not_verified(cut, tmp_path):
    model, plan, baked = cut
    dropped = {op.layer: op.experts for op in plan.ops}
    other = {1: dropped[2], 2: dropped[1]}
    ops = [op.model_copy(update={"experts": other[op.layer]}) for op in plan.ops]
    assert other != dropped
    assert not verify(model, plan.model_copy(update={"ops": ops}), baked, DATA).ok


def test_model_larger_than_memory_is_verified_by_streaming(cut, tmp_path, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    model, plan, baked = cut
    found = verify(model, plan, baked, DATA)
    assert found.ok
    assert found.loaded_by == "stock layers, streamed"
    wrong = tampered(baked, tmp_path / "bad", "model.layers.1.mlp.gate.weight", swap_rows)
    assert not verify(model, plan, wrong, DATA).ok


def test_verification_shows_what_the_new_model_says(talker, tmp_path):
    model = moekit.open(talker)
    data = moekit.load_data(model, [f"code={Path(__file__)}"], tokens=64, sequence_length=32)
    plan = Plan(layout_hash=model.layout.hash)
    baked = moekit.bake(model, plan, tmp_path / "out")
    from moekit.data import load_tokenizer

    found = verify(model, plan, Model.open(baked.path), data, load_tokenizer(talker))
    assert found.ok
    assert found.generated


def test_threads_end_when_verification_fails(cut, monkeypatch):
    """An error in the middle leaves nothing behind."""
    import threading

    before = threading.active_count()
    monkeypatch.setattr(Model, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with contextlib.suppress(RuntimeError):
        verify(*cut, DATA)
    assert threading.active_count() == before
