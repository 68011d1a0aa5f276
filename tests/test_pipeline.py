"""A recipe carried out: what it says beforehand, what it makes, what its report holds, whose files it leaves alone."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import moekit
from moekit import refmoe
from moekit.apply.bake import Baked
from moekit.checkpoint.reader import Checkpoint
from moekit.errors import OutputError, PlanError, UserError, VerificationError
from moekit.evaluation.verify import Verification
from moekit.families.model import Model
from moekit.pipeline import Job, bytes_after, estimate, prepare, production, run
from moekit.plans import Plan
from moekit.recipe import Recipe
from moekit.stats import Stats


@pytest.fixture
def recipe(tmp_path, talker):
    """A small job; settings can be changed."""
    texts = {}
    for name in ("python", "kjv"):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(refmoe.texts()[name].read_text()[:5000])

    def make(**changes: object) -> Recipe:
        settings = {
            "model": str(talker),
            "data": {"python": str(texts["python"])},
            "keep": 0.5,
            "tokens": 512,
            "sequence_length": 64,
            "out": str(tmp_path / "out"),
        }
        if changes.pop("evaluated", False):
            settings |= {"evaluation_data": {x: str(y) for x, y in texts.items()}, "evaluation_sequence_length": 64}
        return Recipe.from_flags(**settings | changes)

    return make


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def test_what_is_said_beforehand_comes_true(recipe):
    job = prepare(recipe())
    expected = estimate(job)
    result = run(job)
    assert expected.bytes_after == bytes_after(job) == pytest.approx(result.baked.bytes_after, rel=0.01)
    assert 0 < expected.measure_s < 60
    assert 0 < expected.bake_s < 60


def test_estimate_of_multi_token_prediction_counts_what_leaves(opened, tmp_path, recipe):
    layout = opened("deepseek_v3").layout
    job = Job(recipe(keep=1.0), opened("deepseek_v3"), None, None, None, None)
    assert bytes_after(job) == layout.total.bytes - layout.parts["mtp"].bytes


def test_everything_that_a_result_holds(recipe, tmp_path):
    result = run(prepare(recipe(evaluated=True)))
    out = tmp_path / "out"
    assert result.path == out
    assert isinstance(result.plan, Plan)
    assert isinstance(result.stats, Stats)
    assert isinstance(result.baked, Baked)
    assert isinstance(result.verification, Verification)
    assert result.verification.ok
    assert result.evaluation.domains.keys() == {"python", "kjv"}
    assert result.seconds.keys() == {"measure", "plan", "bake", "verify", "evaluate"}
    assert names(tmp_path) == ["kjv.txt", "out", "python.txt"]
    assert Plan.load(out / "plan.json").ops == result.plan.ops
    assert Checkpoint.open(out).bytes == result.baked.bytes_after


def test_report_holds_every_number(recipe, tmp_path, talker):
    result = run(prepare(recipe(evaluated=True)))
    out, model = tmp_path / "out", Model.open(talker)
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == {str(x.index): list(result.plan.kept(x)) for x in model.layout.routed}
    assert report["bytes"] == {"before": model.checkpoint.bytes, "after": Checkpoint.open(out).bytes}
    assert report["model"]["fingerprint"] == model.fingerprint
    assert report["calibration"]["domains"]["python"]["tokens"] == 512
    assert report["verification"]["positions"] > 0
    assert report["method"] == "easy-ep"
    assert report["settings"]["keep"] == 0.5
    for index, share in report["removed_gate_mass"].items():
        mass = result.stats.get("gate_mass", int(index))
        gone = [e for e in range(8) if e not in report["kept"][index]]
        assert share == pytest.approx(mass[gone].sum() / mass.sum())
    for name, score in result.evaluation.domains.items():
        assert report["evaluation"]["domains"][name]["ratio"] == list(score.ratio)
    assert report["versions"].keys() >= {"moekit", "torch", "transformers"}
    assert set(result.plan.notes) <= set(report["notes"])


def test_report_for_people_and_model_card(recipe, tmp_path, talker):
    result = run(prepare(recipe(evaluated=True)))
    out = tmp_path / "out"
    text = (out / "report.md").read_text()
    ratio = result.evaluation.domains["kjv"].ratio
    for part in (
        "with 4 of 8 experts a layer",
        "`easy-ep`",
        f"{ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]",
        "stock transformers",
        "super experts protected",
        "| 0 | 4 |",
    ):
        assert part in text
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == talker.name  # a path says nothing to others
    assert head["library_name"] == "transformers"
    assert text in card
    assert Recipe.load(out / "recipe.yaml") == recipe(evaluated=True)
    made = json.loads((out / "moekit.json").read_text())
    assert made["recipe"] == (out / "recipe.yaml").read_text()


def test_licence_of_the_source_is_carried_over(recipe, tmp_path):
    run(prepare(recipe(model="refmoe")))
    head = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    source = yaml.safe_load((refmoe.model_path() / "README.md").read_text().split("---\n")[1])
    assert head["license"] == source["license"]
    assert head["base_model"] == "refmoe"
    assert (tmp_path / "out" / "README.source.md").read_text() == (refmoe.model_path() / "README.md").read_text()


def test_without_proof_and_comparison(recipe, tmp_path):
    result = run(prepare(recipe(verify=False)))
    assert result.verification is result.evaluation is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verification"] is report["evaluation"] is None
    assert "Proof" not in (tmp_path / "out" / "report.md").read_text()


def test_everything_stays_when_all_is_kept(recipe, tmp_path, talker):
    run(prepare(recipe(keep=1.0)))
    source, out = Checkpoint.open(talker), Checkpoint.open(tmp_path / "out")
    assert out.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        assert torch.equal(source.read(name), out.read(name))


def test_only_chosen_domains_count(recipe):
    data = {x: str(refmoe.texts()[x]) for x in ("python", "kjv")}
    plans = [run(prepare(recipe(data=data, domain=x)), plan_only=True).plan for x in (None, "python", "kjv")]
    alone = run(prepare(recipe(data={"python": data["python"]})), plan_only=True).plan
    assert plans[1].ops == alone.ops
    assert plans[1].ops != plans[2].ops
    assert plans[0].settings["domain"] == ["python", "kjv"]


def test_dtype_is_that_of_the_recipe(recipe):
    for dtype in ("float32", "auto"):
        stats = run(prepare(recipe(dtype=dtype)), plan_only=True).stats
        assert stats.manifest["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


def test_global_spread_cannot_be_written(recipe, tmp_path):
    """Said when the plan is made, not when it is loaded."""
    with pytest.raises(PlanError, match="different numbers of experts"):
        run(prepare(recipe(method="reap", spread="global", protect="none")))
    assert not (tmp_path / "out").exists()


# ---- nobody else's files


def own(folder: Path) -> Path:
    """A folder with something in it that no one else has."""
    folder.mkdir()
    (folder / "thesis.tex").write_text("dear")
    return folder / "thesis.tex"


def test_folders_beside_the_output_that_are_not_ours(recipe, tmp_path, talker):
    model = Model.open(talker)
    for suffix in (".unverified", ".failed", ".unverified.partial"):
        file = own(tmp_path / f"out{suffix}")
        with pytest.raises(OutputError, match="taken"):
            run(prepare(recipe()))
        with pytest.raises(OutputError, match="taken"):
            moekit.bake(model, Plan(layout_hash=model.layout.hash), tmp_path / "out")
        assert file.read_text() == "dear"
        file.unlink()
        file.parent.rmdir()


def test_a_folder_named_as_our_work_keeps_what_is_in_it(recipe, tmp_path):
    file = own(tmp_path / "out.work")
    run(prepare(recipe()))
    assert file.read_text() == "dear"
    assert names(tmp_path / "out.work") == ["thesis.tex"]


def test_a_folder_named_as_our_statistics(recipe, tmp_path):
    (tmp_path / "out.work").mkdir()
    file = own(tmp_path / "out.work" / "stats")
    with pytest.raises(OutputError, match="holds something else"):
        prepare(recipe())
    assert file.read_text() == "dear"


def test_a_link_as_output(recipe, tmp_path):
    """What it points to is made, and stays linked."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(prepare(recipe()))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()


