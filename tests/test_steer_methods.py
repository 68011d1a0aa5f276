"""Steering from texts to a plan and to its test: labels, controls, doses, answers, the verbs, the page, mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import chromium
import moekit
from moekit import refmoe
from moekit.apply.steer import steering
from moekit.cli import main
from moekit.data import Dataset
from moekit.errors import DataError, ModelError, PlanError, RecipeError
from moekit.layout import ExpertId
from moekit.plans import Plan, Scope, Steer
from moekit.report import collect, steering_page, write
from moekit.steering import answered, assess, find, label_answers, load_kinds, load_texts
from moekit.steering.doses import by_score, check_doses, controls, weakened
from moekit.view import MoEView

TEXTS = {name: str(path) for name, path in refmoe.calibration().items()}
HELD = {name: str(path) for name, path in refmoe.texts().items()}


@pytest.fixture(scope="module")
def model():
    return moekit.open("refmoe")


@pytest.fixture(scope="module")
def kinds(model):
    return load_kinds(model, TEXTS["python"], TEXTS["kjv"], tokens=1024, sequence_length=64)


@pytest.fixture(scope="module")
def plan(model, kinds):
    return find(model, kinds, "mote", top=4)


@pytest.fixture(scope="module")
def found(model, plan):
    target, elsewhere = (
        load_texts(model, {name: HELD[name]}, tokens=768, sequence_length=64) for name in ("python", "kjv")
    )
    return assess(model, plan, target, elsewhere, counts=[1, 2], strengths=[0.5], draws=2)


@pytest.fixture
def labelled(tmp_path):
    """Ten texts with two labels."""
    rows = [{"text": f"And he said unto them, {i}", "label": "kjv"} for i in range(5)]
    rows += [{"text": f"def function_{i}(self, x):\n    return x", "label": "code"} for i in range(5)]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_labels_are_kinds_and_each_record_a_text(model, labelled):
    data = load_kinds(model, "code", "kjv", data=labelled)
    assert data.domains == ("code", "kjv")
    assert data.describe()["domains"]["kjv"]["sequences"] == 5
    plan = find(model, data, "steermoe", top=3, mode="both")
    assert plan.settings["a"] == "code"
    assert {op.action for op in plan.ops} <= {"ban", "force"}
    assert len(plan.ops) == 3


def test_lines_are_texts(model, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("one line of text\n\nand another one\nthe end of it")
    data = load_texts(model, {"lines": str(file)}, lines=True)
    assert sum(len(x.ids) for x in data.batches) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', "record has no label"),
        ('{"text": "a b c", "label": "x"}\n' * 3, "two labels"),
        ("", "two labels"),
        ('{"text": "a b c", "label": "x"}\n{"text": "a b c", "label": "y"}\n', "no text has the label 'refused'"),
    ],
)
def test_bad_labels_are_told_before_anything_runs(model, tmp_path, text, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_kinds(model, "refused", "y", data=file)


def test_texts_that_are_none(model, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text of two tokens"):
        load_texts(model, {"empty": str(tmp_path / "empty.jsonl")})
    with pytest.raises(ModelError, match="no chat template"):
        load_texts(model, {"kjv": TEXTS["kjv"]}, chat=True)
    with pytest.raises(DataError, match="given twice"):
        load_kinds(model, TEXTS["kjv"], TEXTS["kjv"])


def test_a_request_is_checked_before_the_pass(model, kinds):
    for settings, message in [
        ({"method": "reap"}, "does not steer"),
        ({"mode": "sideways"}, "no mode"),
        ({"top": 0}, "at least one"),
        ({"beta": 2.0}, "no option 'beta'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            find(None, kinds, **settings)
    with pytest.raises(RecipeError, match="steer find"):
        moekit.methods.make_plan("mote", None, model.layout)


def test_markers_find_the_experts_of_their_tokens(model, kinds):
    number = int(kinds.batches[-1].ids[0, 0])
    plan = find(model, kinds, "rice", top=2, mode="on", beta=4.0, markers=(number,))
    assert [op.strength for op in plan.ops] == [4.0, 4.0]


def test_the_domains_own_experts_are_found_and_matter_more_than_others(found):
    whole = found.whole
    on, off = whole.effects["python"], whole.effects["kjv"]
    assert whole.number == 4
    assert on.change.value > 0.1 > off.change.value
    for beside in (on.random, on.matched):
        assert beside.excess.low > 0
        assert len(beside.draws) == 2
        assert np.isclose(np.mean(beside.draws), beside.mean.value)
        assert np.isclose(beside.excess.value, on.change.value - beside.mean.value)
    assert [(x.number, x.strength) for x in found.doses] == [(1, 1.0), (2, 1.0), (4, 0.5), (4, 1.0)]
    changes = [x.effects["python"].change.value for x in found.doses]
    assert changes[0] < changes[1] < changes[3]
    assert changes[2] < changes[3]


def test_it_is_what_evaluating_with_the_plan_says(model, plan, found):
    data = load_texts(model, {"python": HELD["python"]}, tokens=768, sequence_length=64)
    score = moekit.evaluate(model, data=data, plan=plan).domains["python"]
    effect = found.whole.effects["python"]
    assert np.isclose(score.ratio.value, effect.ratio.value, rtol=1e-3)
    assert np.isclose(score.kl.value, effect.kl.value, rtol=1e-2)
    assert np.isclose(score.agreement.value, effect.agreement.value, atol=0.01)


def test_controls_do_the_same_to_others(model):
    ops = [
        Steer(layer=1, expert=3, action="force"),
        Steer(layer=1, expert=3, action="scale", strength=2.0, scope=Scope(part="prompt")),
        Steer(layer=2, expert=5, action="swap", partner=6),
    ]
    share = {x.index: np.linspace(0, 1, x.num_experts) for x in model.layout.routed}
    for drawn in controls(ops, model.layout, 20, share=share):
        first, second, third = drawn
        assert first.expert == second.expert != 3, "one expert has one control"
        assert abs(first.expert - 3) <= 4
        assert {third.expert, third.partner}.isdisjoint({5, 6})
        assert [x.model_dump(exclude={"expert", "partner"}) for x in drawn] == [
            x.model_dump(exclude={"expert", "partner"}) for x in ops
        ]
    spare = frozenset(ExpertId(1, e) for e in range(31))
    assert {x[0].expert for x in controls(ops[:1], model.layout, 5, spare=spare)} == {31}
    many = [Steer(layer=1, expert=e, action="scale", strength=0.0) for e in range(20)]
    assert controls(many, model.layout, 2) == [], "there are not so many others"


def test_doses_weaken_what_has_a_strength(model, plan):
    bias, scale = (
        weakened([Steer(layer=1, expert=3, action=x, strength=3.0)], 0.5)[0].strength for x in ("bias", "scale")
    )
    assert (bias, scale) == (1.5, 2.0)
    assert [abs(plan.measured["score"][f"{x.layer}.{x.expert}"]) for x in by_score(plan)] == sorted(
        map(abs, plan.measured["score"].values()), reverse=True
    )
    assert check_doses(plan, [1, 4], [0.5, 1]) == [(1, 1.0), (4, 0.5), (4, 1.0)]
    with pytest.raises(RecipeError, match="not so many experts"):
        check_doses(plan, [5], [])
    with pytest.raises(RecipeError, match="has a strength"):
        check_doses(Plan(layout_hash="x", ops=[Steer(layer=1, expert=1, action="ban")]), [], [0.5])


def test_plans_that_cannot_be_tested(model, plan, kinds):
    other = plan.model_copy(update={"layout_hash": "0" * 16})
    with pytest.raises(PlanError, match="another model"):
        assess(model, other, kinds)
    with pytest.raises(PlanError, match="steers nothing"):
        assess(model, Plan(layout_hash=model.layout.hash), kinds)
    with pytest.raises(DataError, match="target and elsewhere"):
        assess(model, plan, kinds, kinds)


def test_answers_are_labelled_and_counted(model, plan, tmp_path):
    prompts = ["In the beginning", "And the LORD said"]
    rows = label_answers(model, prompts, "the", max_new_tokens=6)
    assert [x["text"] for x in rows] == prompts
    assert {x["label"] for x in rows} <= {"match", "other"}
    assert all(("the" in x["answer"]) == (x["label"] == "match") for x in rows)
    assert [x["label"] for x in label_answers(model, prompts, len, max_new_tokens=6)] == [
        str(len(x["answer"])) for x in rows
    ]
    with pytest.raises(RecipeError, match="no regular expression"):
        label_answers(model, prompts, "(")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    told = answered(model, plan, tmp_path / "prompts.txt", "the", draws=1, tokens=6)
    assert told["prompts"] == 2
    assert told["share"]["plain"][0] == np.mean([x["label"] == "match" for x in rows])
    assert set(told["share"]) == {"plain", "plan", "random"}


def test_edits_for_all_tokens_take_the_quick_way_and_leave_nothing(model):
    """The tap at the router's rows and the one at every operation give the same, and the rows are back afterwards."""
    stock = model.load(torch.float32)
    view, layer = MoEView(stock, model.layout), model.layout.routed[1].index
    ids = torch.randint(model.layout.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = view.router(layer).weight
    for ops in (
        [Steer(layer=layer, expert=3, action="ban")],
        [Steer(layer=layer, expert=3, action="bias", strength=2.0), Steer(layer=layer, expert=4, action="force")],
    ):
        with steering(view, ops):
            with torch.no_grad():
                quick = stock(input_ids=ids, use_cache=False).logits
            slow = stock(input_ids=ids, use_cache=False).logits
            slow.sum().backward()
        assert torch.allclose(quick, slow, atol=1e-5)
        assert view.router(layer).weight is rows
        assert rows.grad is not None, "gradients pass through the other way"


def test_the_page_shows_it(found, tmp_path):
    found.save(tmp_path / "test.json")
    result = json.loads((tmp_path / "test.json").read_text())
    page, numbers = write(steering_page(result), tmp_path / "steering.html")
    assert json.loads(numbers.read_text())["steering"]["domains"][0]["role"] == "elsewhere"
    with pytest.raises(DataError, match="no test of a steering plan"):
        steering_page({"model": "x"})
    if chromium.binary() is None:
        pytest.skip("no Chromium here: apt install chromium")
    with chromium.browser() as tab:
        tab.open(page.as_uri())
        while not tab.run("!!document.documentElement.dataset.views"):
            pass
        assert tab.problems == []
        assert tab.run("document.documentElement.dataset.views") == "steering"
        text = tab.run("document.querySelector('#steering').innerText")
        assert text.index("Side effects") < text.index("Effect") < text.index("Dose and response")
        assert "NaN" not in text
        assert "undefined" not in text
        assert tab.run("document.querySelectorAll('#steering svg.chart').length") == 4
        assert tab.run("document.querySelectorAll('#steering tbody tr').length") == 2 + 4


def test_a_test_of_another_model_is_not_shown(found, tmp_path):
    from synthetic import synthetic_trace

    trace = synthetic_trace(tmp_path / "trace", tokens=100)
    with pytest.raises(DataError, match="tested on another model"):
        collect(trace, steering=found.to_dict())


def test_the_verbs(tmp_path, capsys, labelled):
    plan, out = tmp_path / "plan.json", tmp_path / "test.json"
    command = ["steer", "find", "refmoe", "--data", str(labelled), "--a", "code", "--b", "kjv", "--top", "3"]
    assert main([*command, "--method", "contrast", "--option", "strength=1.5", "--out", str(plan)]) == 0
    assert "away from code, towards kjv: 3 of 192 experts" in capsys.readouterr().out
    assert [op.strength for op in Plan.load(plan).ops] == [-1.5] * 3
    texts = ["--target", f"python={HELD['python']}", "--elsewhere", f"kjv={HELD['kjv']}", "--tokens", "128"]
    command = ["steer", "test", str(plan), "refmoe", *texts, "--counts", "1", "--controls", "1"]
    pages = ["--page", str(tmp_path / "page.html"), "--plot", str(tmp_path / "doses.svg")]
    assert main([*command, "--strengths", "2", "--out", str(out), *pages]) == 0
    shown = capsys.readouterr().out
    assert shown.index("side effects") < shown.index("effect: target") < shown.index("dose and response")
    assert (tmp_path / "page.html").is_file()
    assert len(json.loads(out.read_text())["doses"]) == 3
    drawn = (tmp_path / "doses.svg").read_text()
    for words in ("experts changed", "strength", "python (target)", "kjv (elsewhere)", "python, matched experts"):
        assert f">{words}<" in drawn
    assert main([*command, "--plot", str(tmp_path / "doses.docx")]) == 2
    (tmp_path / "prompts.txt").write_text("In the beginning\nAnd\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    label = ["steer", "label", "refmoe", *prompts, "--pattern", "the", "--max-tokens", "4"]
    assert main([*label, "--out", str(tmp_path / "answers.jsonl"), "--names", "yes,no"]) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert main([*command, "--match", "the"]) == 2, "prompts are missing"
    for wrong in (["--option", "strength"], ["--scope", "span:4:2"], ["--method", "nonsense"], ["--from", "nowhere"]):
        find_again = ["steer", "find", "refmoe", "--a", "x", "--b", "y", "--out", str(plan), *wrong]
        assert main(find_again) == 2


def test_find_reads_statistics(model, kinds, tmp_path):
    moekit.measure(model, kinds, groups=("scores",)).save(tmp_path / "stats")
    a, b = kinds.domains
    command = ["steer", "find", "refmoe", "--from", str(tmp_path / "stats"), "--a", a, "--b", b]
    assert main([*command, "--method", "contrast", "--out", str(tmp_path / "plan.json")]) == 0
    assert len(Plan.load(tmp_path / "plan.json").ops) == 10


def test_rows_are_kept_as_they_are():
    data = Dataset.of_rows({"a": [[1, 2, 3], [4, 5]], "b": [[6, 7, 8, 9]]}, pad=0)
    assert data.tokens == {"a": 5, "b": 4}
    assert data.batches[0].ids.tolist() == [[1, 2, 3], [4, 5, 0]]
