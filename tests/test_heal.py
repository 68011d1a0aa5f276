"""Healing: what is solved is right, what is tuned gets better, files do what the live plan does, kills cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
import tiny
from moekit import methods
from moekit.apply.bake import bake
from moekit.data import Dataset
from moekit.errors import DataError, OutputError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, evaluate, logits_of
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.fitting.heal.lineage import follow, origins
from moekit.methods.heal import _tuning as tuning
from moekit.methods.heal.router_distill import divergence, top
from moekit.methods.heal.router_lstsq import RowSums, together
from moekit.plans import Drop, Group, Merge, Plan, PlanTensors, Values
from moekit.stats import LayerStats, Stats

DROPPED = (1, 6)  # of 8 experts; one in each group where there are two
FEW = {"steps": 3, "sequences": 2}
JOBS = {
    "router-lstsq": {},
    "router-distill": FEW,
    "router-distill layer": FEW | {"scope": "layer", "match": "block"},
    "distill": FEW,
    "reconstruct": FEW | {"routers": True},
    "reconstruct teacher": FEW | {"inputs": "teacher", "match": "block"},
}


def text(rows: int = 8, length: int = 16) -> Dataset:
    return tiny.dataset(
        *(tiny.batch(domain, length, length - 3, seed=seed) for domain in (0, 1) for seed in range(rows // 4))
    )


@pytest.fixture(scope="module")
def pruned(opened, tmp_path_factory):
    """(source, the same with fewer experts, baked) of a family."""
    known: dict[str, tuple[Model, Model]] = {}

    def get(family: str) -> tuple[Model, Model]:
        if family not in known:
            source = opened(family)
            ops = [Drop(layer=x.index, experts=DROPPED) for x in source.layout.routed]
            out = tmp_path_factory.mktemp("pruned") / family
            bake(source.checkpoint, source.understanding, Plan(layout_hash=source.layout.hash, ops=ops), out)
            known[family] = source, Model.open(out)
        return known[family]

    return get


def fit_of(source: Model, model: Model, folder: Path, data: Dataset | None = None, **changes: object) -> Fit:
    return Fit(model, source, None, data or text(), folder, **({"dtype": torch.float32} | changes))


def heal(job: str, fit: Fit, **options: object) -> Plan:
    name = job.split()[0]
    return decide(name, fit, options=JOBS.get(job, {}) | options)


def logits(model: Model, plan: Plan | None = None) -> list[torch.Tensor]:
    return list(logits_of(Subject(model, plan), text(4).batches, torch.float32))


# ---- the mathematics


def test_rows_are_those_of_ridge_regression_by_hand():
    generator = torch.Generator().manual_seed(0)
    x, z, wanted = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 3, 3))
    sums = RowSums(bias=True, ridge=0.1, target="max")
    sums.add(x[:20], z[:20], wanted[:20])
    sums.add(x[20:], z[20:], wanted[20:])
    wide = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    penalty = 0.1 * (wide.T @ wide).diagonal().mean().sqrt() / (wide.T @ wide).diagonal().mean().sqrt()
    rows = (penalty * (wide.T @ wide).diagonal().mean()).sqrt() * torch.eye(7, dtype=torch.float64)
    by_hand = torch.linalg.lstsq(
        torch.cat([wide, rows]), torch.cat([wanted - z, torch.zeros(7, 3, dtype=torch.float64)])
    ).solution.T
    change = sums.solve()
    assert torch.allclose(change, by_hand)
    before, after = sums.errors(change)
    assert before == pytest.approx(float((wanted - z).square().mean()))
    assert after == pytest.approx(float((wanted - z - wide @ change.T).square().mean()))


def test_what_members_have_together():
    logits_TE = torch.tensor([[0.5, -1.0, 2.0, 40.0]], dtype=torch.float64)
    pair = [(0, 1), (2,)]
    chance = torch.sigmoid(logits_TE)
    one_of_two = 1 - (1 - chance[0, 0]) * (1 - chance[0, 1])
    assert together(logits_TE, pair, "softmax", "max").tolist() == [[0.5, 2.0]]
    assert together(logits_TE, pair, "softmax", "sum")[0, 0].exp() == pytest.approx(np.exp(0.5) + np.exp(-1))
    assert torch.sigmoid(together(logits_TE, pair, "sigmoid", "sum")[0, 0]) == pytest.approx(float(one_of_two))
    root = torch.nn.functional.softplus(together(logits_TE, pair, "softplus-sqrt", "sum")[0, 0]).sqrt()
    assert root == pytest.approx(float(torch.nn.functional.softplus(logits_TE[0, :2]).sqrt().sum()))
    assert together(logits_TE, [(3, 0)], "sigmoid", "sum")[0, 0] == pytest.approx(40.0, abs=1.0)
    assert together(logits_TE, [(2,), (3,)], "sigmoid", "sum").tolist() == [[2.0, 40.0]]


@pytest.mark.parametrize("count", [3, 16, 99])
def test_divergence_is_kl_with_all_but_the_likeliest_as_one(count):
    generator = torch.Generator().manual_seed(1)
    p_TV, q_TV = (torch.randn(5, 16, generator=generator).double() for _ in range(2))
    found = divergence(q_TV, top(p_TV, count))
    p, q = p_TV.softmax(-1), q_TV.softmax(-1)
    if count < 16:
        order = p.argsort(-1, descending=True)
        p, q = (
            torch.cat([y.gather(1, order)[:, :count], y.gather(1, order)[:, count:].sum(1, keepdim=True)], 1)
            for y in (p, q)
        )
    assert torch.allclose(found.double(), (p * (p / q).log()).sum(-1), atol=1e-5)
    assert divergence(p_TV, top(p_TV, count)).abs().max() < 1e-5


def test_held_out_is_spread_and_never_everything():
    assert tuning.held_out(20, 0.1) == {5, 15}
    assert [len(tuning.held_out(count, share)) for count, share in ((2, 0.9), (2, 0.01), (100, 0.25))] == [1, 1, 25]


def test_stops_when_nothing_was_gained_for_a_while():
    assert not tuning.no_longer_better([3, 2, 1])
    assert not tuning.no_longer_better([3, 1, 2, 2, 0.9])
    assert tuning.no_longer_better([3, 1, 2, 2, 1])


# ---- whose expert is whose


def test_experts_are_followed_through_drops_and_merges():
    layout = moekit.open("refmoe").layout
    first = Plan(layout_hash=layout.hash, ops=[Drop(layer=0, experts=tuple(range(6, 32)))])
    group = Group(members=(3, 0), weights=(0.5, 0.5))
    second = Plan(layout_hash="after the first", ops=[Merge(layer=0, groups=(group,)), Drop(layer=0, experts=(1,))])
    third = Plan(layout_hash="x", ops=[Merge(layer=0, groups=(Group(members=(1, 2), weights=(0.5, 0.5)),))])
    assert follow(layout, [first])[0] == [(e,) for e in range(6)]
    assert follow(layout, [first, second])[0] == [(2,), (3, 0), (4,), (5,)]
    assert follow(layout, [first, second, third])[0] == [(2,), (3, 0, 4), (5,)]
    assert follow(layout, [first])[5] == [(e,) for e in range(32)]


def test_origins_stand_beside_the_model(pruned, opened):
    source, model = pruned("qwen3_moe")
    assert origins(source, model) == {i: [(0,), (2,), (3,), (4,), (5,), (7,)] for i in range(3)}
    assert origins(source, source)[0] == [(e,) for e in range(8)]
    with pytest.raises(PlanError, match="was not made of"):
        origins(opened("qwen3_moe", initializer_range=0.11), model)


def test_a_model_without_its_plans_is_refused(pruned, opened, tmp_path):
    source, _ = pruned("qwen3_moe")
    stranger = opened("qwen3_moe", num_experts=6)
    with pytest.raises(PlanError, match="not known which experts"):
        heal("router-lstsq", fit_of(source, stranger, tmp_path))


# ---- properties


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_least_squares_changes_nothing_where_nothing_is_missing(opened, family, tmp_path):
    plan = heal("router-lstsq", fit_of(opened(family), opened(family), tmp_path))
    assert plan.ops == []
    assert plan.tensors == ""


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_least_squares_finds_spoilt_rows_again(opened, family, tmp_path):
    source = opened(family)
    loader, ops, spoilt = source.loader(torch.float32), [], PlanTensors(tmp_path / "spoilt")
    true = {}
    for layer in source.layout.routed:
        tensors = loader.read(layer.index)
        on_disk = {x.name for x in layer.tensors if x.role == "router"}
        keys = [
            key
            for key, group in loader.placements(layer.index).items()
            if group[0].name in on_disk and key not in layer.correction_biases
        ]
        true |= {key: tensors[key].clone() for key in keys}
        noise = torch.Generator().manual_seed(layer.index)
        spoilt.write(layer.index, {k: true[k] + 0.05 * torch.randn(true[k].shape, generator=noise) for k in keys})
        ops.append(Values(layer=layer.index, names=tuple(sorted(keys))))
    plan = Plan(layout_hash=source.layout.hash, ops=ops, tensors=str(spoilt.folder))
    out = bake(source.checkpoint, source.understanding, plan, tmp_path / "model")
    found = heal("router-lstsq", fit_of(source, Model.open(out.path), tmp_path / "fit", text(40)), ridge=1e-9)
    healed = PlanTensors(found.tensors)
    assert found.ops
    for op in found.ops:
        for name in op.names:
            assert torch.allclose(healed.read(op.layer, name), true[name], atol=2e-3), name
            assert not torch.allclose(spoilt.read(op.layer, name), true[name], atol=2e-2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("job", JOBS)
def test_files_do_what_the_live_plan_does(pruned, family, job, tmp_path):
    source, model = pruned(family)
    plan = heal(job, fit_of(source, model, tmp_path / "fit"))
    if job != "router-lstsq":
        assert plan.ops
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(out.path)
    for ours, theirs in zip(logits(made), logits(model, plan), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    changed = any(not torch.allclose(x, y, atol=1e-5) for x, y in zip(logits(made), logits(model), strict=True))
    assert changed or not plan.ops
    stock, before = made.load(torch.float32).state_dict(), model.load(torch.float32).state_dict()
    moved = {key for key, x in stock.items() if not torch.equal(x, before[key])}
    assert moved == {name for op in plan.ops for name in op.names}
    part = ("router",) if job.startswith("router") else ("router", "expert")
    roles = {x.name: x.role for layer in model.layout.layers for x in layer.tensors}
    placed = {x.key: roles.get(x.name) for x in model.understanding.placed.values()}
    assert {placed[key] for key in moved} <= set(part)


@pytest.mark.parametrize("job", ["router-distill", "router-distill layer", "distill", "reconstruct"])
def test_tuning_brings_the_student_closer_to_the_source(pruned, job, tmp_path):
    source, model = pruned("qwen3_moe")
    data = text(16)
    plan = heal(job, fit_of(source, model, tmp_path, data), steps=20, rate=5e-4 if job == "distill" else 3e-3)
    kl = [
        np.mean([x.kl.value for x in evaluate(subject, data, against=source, dtype=torch.float32).domains.values()])
        for subject in (Subject(model), Subject(model, plan))
    ]
    assert kl[1] < 0.99 * kl[0]
    told = plan.measured.get("held_out_error", {"model": plan.measured.get("held_out_kl")})
    assert all(after <= before for before, after in told.values())


@pytest.mark.parametrize("job", ["router-distill", "distill", "reconstruct"])
def test_what_got_no_better_stays_as_it_is(pruned, job, tmp_path):
    source, model = pruned("qwen3_moe")
    plan = heal(job, fit_of(source, model, tmp_path), rate=1e4)
    assert plan.ops == []
    assert plan.kind == "heal"
    assert Plan.load(plan.save(tmp_path / "plan.json")).kind == "heal"
    assert any("stay as they are" in note for note in plan.notes)


def test_recomputing_layers_gives_the_same_gradients(pruned, tmp_path):
    source, model = pruned("qwen3_moe")
    made = [
        heal("router-distill", fit_of(source, model, tmp_path / str(kept)), recompute=kept) for kept in (False, True)
    ]
    for op in made[0].ops:
        for name in op.names:
            a, b = (PlanTensors(x.tensors).read(op.layer, name) for x in made)
            assert torch.allclose(a, b, atol=1e-6)


def test_one_domain_is_healed_on_its_own_text(pruned, tmp_path):
    source, model = pruned("qwen3_moe")
    data = text()
    alone = Dataset(("code",), [x for x in data.batches if x.domain == 0], 16)
    a = heal_on(source, model, tmp_path / "a", data, "code")
    b = heal_on(source, model, tmp_path / "b", alone, None)
    assert a.measured == b.measured
    with pytest.raises(DataError, match="no domain"):
        heal_on(source, model, tmp_path / "c", data, "cood")


def heal_on(source: Model, model: Model, folder: Path, data: Dataset, domain: str | None) -> Plan:
    return decide("router-lstsq", fit_of(source, model, folder, data), domain=domain)


# ---- rows of merged experts


@pytest.fixture(scope="module")
def merging(opened):
    """(model, statistics that make experts 4 + i like experts i)."""
    model = opened("qwen3_moe")
    layout, layers, rng = model.layout, {}, np.random.default_rng(0)
    for layer in layout.routed:
        seen = rng.normal(size=(300, 8))
        seen[:, 4:] = seen[:, :4] + 0.1 * rng.normal(size=(300, 4))
        fields = {"count": np.r_[np.full(4, 20.0), np.full(4, 10.0)], "logit_gram": seen.T @ seen}
        fields |= {"peak": np.ones(8), "gate_mass": np.ones(8)}
        layers[layer.index] = LayerStats({name: x[None] for name, x in fields.items()})
    return model, Stats(layout.hash, ("code",), np.array([120]), np.array([1]), layers, {"layout": layout.to_dict()})


def test_merged_rows_are_solved_on_the_merged_model(merging, tmp_path):
    model, stats = merging
    fit = fit_of(model, model, tmp_path / "fit")
    fit.stats = stats
    plan = decide("m-smoe", fit, keep=0.5, protect="none", options={"router": "least-squares"})
    assert plan.kind == "merge"
    assert plan.settings["router"] == "least-squares"
    assert {op.op for op in plan.ops} == {"merge", "values"}
    for before, after in plan.measured["router_error"].values():
        assert after < before
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    made = Model.open(out.path)
    assert made.layout.routed[0].num_experts == 4
    for ours, theirs in zip(logits(made), logits(model, plan), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_rows_need_the_model(merging):
    _, stats = merging
    with pytest.raises(PlanError, match="text"):
        methods.make_plan("m-smoe", stats, stats.layout, keep=0.5, router="least-squares")


# ---- killed and gone on


@pytest.mark.parametrize("job", ["router-lstsq", "reconstruct"])
def test_finished_layers_are_not_done_again(pruned, job, tmp_path, monkeypatch):
    source, model = pruned("qwen3_moe")
    whole = heal(job, fit_of(source, model, tmp_path / "whole"))
    from moekit.fitting.heal import layers, rows

    done = []
    place, name = (rows, "_layer") if job == "router-lstsq" else (layers, "_LayerTuning")
    stock = vars(place)[name]

    def two(pair, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(pair.layer.index)
        return stock(pair, *args)

    monkeypatch.setattr(place, name, two)
    with pytest.raises(KeyboardInterrupt):
        heal(job, fit_of(source, model, tmp_path / "cut"))
    done.pop(0)
    again = heal(job, fit_of(source, model, tmp_path / "cut"))
    assert done == [1, 2]
    assert again.measured == whole.measured
    for op in whole.ops:
        for key in op.names:
            assert torch.equal(*(PlanTensors(x.tensors).read(op.layer, key) for x in (whole, again)))


def test_distillation_goes_on_where_it_was_killed(pruned, tmp_path):
    source, model = pruned("qwen3_moe")
    whole = heal("router-distill", fit_of(source, model, tmp_path / "whole"), steps=6)

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "distil" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal("router-distill", fit_of(source, model, tmp_path / "cut", progress=killed), steps=6)
    steps = []
    fit = fit_of(source, model, tmp_path / "cut", progress=lambda *x: steps.append(x[:2]))
    again = heal("router-distill", fit, steps=6)
    assert [done for stage, done in steps if stage == "distil"] == [4, 5, 6]
    assert not [x for x in steps if x[0] == "head"], "the teacher is not asked again"
    assert again.measured == whole.measured
    for op in whole.ops:
        for key in op.names:
            assert torch.equal(*(PlanTensors(x.tensors).read(op.layer, key) for x in (whole, again)))
    assert not list((tmp_path / "cut").glob("*.pt"))


def test_the_folder_of_another_fit_is_refused(pruned, tmp_path):
    source, model = pruned("qwen3_moe")
    heal("router-lstsq", fit_of(source, model, tmp_path))
    with pytest.raises(OutputError, match="another fit"):
        heal("router-lstsq", fit_of(source, model, tmp_path), ridge=0.5)


# ---- mistakes


def test_impossible_settings_are_refused():
    for name, option, value in (
        ("reconstruct", "match", "blok"),
        ("reconstruct", "steps", 0),
        ("router-distill", "held_out", 1.0),
        ("router-distill", "scope", "layers"),
        ("router-lstsq", "ridge", -1.0),
    ):
        with pytest.raises(RecipeError, match=option):
            methods.check_options(name, {option: value})


def test_one_sequence_is_too_little(pruned, tmp_path):
    source, model = pruned("qwen3_moe")
    one = Dataset(("code",), [tiny.batch(0, 16)], 16)
    for job in ("router-distill", "router-distill layer"):
        with pytest.raises(DataError, match="too little text"):
            heal(job, fit_of(source, model, tmp_path / job, one))


def test_a_teacher_of_another_kind_is_refused(pruned, opened, tmp_path):
    _, model = pruned("qwen3_moe")
    with pytest.raises(PlanError, match="vocabulary"):
        heal("router-distill", fit_of(opened("qwen3_moe", vocab_size=99), model, tmp_path))


# ---- several processes

WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_heal as t
from moekit.families.model import Model
from moekit.fitting.heal.team import Team, gathered
stock = Team.load
def load(self, loader, learning):
    stock(self, loader, learning)
    for name, x in loader.layers.named_parameters():
        here = getattr(x, "to_local", lambda: x)().numel() / x.numel()
        assert here == (1 if name.endswith({learning!r}) else 0.5), name
Team.load = load
with gathered() as first:
    if first:
        assert Team.here().size == 2
        fit = t.fit_of(Model.open({source!r}), Model.open({model!r}), t.Path({folder!r}))
        t.heal({job!r}, fit, sequences=3).save({plan!r})
"""


@pytest.mark.parametrize(
    ("job", "learning"),
    [("router-distill", ("gate.weight",)), ("distill", ("gate.weight", "gate_up_proj", "down_proj"))],
)
def test_two_processes_tune_as_one_does(pruned, job, learning, tmp_path):
    source, model = pruned("qwen3_moe")
    alone = heal(job, fit_of(source, model, tmp_path / "alone"), sequences=3)
    code = WORKER.format(
        tests=str(Path(__file__).parent),
        source=str(source.path),
        model=str(model.path),
        folder=str(tmp_path / "two"),
        plan=str(tmp_path / "plan.json"),
        job=job,
        learning=learning,
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for free_port in [_free_port()]
        for rank in (0, 1)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    together_ = Plan.load(tmp_path / "plan.json")
    assert together_.measured["held_out_kl"] == pytest.approx(alone.measured["held_out_kl"], rel=1e-4)
    assert [op.names for op in together_.ops] == [op.names for op in alone.ops]
    for op in alone.ops:
        for key in op.names:
            one, two = (PlanTensors(x.tensors).read(op.layer, key) for x in (alone, together_))
            assert torch.allclose(one, two, atol=1e-4)


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
