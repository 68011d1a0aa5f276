"""Task scores are what a plain loop over the stock model gives, loaded or streamed; folders of tasks work offline."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

import tiny
from moekit.apply.bake import bake
from moekit.cli import main
from moekit.data import load_tokenizer
from moekit.errors import DataError, ModelError, RecipeError
from moekit.evaluation import harness, tasks
from moekit.evaluation.tasks import paired_difference, run_tasks
from moekit.families.model import Model
from moekit.plans import Drop, Plan
from moekit.progress import silent

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tasks"
QUESTIONS = [
    {"context": "def add(a, b):", "choices": ["return a", "return a + b", "pass"], "answer": 1},
    {"context": "In the beginning God", "choices": ["created", "was"], "answer": 0},
    {"context": "1 + 1 =", "choices": ["2", "3", "4"], "answer": 0},
    {"context": "for x in range", "choices": ["(10):", "[10]", "{10}"], "answer": 0},
    {"context": "And the earth was", "choices": ["without form", "round", "x"], "answer": 2},
]


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    """What `datasets` makes of JSONL goes to a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three tasks over the same questions: to choose, to find likely, to write."""
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "questions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS))
    head = "dataset_path: json\ndataset_kwargs:\n  data_files: {test: questions.jsonl}\ntest_split: test\n"
    (place / "choose.yaml").write_text(
        f"{head}task: choose\noutput_type: multiple_choice\ndoc_to_text: '{{{{context}}}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (place / "likely.yaml").write_text(
        f"{head}task: likely\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{context}}}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (place / "write.yaml").write_text(
        f"{head}task: write\noutput_type: generate_until\ndoc_to_text: '{{{{context}}}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return place


@pytest.fixture
def model(talker) -> Model:
    return Model.open(talker)


@pytest.fixture
def streamed(monkeypatch):
    """As if no model fitted in memory."""
    monkeypatch.setattr(Model, "fits", lambda *_: False)


def log_probability(model: Model, context: str, answer: str) -> float:
    """Of ` answer` behind `context`, by stock transformers, a token at a time."""
    tokenizer, loaded = load_tokenizer(model.path), model.load(torch.float32)
    before, whole = (tokenizer.encode(x) for x in (context, f"{context} {answer}"))
    with torch.inference_mode():
        logs = loaded(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def by_metric(found: tasks.TaskScores) -> dict[tuple[str, str], tasks.TaskScore]:
    return {(x.task, x.metric): x for x in found.scores}


@pytest.mark.parametrize("way", ["loaded", "streamed"])
def test_accuracy_is_that_of_a_loop(model, folder, way, request):
    if way == "streamed":
        request.getfixturevalue("streamed")
    found = run_tasks(model, ["choose"], task_folder=folder, dtype=torch.float32)
    right = []
    for x in QUESTIONS:
        scores = [log_probability(model, x["context"], choice) for choice in x["choices"]]
        right.append(int(np.argmax(scores)) == x["answer"])
    score = by_metric(found)["choose", "acc"]
    assert score.value == pytest.approx(np.mean(right))
    assert 0 < score.value < 1
    assert score.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert score.samples == len(QUESTIONS)
    assert score.higher_is_better
    assert found.settings["ran"] == ["stock transformers" if way == "loaded" else "stock layers, streamed"]


def test_streamed_answers_are_those_in_memory(model, monkeypatch):
    """Each log-probability; with one sequence a batch, and one batch a pass, too."""
    asked = [(x["context"], f" {choice}") for x in QUESTIONS for choice in x["choices"]] + [("", "x = 1")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("def f():\n  return 1", "a b c " * 40)]
    with harness.quiet():
        loaded = harness.LoadedLM(model, torch.float32, "cpu", 3, silent)
        loaded._max_length = 32
        expected = loaded.loglikelihood(requests)
        expected_rolling = loaded.loglikelihood_rolling(rolling)
        for limit, together in ((harness.LOGIT_BYTES, harness.PASS_BATCHES), (1, 1)):
            monkeypatch.setattr(harness, "LOGIT_BYTES", limit)
            monkeypatch.setattr(harness, "PASS_BATCHES", together)
            lm = harness.StreamedLM(model, torch.float32, "cpu", silent)
            lm._max_length = 32
            found = lm.loglikelihood(requests)
            assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=1e-4)
            assert [x[1] for x in found] == [x[1] for x in expected]
            assert lm.loglikelihood_rolling(rolling) == pytest.approx(expected_rolling, abs=1e-3)


def test_likelihood_of_texts(model, folder, streamed):
    found = by_metric(run_tasks(model, ["likely"], task_folder=folder, dtype=torch.float32))
    tokenizer, loaded = load_tokenizer(model.path), model.load(torch.float32)
    total = words = size = 0
    for x in QUESTIONS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(x["context"])]])
        with torch.inference_mode():
            total += float(loaded(ids, labels=ids).loss) * (ids.shape[1] - 1)
        words, size = words + len(x["context"].split()), size + len(x["context"].encode())
    assert found["likely", "word_perplexity"].value == pytest.approx(math.exp(total / words), rel=1e-4)
    assert found["likely", "bits_per_byte"].value == pytest.approx(total / size / math.log(2), rel=1e-4)
    assert not found["likely", "bits_per_byte"].higher_is_better


def test_two_models_are_paired(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "RESAMPLES", 50)
    other = Model.open(tiny.save_talker(tmp_path / "other", "olmoe"))
    found = run_tasks(model, ["choose", "likely"], task_folder=folder, against=other, dtype=torch.float32)
    alone = by_metric(run_tasks(other, ["choose", "likely"], task_folder=folder, dtype=torch.float32))
    for key, score in by_metric(found).items():
        assert score.against == alone[key].value
        assert score.difference.value == pytest.approx(score.value - score.against)
        assert score.paired
        assert score.difference.low <= score.difference.value <= score.difference.high
    same = by_metric(run_tasks(model, ["choose", "likely"], task_folder=folder, against=model, dtype=torch.float32))
    assert all(x.difference == (0, 0, 0) for x in same.values())


def test_paired_difference_of_a_mean_and_of_a_ratio():
    ours, theirs = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    assert paired_difference(ours, theirs, None, 0.75, 0.25).value == pytest.approx(0.5)
    pairs = [[(-float(a), 2.0) for a in x] for x in ([3, 5, 4, 6], [5, 8, 6, 9])]

    def perplexity(items):
        return math.exp(-sum(a for a, _ in items) / sum(b for _, b in items))

    found = paired_difference(*pairs, perplexity, *map(perplexity, pairs))
    assert found.value == pytest.approx(math.exp(18 / 8) - math.exp(28 / 8))
    assert found.low < found.value < found.high < 0
    assert paired_difference(*pairs, None, 1.0, 2.0) is None
    assert paired_difference([("a", "b")], [("a", "c")], len, 1.0, 2.0) is None
    assert paired_difference([], [], None, 1.0, 2.0) is None


def test_intervals_of_differences_cover():
    """Documents that both models find hard: the interval of the difference holds the truth, and is narrow."""
    rng, covered, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        hard = rng.random(100)
        ours, theirs = ((rng.random(100) < 0.9 * hard + x).astype(float) for x in (0.1, 0.0))
        found = paired_difference(list(ours), list(theirs), None, ours.mean(), theirs.mean(), seed=trial)
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / trials <= 0.985


def test_models_in_memory_write(model, folder):
    found = by_metric(run_tasks(model, ["write"], task_folder=folder, limit=2))
    assert found["write", "exact_match"].samples == 2


def test_a_plan_is_applied_live_and_compared_with_the_model_without_it(model, folder, tmp_path):
    """It scores what the model scores that the plan makes in files."""
    layout = model.layout
    plan = Plan(layout_hash=layout.hash, ops=[Drop(layer=x.index, experts=(0, 2, 5)) for x in layout.routed])
    bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    settings = {"task_folder": folder, "dtype": torch.float32}
    made = by_metric(run_tasks(Model.open(tmp_path / "out"), ["choose", "likely"], **settings))
    whole = by_metric(run_tasks(model, ["choose", "likely"], **settings))
    found = by_metric(run_tasks(model, ["choose", "likely"], plan=plan, **settings))
    for key, score in found.items():
        assert score.value == pytest.approx(made[key].value, rel=1e-4)
        assert score.against == pytest.approx(whole[key].value)
    assert any(x.value != pytest.approx(x.against) for x in found.values())
    with pytest.raises(ModelError, match="a plan is applied live"):
        run_tasks(model, ["write"], plan=plan, **settings)


def test_streamed_models_do_not_write(model, folder, streamed):
    with pytest.raises(ModelError, match=r"(?s)want the model to write.*write; the model does not fit"):
        run_tasks(model, ["choose", "write"], task_folder=folder)


def test_unknown_task(model, folder):
    with pytest.raises(RecipeError, match=r"(?s)no task 'chose'.*did you mean 'choose'"):
        run_tasks(model, ["choose", "chose"], task_folder=folder)


def test_bad_folders(model, folder, tmp_path):
    with pytest.raises(RecipeError, match="no such folder of tasks"):
        run_tasks(model, ["choose"], task_folder=tmp_path / "nowhere")
    (folder / "questions.jsonl").unlink()
    with pytest.raises(DataError, match=r"(?s)task 'choose' cannot be loaded.*questions.jsonl"):
        run_tasks(model, ["choose"], task_folder=folder)


def test_a_task_that_runs_code_is_refused(model, folder):
    with (folder / "write.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(RecipeError, match="runs the code that a model writes"):
        run_tasks(model, ["write"], task_folder=folder)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("num_fewshot", -1), ("batch_size", 0)])
def test_impossible_numbers(model, folder, name, value):
    with pytest.raises(RecipeError, match=f"{name} is too small"):
        run_tasks(model, ["choose"], task_folder=folder, **{name: value})


def test_missing_package(model, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(
        RecipeError, match=r"(?s)lm-evaluation-harness, which is not here.*pip install 'moekit\[eval\]'"
    ):
        run_tasks(model, ["arc_easy"])


def test_few_shot_examples_come_before_the_question(model, folder):
    (folder / "choose.yaml").write_text((folder / "choose.yaml").read_text() + "fewshot_split: test\n")
    seen = []

    class Noted(harness.LoadedLM):
        def loglikelihood(self, requests, *args, **kwargs):
            seen.extend(x.args[0] for x in requests)
            return super().loglikelihood(requests, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "LoadedLM", Noted)
        found = run_tasks(model, ["choose"], task_folder=folder, num_fewshot=2, limit=1)
    assert all(prompt.count("\n\n") == 2 and prompt.endswith(QUESTIONS[0]["context"]) for prompt in seen)
    assert found.settings["num_fewshot"] == {"choose": 2}


def test_the_command(talker, folder, tmp_path, capsys):
    out = tmp_path / "scores.json"
    given = ["eval", str(talker), "--tasks", "choose,likely", "--task-folder", str(folder), "--limit", "3"]
    assert main([*given, "--against", str(talker), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "acc ↑" in shown
    assert "+0.0000 [+0.0000, +0.0000]" in shown
    saved = json.loads(out.read_text())["tasks"]
    assert [x["task"] for x in saved["scores"]] == ["choose", "choose", "likely", "likely"]
    assert saved["limit"] == 3
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["scores"] == [
        {**x, "against": None, "against_stderr": None, "difference": None, "paired": False} for x in saved["scores"]
    ]
    assert main(["eval", str(talker)]) == 2
    assert "--data or --tasks must be given" in capsys.readouterr().err


def test_text_and_tasks_in_one_command(talker, folder, capsys):
    given = ["--tasks", "choose", "--task-folder", str(folder), "--limit", "1"]
    data = ["--data", f"code={__file__}", "--tokens", "64", "--sequence-length", "32"]
    assert main(["eval", str(talker), *given, *data, "--json"]) == 0
    assert {"domains", "tasks"} <= json.loads(capsys.readouterr().out).keys()


def test_progress_is_told(model, folder, streamed, monkeypatch):
    told = []
    run_tasks(model, ["choose"], task_folder=folder, limit=2, progress=lambda *x: told.append(x))
    assert ("layers", 1) in {x[:2] for x in told}
    monkeypatch.undo()
    told.clear()
    run_tasks(model, ["choose"], task_folder=folder, limit=2, progress=lambda *x: told.append(x))
    assert told[-1] == ("requests", 5, 5)


def test_the_example_folder_is_what_its_script_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_tasks", EXAMPLE / "make_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path))
    for file in EXAMPLE.glob("*.jsonl"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_refmoe_knows_its_domains():
    """Of four choices; by lot, 40 documents would give 24 right less than once in 10,000 times."""
    found = run_tasks(Model.open("refmoe"), ["refmoe_arithmetic"], task_folder=EXAMPLE, limit=40)
    assert all(x.value > 0.5 for x in found.scores)
    assert str(found).startswith("task ")
    assert isinstance(by_metric(found)["refmoe_arithmetic", "acc"].stderr, float)