def test_an_empty_folder_as_output(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    run(prepare(recipe()))
    assert (tmp_path / "out" / "config.json").exists()


# ---- checked before work starts


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 0.1},
        {"keep": 9},
        {"method": "no-such"},
        {"options": {"no": 1}},
        {"data": {"x": "no/such/file.txt"}},
        {"model": "no-such-model"},
        {"sequence_length": 100_000},
    ],
    ids=str,
)
def test_refused_by_preparing(recipe, changes, tmp_path):
    before = names(tmp_path)
    with pytest.raises(UserError):
        prepare(recipe(**changes))
    assert names(tmp_path) == before


def test_a_model_that_came_to_lie_at_the_output_meanwhile(recipe, tmp_path):
    job = prepare(recipe())
    run(prepare(recipe(keep=0.75)))
    with pytest.raises(OutputError, match="not empty"):
        run(job)
    assert Model.open(tmp_path / "out").layout.routed[0].num_experts == 6


def test_failed_proof_leaves_the_old_model(recipe, tmp_path, monkeypatch):
    run(prepare(recipe()))
    old = (tmp_path / "out" / "model.safetensors").read_bytes()
    wrong = Verification(False, "stock transformers", "float32", 9, 0.0, 1e-4, 7.0)
    monkeypatch.setattr(production, "verify", lambda *_: wrong)
    with pytest.raises(VerificationError, match=r"(?s)expected: .*within 0.0001.*got: .*largest difference 7"):
        run(prepare(recipe(keep=0.75), overwrite=True), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == old
    assert names(tmp_path) == ["kjv.txt", "out", "out.failed", "out.work", "python.txt"]
    assert names(tmp_path / "out.work") == ["stats"]  # whoever tries again need not measure again
