"""A budget of bytes in a job: what is chosen is written, proven, said, and can be run again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import moekit
from moekit.cli import main
from moekit.cli.compress import run_recipe
from moekit.errors import PlanError, RecipeError
from moekit.measurement import measure
from moekit.pipeline import PLANNED, choose, prepare, production, statistics
from moekit.pipeline.job import budget_bytes
from moekit.plans import Plan
from moekit.recipe import Recipe, parse_budget

TEXT = "def add(a, b):\n    return a + b\n\nclass Point:\n    x = 0\n\n"


def flags(talker: Path, tmp_path: Path, **others: object) -> dict[str, object]:
    text = tmp_path / "code.txt"
    text.write_text(TEXT * 60)
    given = {"model": str(talker), "data": {"code": str(text)}, "out": str(tmp_path / "out")}
    return given | {"tokens": 768, "sequence_length": 64} | others


def fewer(talker: Path, share: float) -> int:
    """Bytes of the model with so much less of its experts'."""
    layout = moekit.open(talker).layout
    return int(layout.total.bytes - share * layout.parts["experts"].bytes)


def recipe(talker: Path, tmp_path: Path, **others: object) -> Recipe:
    return Recipe.from_flags(**flags(talker, tmp_path, **others))


@pytest.mark.parametrize(("given", "meant"), [
    ("8GB", 8_000_000_000), ("512MiB", 512 << 20), (4096, 4096), ("50%", 0.5), (0.5, 0.5), ("0.5", 0.5), ("100%", 1.0),
])  # fmt: skip
def test_budgets_as_people_write_them(given, meant):
    found = parse_budget(given)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize("given", ["0%", "120%", 1.5, "many", "5 GB of RAM", True, "0.x"])
def test_what_is_no_budget(given):
    with pytest.raises(RecipeError):
        parse_budget(given)


def test_what_is_chosen_is_written_and_can_be_run_again(talker, tmp_path, capsys):
    share = round(fewer(talker, 0.6) / moekit.open(talker).checkpoint.bytes, 3)
    result = run_recipe(recipe(talker, tmp_path, budget=share), frontier=tmp_path / "frontier")
    out, source = tmp_path / "out", moekit.open(talker)
    assert result.verification.ok
    assert result.baked.bytes_after <= share * source.checkpoint.bytes
    said = " ".join(capsys.readouterr().out.split())
    assert "keeps " in said
    assert "measured KL" in said
    assert {x.name for x in (tmp_path / "frontier").iterdir()} == {"frontier.svg", "frontier.md", "frontier.json"}
    assert any(note.startswith(PLANNED + "keeps ") for note in result.steps[0].plan.notes)
    assert PLANNED not in said  # what was said once is in the report
    assert PLANNED in (out / "report.md").read_text()

    known = yaml.safe_load((out / "recipe.yaml").read_text())
    assert known["budget"] == share
    assert len(known["steps"]) == len(result.steps)
    again = Recipe.load(out / "recipe.yaml")
    again.out = str(tmp_path / "again")
    repeated = run_recipe(again)
    assert Plan.load(tmp_path / "again" / "plan.json").ops == Plan.load(out / "plan.json").ops
    assert repeated.baked.bytes_after == result.baked.bytes_after


def test_the_size_that_was_promised_is_the_size_that_is_written(talker, tmp_path):
    job, choice = choose(prepare(recipe(talker, tmp_path, budget=fewer(talker, 0.7))))
    promised = next(x.candidate.bytes for x in choice.frontier.points if x.chosen)
    result = run_recipe(job.recipe)
    assert result.baked.bytes_after == promised <= budget_bytes(job.recipe, job.model)


def test_nothing_is_decided_from_what_is_measured_on(talker, tmp_path):
    whole = prepare(recipe(talker, tmp_path, keep=0.5))
    job = prepare(recipe(talker, tmp_path, budget=fewer(talker, 0.3)))
    assert job.held_out is not None
    assert job.steps == []
    assert sum(job.calibration.tokens.values()) + sum(job.held_out.tokens.values()) == sum(
        whole.calibration.tokens.values()
    )


def test_a_budget_that_the_model_keeps(talker, tmp_path, capsys):
    result = run_recipe(recipe(talker, tmp_path, budget="100%"))
    assert result.path is None
    assert "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_planned_only(talker, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = flags(talker, tmp_path)["data"]["code"]
    sizes = ["--tokens", "768", "--sequence-length", "64", "--budget", str(fewer(talker, 0.3))]
    assert main(["compress", str(talker), "--data", f"code={text}", *sizes, "--plan-only"]) == 0
    said = capfd.readouterr().out
    assert "keeps " in said
    assert "planned only" in said
    assert {x.name for x in tmp_path.iterdir()} == {"code.txt"}


def test_refused_before_any_work(talker, tmp_path, capfd):
    with pytest.raises(PlanError, match="as small as that"):
        prepare(recipe(talker, tmp_path, budget=1000))
    with pytest.raises(RecipeError, match="no such option"):
        prepare(recipe(talker, tmp_path, budget="99%", options=["format=zip"]))
    with pytest.raises(RecipeError, match="or a budget to choose it for"):
        recipe(talker, tmp_path, budget="50%", keep=0.5)
    assert not (tmp_path / "out.work").exists()
    given = [str(talker), "--data", f"code={tmp_path / 'code.txt'}", "--out", str(tmp_path / "out"), "--budget", "50%"]
    for more, named in ((["--keep", "0.5"], "--keep"), (["--step", "rtn-int4"], "--step")):
        assert main(["compress", *given, *more]) == 2
        assert f"--budget and {named}" in capfd.readouterr().err


def test_an_interrupted_run_measures_once_and_leaves_no_half_output(talker, tmp_path, monkeypatch):
    """Killed while it writes; the same command again chooses the same from the statistics that are there."""
    made, calls = recipe(talker, tmp_path, budget=fewer(talker, 0.6)), []

    def counted(*args: object, **settings: object) -> object:
        calls.append(args)
        return measure(*args, **settings)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics, "measure", counted)
    with monkeypatch.context() as patch:
        patch.setattr(production, "bake", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(made)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["code.txt", "out.work"]
    result = run_recipe(made)
    assert len(calls) == 1
    assert result.verification.ok
    assert sorted(x.name for x in tmp_path.iterdir()) == ["code.txt", "out"]


def test_the_own_form_when_asked_for(talker, tmp_path):
    job = prepare(recipe(talker, tmp_path, budget=fewer(talker, 0.7), options=["format=moekit"]))
    job, choice = choose(job)
    assert job.steps[-1].options["format"] == "moekit"
    result = run_recipe(job.recipe)
    assert moekit.open(result.path).layout.quantisation == "moekit"
    card = (result.path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "moekit"  # stock transformers finds no weights
    assert result.baked.bytes_after == next(x.candidate.bytes for x in choice.frontier.points if x.chosen)
