"""C3PO: pathways put in exactly where they should be, the three surrogates by hand, reference sets, the verbs."""

from __future__ import annotations

import json

import pytest
import torch

import moekit
from family_proofs import Specimen, run
from moekit import cli
from moekit.data import load_tokenizer
from moekit.decoding.c3po import (
    C3PO,
    Pathfinder,
    branch,
    core,
    decode_mixed,
    nearest,
    regressed,
    shifted,
    weights_of,
)
from moekit.decoding.loop import Runner, decode
from moekit.decoding.pathways import Answers, overriding, read
from moekit.decoding.questions import Marking, Question, load_questions, unescaped
from moekit.decoding.references import References, build
from moekit.errors import DataError, RecipeError
from moekit.families.seam import Observer
from moekit.view import MoEView

LINES = ["max(603, 652, 29) = 652", "11 * 40 = 440", "max(10, 20, 30) = 30", "max(7, 81, 29) = 81"]
QUESTIONS = [Question(x[: x.rindex(" ")], x[x.rindex(" ") + 1 :]) for x in LINES]


@pytest.fixture(scope="module")
def model():
    return moekit.open("refmoe")


@pytest.fixture(scope="module")
def stock(model):
    return model.load(torch.float32)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Questions whose answers are what the model says, but the last one."""
    out = tmp_path_factory.mktemp("c3po")
    tokenizer = load_tokenizer(model.path)
    prompts = [tokenizer(x.prompt).input_ids for x in QUESTIONS]
    marking = Marking()
    written = decode(
        [Runner(model.load(torch.float32), model.layout)],
        prompts,
        max_new_tokens=8,
        finished=marking.finished(tokenizer),
    )
    answers = [marking.given(tokenizer.decode(x)) for x in written]
    answers[-1] += "0"
    rows = [{"prompt": x.prompt, "answer": answer} for x, answer in zip(QUESTIONS, answers, strict=True)]
    (out / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    build(model, load_questions(out / "qa.jsonl"), out / "ref", max_new_tokens=8, dtype=torch.float32)
    return out


@pytest.fixture(scope="module")
def references(model, folder):
    return References.load(folder / "ref", model)


# ---- pathways


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "zaya", "phimoe"])
def test_a_prompts_own_pathway_changes_nothing_and_another_only_what_follows(family, tmp_path):
    specimen = Specimen(family, tmp_path)
    stock, layout = specimen.stock, specimen.layout
    view, ids = MoEView(stock, layout), specimen.batch["input_ids"][:1]
    own, embedding = read(stock, view, ids[0].tolist())
    assert embedding.shape == (stock.get_output_embeddings().weight.shape[1],)
    last = torch.tensor([ids.shape[1] - 1])
    plain = run(stock, {"input_ids": ids})
    with overriding(view, {index: x[None] for index, x in own.items()}, lambda _: last):
        assert torch.allclose(run(stock, {"input_ids": ids}), plain, atol=2e-4)
    turned = {index: x.roll(1)[None] for index, x in own.items()}
    with overriding(view, turned, lambda _: last):
        moved = run(stock, {"input_ids": ids})
    assert torch.allclose(moved[:, :-1], plain[:, :-1], atol=1e-5)
    assert (moved[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert torch.equal(run(stock, {"input_ids": ids}), plain)


class Chosen(Observer):
    def __init__(self):
        self.ids = []

    def routed(self, call):
        if call.layer.index == 5:
            self.ids.append(call.ids.clone())


def test_only_the_prompts_last_token_is_mixed(model, stock):
    prompt = [5, 9, 80, 12]
    view, seen = MoEView(stock, model.layout), Chosen()
    wanted = torch.zeros(32)
    wanted[[3, 9, 17, 30]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    mixed = Runner(stock, model.layout, [branch({5: wanted})])
    with torch.no_grad(), mixed.changed(), mixed.view.watch(seen):
        mixed.start([prompt])
        mixed.step(torch.tensor([7]))
    with torch.no_grad(), view.watch(plain := Chosen()):
        stock(input_ids=torch.tensor([prompt]), use_cache=False)
    assert seen.ids[0][-1].sort().values.tolist() == [3, 9, 17, 30]
    assert torch.equal(seen.ids[0][:-1], plain.ids[0][:-1])
    assert seen.ids[1][0].sort().values.tolist() != [3, 9, 17, 30]


def test_the_loss_is_that_of_each_text_alone_and_its_slope_is_right(model, stock):
    stock.requires_grad_(False)
    view = MoEView(stock, model.layout)
    prompts, answers = [[5, 9, 80], [7, 8, 9, 10, 11]], [[30, 31], [40]]
    scores = torch.rand(2, 32, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    answered = Answers(stock, view, prompts, answers)
    losses = answered.losses({5: scores})
    for row in range(2):
        with overriding(view, {5: scores[row : row + 1]}, lambda _, row=row: torch.tensor([len(prompts[row]) - 1])):
            logits = stock(input_ids=torch.tensor([[*prompts[row], *answers[row]]]), use_cache=False).logits[0]
        told = logits.log_softmax(-1)[len(prompts[row]) - 1 : -1]
        alone = -told.gather(-1, torch.tensor(answers[row])[:, None]).mean()
        assert float(alone.detach()) == pytest.approx(float(losses[row].detach()), abs=1e-4)
    (slope,) = torch.autograd.grad(losses.sum(), scores)
    chosen = int(scores[0].argmax())
    step = torch.zeros_like(scores)
    step[0, chosen] = 1e-3
    with torch.no_grad():
        up, down = (answered.losses({5: scores + x}).sum() for x in (step, -step))
    assert float(slope[0, chosen]) == pytest.approx(float(up - down) / 2e-3, rel=0.05, abs=1e-3)
    short = Answers(stock, view, [[5], [7, 8]], answers).losses({5: scores})
    assert float(short[0].detach()) == pytest.approx(
        float(Answers(stock, view, [[5]], answers[:1]).losses({5: scores[:1]})[0].detach()), abs=1e-4
    )


# ---- the surrogates


def made(directions, pathways):
    """References whose embeddings are points around their mean."""
    return References([[1]] * len(pathways), [[2]] * len(pathways), {0: pathways}, directions, {})


def test_neighbours_and_weights_by_hand():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    references = made(points, torch.eye(4))
    order, weights = nearest(references, torch.tensor([3.0, 0.6]), C3PO(neighbours=2))
    assert order.tolist() == [2, 3]  # the first points in the same direction: as good as the prompt itself
    squared = torch.tensor([2 - 2 * 0.19612, 2 + 2 * 0.19612])
    by_hand = torch.exp(-squared / (2 * squared.mean()))
    assert torch.allclose(weights, by_hand / by_hand.sum(), atol=1e-4)
    assert torch.allclose(regressed(references, order, weights, 0), torch.tensor([0.0, 0.0, *weights]))
    assert nearest(references, torch.tensor([3.0, 0.6]), C3PO(same=0.0))[0].tolist() == [3, 1]
    assert weights_of(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_mean_shift_ends_where_pathways_are_dense():
    dense = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.95, 0.05], [0.0, 1.0]])
    point = shifted(dense, torch.tensor([0.6, 0.4]), C3PO(surrogate="mode", steps=50))
    assert torch.allclose(point, torch.tensor([0.95, 0.05]), atol=0.02)
    once = shifted(dense[:1], torch.tensor([0.0, 1.0]), C3PO(neighbours=1, steps=1, stay=0.25))
    assert torch.allclose(once, torch.tensor([0.75, 0.25]))


def test_only_core_experts_change():
    own, new = torch.tensor([0.5, 0.1, 0.3, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert core(own, new, 2).tolist() == pytest.approx([0.1, 0.1, 0.3, 0.1])


@pytest.mark.parametrize("surrogate", ["kernel", "gradient", "mode"])
def test_what_is_optimised_does_not_get_worse(model, stock, references, surrogate):
    settings = C3PO(surrogate=surrogate, layers=2, experts=6, steps=4, rate=0.05)
    finder = Pathfinder(Runner(stock, model.layout), references, settings)
    prompt = load_tokenizer(model.path)("max(4, 5, 600) =").input_ids
    found = finder.find(prompt)
    assert sorted(found.pathway) == [4, 5]
    own, _ = read(stock, finder.view, prompt)
    for index, scores in found.pathway.items():
        assert int((scores != own[index]).sum()) <= 6
    if found.loss is not None:
        assert found.loss[1] <= found.loss[0] + 1e-6
    written, _ = decode_mixed(finder, [prompt], max_new_tokens=3)
    assert len(written[0]) == 3


@pytest.mark.parametrize("wrong", [{"surrogate": "best"}, {"neighbours": 0}, {"same": 1.5}, {"rate": -1.0}])
def test_impossible_settings(wrong):
    with pytest.raises(RecipeError):
        C3PO(**wrong).check()


# ---- reference sets


def test_what_is_answered_wrong_is_left_out(model, references):
    assert len(references) == 3
    assert references.manifest["asked"] == 4
    assert sorted(references.pathways) == list(range(6))
    assert references.pathways[0].shape == (3, 32)
    assert torch.allclose(references.pathways[2].sum(-1), torch.ones(3), atol=1e-4)
    tokenizer = load_tokenizer(model.path)
    assert [tokenizer.decode(x) for x in references.prompts] == [x.prompt for x in QUESTIONS[:3]]


def test_no_right_answer_and_nothing_is_written(model, tmp_path):
    with pytest.raises(DataError, match="none of the questions right"):
        build(model, [Question("1 + 1 =", "a frog")], tmp_path / "ref", max_new_tokens=4)
    assert not list(tmp_path.iterdir())


def test_references_of_another_model_are_refused(model, folder, tmp_path):
    head = json.loads((folder / "ref" / "references.json").read_text("utf-8"))
    (tmp_path / "references.json").write_text(json.dumps(head | {"layout": "0" * 16}), "utf-8")
    with pytest.raises(DataError, match="of another model"):
        References.load(tmp_path, model)
    with pytest.raises(DataError, match="no reference set"):
        References.load(tmp_path / "nowhere", model)


@pytest.mark.parametrize("line", ["no json", '{"prompt": "a"}', '{"prompt": "", "answer": "b"}', "[1]", ""])
def test_questions_of_another_form(tmp_path, line):
    (tmp_path / "qa.jsonl").write_text(line + "\n", "utf-8")
    with pytest.raises(DataError, match=r"right form|no questions"):
        load_questions(tmp_path / "qa.jsonl")


def test_what_counts_of_an_answer():
    assert Marking().right(" 42\nmore", "42")
    assert Marking(stop="").given("a\nb") == "a\nb"
    assert Marking(stop="", extract=r"(-?\d+)\D*$").right("so 3 + 4 is 7.", "7")
    assert unescaped(r"\né\t") == "\né\t"
    assert not Marking(extract=r"\d+").right("none", "7")
    with pytest.raises(DataError, match="regular expression"):
        Marking(extract="(").check()


# ---- the verbs


def test_decode_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    arguments = ["decode", "refmoe", "--data", str(folder / "qa.jsonl"), "--max-tokens", "8", "--out", str(out)]
    for method in (
        ["scmoe", "--weak", "random"],
        ["c3po", "--reference", str(folder / "ref"), "--surrogate", "mode"],
        ["guidance", "--negative", "x"],
        ["emulated", "--small-tuned", "refmoe", "--small-base", "refmoe"],
    ):
        assert cli.main([*arguments, "--method", *method]) == 0
        assert "of 4 right" in capsys.readouterr().out
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [x["prompt"] for x in rows] == [x.prompt for x in QUESTIONS]
        assert all(isinstance(x["right"], bool) for x in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--method", "scmo"], "did you mean"),
        (["--prompt", "x", "--method", "scmoe", "--plus", "a.json"], "no option --plus"),
        (["--prompt", "x", "--method", "c3po"], "--reference"),
        (["--prompt", "x", "--method", "guidance"], "nobody guides"),
        (["--method", "scmoe"], "nothing to continue"),
        (["--prompt", "x", "--method", "scmoe", "--weak", "rank:40"], "more than there is"),
        (["--prompt", "x", "--method", "c3po", "--reference", "nowhere"], "no reference set"),
    ],
)
def test_what_cannot_be_decoded(arguments, message, capsys):
    assert cli.main(["decode", "refmoe", *arguments]) == 2
    assert message in capsys.readouterr().err
